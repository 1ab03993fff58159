"""Rounding of weights to the nearest code of a quantized checkpoint, some rows at a time; it needs torch."""

from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO

import numpy

from mistral_large_conversion.checkpoint.quantization import GROUP_SIZE, Scheme
from mistral_large_conversion.checkpoint.safetensors_header import StoredTensor, TensorEntry
from mistral_large_conversion.transforms import Rows, numbers_of

if TYPE_CHECKING:
    import torch

LARGEST_FP8 = 448.0
# Half the distance between the least and the greatest code, -8 and 7, as compressed-tensors divides.
HALF_INT4_RANGE = 7.5
LARGEST_FP4 = 6.0
# What the greatest magnitude of a group is divided by.
LARGEST_CODES: dict[Scheme, float] = {"fp8": LARGEST_FP8, "int4": HALF_INT4_RANGE, "nvfp4": LARGEST_FP4}
# The scales of nothing but zeros are those of compressed-tensors: of BF16, the distance of 1 to the next number.
SCALE_OF_ZEROS = 2.0**-7
FP8_SCALE_OF_ZEROS = 2.0**-3


@dataclass(frozen=True)
class MadeTensor(StoredTensor):
    """A tensor that is none of the source's."""


@dataclass(frozen=True)
class ConstantTensor(MadeTensor):
    """A tensor that the plan knows by itself."""

    content: bytes

    def open(self) -> BinaryIO:
        return BytesIO(self.content)


def shape_tensor(entry: TensorEntry, shape: tuple[int, ...]) -> ConstantTensor:
    """The tensor `weight_shape` of an int4 weight of this shape."""
    content = numpy.array(shape, "<i8").tobytes()
    return ConstantTensor(entry.name, entry.dtype, entry.shape, entry.size, content)


def largest_magnitude(rows: Rows, dtype: str) -> float:
    """The greatest magnitude in some rows; a ValueError for a number that is none, or is infinite."""
    return float(_largest(numbers_of(rows, dtype).float()).max())


def global_scale_bytes(largest: float) -> bytes:
    """The tensor `weight_global_scale` of nvfp4 weights: what brings the greatest scale of a group to that of FP8.

    Weights so small that it would be infinite have 1.
    """
    with numpy.errstate(divide="ignore", over="ignore"):
        # In the order of compressed-tensors, which rounds twice.
        scale = numpy.float32(1) / numpy.float32(largest) * numpy.float32(LARGEST_FP8 * LARGEST_FP4)
    return numpy.array([scale if numpy.isfinite(scale) else 1], "<f4").tobytes()


@dataclass(frozen=True)
class Quantize:
    """Rows of a weight, of dtype `dtype`, to rows of its codes and of its scales.

    Each scale is rounded first, to BF16 or of nvfp4 to FP8, and the codes are chosen for what it is then.
    global_scale: of nvfp4, read by `begin`.
    """

    dtype: str
    scheme: Scheme
    group_size: int = GROUP_SIZE
    global_scale: StoredTensor | None = None
    factor: float = 1.0

    def begin(self) -> "Quantize":
        """The same with what it needs read."""
        if self.global_scale is None:
            return self
        with self.global_scale.open() as stream:
            return replace(self, factor=float(numpy.frombuffer(stream.read(), "<f4")[0]))

    def __call__(self, rows: Rows) -> tuple[Rows, Rows]:
        """The rows of both outputs; a ValueError for a number that is none, or is infinite."""
        import torch

        numbers = numbers_of(rows, self.dtype).float()
        groups = numbers.view(len(numbers), -1, numbers.shape[1] if self.scheme == "fp8" else self.group_size)
        scales = _largest(groups) / LARGEST_CODES[self.scheme]
        if self.scheme == "nvfp4":
            factor = torch.tensor(self.factor, dtype=torch.float32)
            scales = (scales * factor).clamp_(max=LARGEST_FP8).to(torch.float8_e4m3fn)
            wide = scales.float()
            wide[wide == 0] = FP8_SCALE_OF_ZEROS
            scales = wide.to(torch.float8_e4m3fn)
            wide /= factor
        else:
            scales = scales.bfloat16()
            scales[scales == 0] = SCALE_OF_ZEROS
            wide = scales.float()
        quotients = (groups / wide).flatten(-2)
        if self.scheme == "fp8":
            codes = quotients.clamp_(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            if self.scheme == "nvfp4":
                nibbles = fp4_codes(quotients)
            else:
                nibbles = quotients.round_().clamp_(-8, 7).add_(8).to(torch.uint8)
            # Two codes a byte, the first in the lower half.
            codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        return codes.numpy(), scales.flatten(-2).view(torch.uint8).numpy()


def fp4_codes(numbers: "torch.Tensor") -> "torch.Tensor":
    """The codes 0…15 of the FP4 (E2M1) numbers nearest to these, the even one of two: the sign is the highest bit."""
    import torch

    magnitudes = numbers.abs()
    # The magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
    codes = (magnitudes > 0.25).to(torch.uint8)
    codes += magnitudes >= 0.75
    codes += magnitudes > 1.25
    codes += magnitudes >= 1.75
    codes += magnitudes > 2.5
    codes += magnitudes >= 3.5
    codes += magnitudes > 5
    return codes | (numbers < 0).to(torch.uint8) << 3


def _largest(groups: "torch.Tensor") -> "torch.Tensor":
    """The greatest magnitude in each row, or in each group of each row."""
    largest = groups.abs().amax(-1, keepdim=True)
    if not largest.isfinite().all():
        wrong = groups[~groups.isfinite()][0].item()
        raise ValueError(f"holds {wrong}: only finite weights can be quantized; download it again")
    return largest
