"""Rounding of weights to the nearest code of a quantized checkpoint, some rows at a time; it needs torch."""

from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy

from mistral_large_conversion.checkpoint.quantization import GROUP_SIZE, Scheme
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES, StoredTensor, TensorEntry
from mistral_large_conversion.transforms import Rows

LARGEST_FP8 = 448.0
# Half the distance between the least and the greatest code, -8 and 7, as compressed-tensors divides.
HALF_INT4_RANGE = 7.5
# The scale of nothing but zeros: that of compressed-tensors, the distance of 1 to the next BF16.
SCALE_OF_ZEROS = 2.0**-7


@dataclass(frozen=True)
class ConstantTensor(StoredTensor):
    """A tensor that the plan knows by itself."""

    content: bytes

    def open(self) -> BinaryIO:
        return BytesIO(self.content)


def shape_tensor(entry: TensorEntry, shape: tuple[int, ...]) -> ConstantTensor:
    """The tensor `weight_shape` of an int4 weight of this shape."""
    content = numpy.array(shape, "<i8").tobytes()
    return ConstantTensor(entry.name, entry.dtype, entry.shape, entry.size, content)


@dataclass(frozen=True)
class Quantize:
    """Rows of a weight, of dtype `dtype`, to rows of its codes and of its scales.

    Each scale is rounded to BF16 first, and the codes are chosen for what it is then.
    """

    dtype: str
    scheme: Scheme
    group_size: int = GROUP_SIZE

    def __call__(self, rows: Rows) -> tuple[Rows, Rows]:
        """The rows of both outputs; a ValueError for a number that is none, or is infinite."""
        import torch

        numbers: torch.Tensor = torch.from_numpy(rows).view(getattr(torch, TORCH_NAMES[self.dtype])).float()
        groups = numbers.view(len(numbers), -1, numbers.shape[1] if self.scheme == "fp8" else self.group_size)
        largest = groups.abs().amax(-1, keepdim=True)
        if not largest.isfinite().all():
            wrong = numbers[~numbers.isfinite()][0].item()
            raise ValueError(f"holds {wrong}: only finite weights can be quantized; download it again")
        scales = (largest / (LARGEST_FP8 if self.scheme == "fp8" else HALF_INT4_RANGE)).bfloat16()
        scales[scales == 0] = SCALE_OF_ZEROS
        quotients = (groups / scales.float()).flatten(-2)
        if self.scheme == "fp8":
            codes = quotients.clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            nibbles = quotients.round_().clamp_(-8, 7).add_(8).to(torch.uint8)
            # Two codes a byte, the first in the lower half: little-endian words of eight.
            codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        return codes.numpy(), scales.flatten(-2).view(torch.uint8).numpy()
