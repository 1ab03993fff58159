"""Merging of LoRA into weights while they stream, bit for bit as PEFT's merge_and_unload() does on the CPU; it needs
torch.

PEFT takes A and B as float32, multiplies them, multiplies the product by the scaling, and adds it to the weight in
place: the sum is computed in float32 and rounded to the dtype of the weight once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from mistral_large_conversion.checkpoint.adapter import Adapter, LoraPair, read_bytes
from mistral_large_conversion.checkpoint.rope import split_rope_pairs
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor, TensorEntry
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.transforms import Rows, numbers_of

if TYPE_CHECKING:
    import torch

# Rows of the product that are computed at once. A BLAS has other kernels for the last few rows of a matrix and for a
# matrix of few rows, with other bits; in blocks of at least these rows, each row has the bits of the whole product.
PRODUCT_ROWS = 128
# Weights of these are added to; no FP8.
MERGED_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class MergeLora:
    """The rows of a linear layer's weight, in HF order, with its LoRA added; of dtype `dtype` before and after."""

    pair: LoraPair
    dtype: str

    rows_at_once = 1

    def __call__(self, rows: Rows) -> Rows:
        """All rows of the weight."""
        return self.begin()(rows)

    def begin(self) -> "Merging":
        """Read the adapter for a weight whose rows come block by block, from the first on."""
        return Merging(self)


def merge_step(adapter: Adapter, name: str, weight: TensorEntry, dtype: str) -> MergeLora | None:
    """Return the step that merges an adapter into a weight, None where it has no LoRA for it.

    name: that of the weight in the HF layout.
    dtype: of the weight when it is merged.

    Raises:
        CheckpointError: a dtype that nothing can be added to.
    """
    pair = adapter.pairs.get(name)
    if pair is None:
        return None
    if dtype not in MERGED_DTYPES:
        raise CheckpointError(
            f"tensor {weight.name!r} has dtype {dtype}, which no adapter can be merged into; ask for a dtype to have "
            "it converted first"
        )
    return MergeLora(pair, dtype)


class Merging:
    """A weight that is being merged; called with each of its blocks of rows, in order."""

    rows_at_once = 1

    def __init__(self, merge: MergeLora) -> None:
        pair = merge.pair
        self._dtype = merge.dtype
        self._scaling = pair.scaling
        self._down = _read(pair.down)
        up = _read(pair.up)
        self._up = up if (size := pair.interleaved_head_dim) is None else split_rope_pairs(up, head_dim=size)
        self._row = 0
        # Rows start … end of the product that are at hand.
        self._start = self._end = 0
        self._product = self._up[:0]

    def __call__(self, rows: Rows) -> Rows:
        """The next rows, merged; a ValueError where a finite value would become infinite or none."""
        import torch

        weight = numbers_of(rows.copy(), self._dtype)
        filled = 0
        while filled < len(weight):
            if self._row == self._end:
                self._multiply()
            count = min(len(weight) - filled, self._end - self._row)
            offset = self._row - self._start
            weight[filled : filled + count] += self._product[offset : offset + count]
            filled += count
            self._row += count
        if not weight.isfinite().all():
            before = numbers_of(rows, self._dtype)
            wrong = weight[before.isfinite() & ~weight.isfinite()]
            if len(wrong):
                raise ValueError(
                    f"becomes {wrong[0].item()} with the adapter; choose a dtype with a larger range, or another "
                    "adapter"
                )
        merged: Rows = weight.view(torch.uint8).numpy()
        return merged

    def _multiply(self) -> None:
        """Compute the next rows of the product; too few at the end are computed with those before them."""
        self._start = self._end
        rest = len(self._up) - self._start
        self._end += PRODUCT_ROWS if rest >= 2 * PRODUCT_ROWS else rest
        self._product = (self._up[self._start : self._end] @ self._down).mul_(self._scaling)


def _read(tensor: FileTensor) -> "torch.Tensor":
    """The values of a tensor in float32."""
    values = numbers_of(numpy.frombuffer(read_bytes(tensor), numpy.uint8), tensor.dtype)
    return values.reshape(tensor.shape).float()
