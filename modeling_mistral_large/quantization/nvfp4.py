"""Linear layers that keep their weights in FP4 with FP8 scales, as `convert --quantize nvfp4` writes them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mistral_large_conversion.checkpoint.quantization import CODES_PER_BYTE, GROUP_SIZES
from modeling_mistral_large.quantization.linear import QuantizedLinear, halves

(GROUP_SIZE,) = GROUP_SIZES["nvfp4"]
# E2M1 bits shifted into FP16 keep a bias of 1 instead of 15: the value comes out 2**-14 too small.
SIGN, LOW_BITS = -0x8000, 0x0E00
FP4_TO_FP16 = 2.0**14


class Nvfp4Linear(QuantizedLinear):
    """Weights in FP4 with an FP8 scale for each group of 16 and one FP32 global scale; activations are not quantized.

    W4A16 on every device, and no kernel on any: each product dequantizes a few rows at a time and drops them.
    """

    weight_packed: Tensor
    weight_global_scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, out_features)
        rows = out_features
        self.hold_(
            weight_packed=torch.empty(rows, in_features // CODES_PER_BYTE, dtype=torch.uint8, device=device),
            weight_scale=torch.empty(rows, in_features // GROUP_SIZE, dtype=torch.float8_e4m3fn, device=device),
            weight_global_scale=torch.empty(1, dtype=torch.float32, device=device),
        )

    def after_loading_(self) -> None:
        for name, tensor in list(self.named_parameters()):
            if isinstance(tensor, DTensor):
                # The global scale is one number, which the first rank has.
                self.hold_(**{name: tensor.full_tensor() if tensor.ndim == 1 else tensor.to_local()})
        self.check_groups(self.weight_packed.shape[1] * CODES_PER_BYTE, GROUP_SIZE)

    def file_tensors(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in self.named_parameters()}

    def dequantized_rows(self, dtype: torch.dtype) -> Iterator[Tensor]:
        step = self.rows_at_once()
        for start in range(0, self.weight_packed.shape[0], step):
            packed, scales = self.weight_packed[start : start + step], self.weight_scale[start : start + step]
            groups = dequantize_fp4(halves(packed)).view(len(packed), -1, GROUP_SIZE)
            groups *= (scales.float() / self.weight_global_scale)[..., None]
            yield groups.flatten(-2).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dequantized_product(hidden)


def dequantize_fp4(codes: Tensor) -> Tensor:
    """The FP32 values of FP4 (E2M1) codes 0…15."""
    bits = codes.to(torch.int16)
    return ((bits << 12 & SIGN) | (bits << 9 & LOW_BITS)).view(torch.float16).float().mul_(FP4_TO_FP16)
