"""int4 products on GPUs with Triton: few tokens by the kernel of recorded steps, more with dequantized weights.

The weights stay in the packed layout of the checkpoint. As custom operators, torch.compile calls both unchanged.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

# Of one product, and the groups that it can take at a time.
MOST_TOKENS, GROUP_SIZES = 16, (64, 128)
HAS_TRITON = find_spec("triton") is not None


def has_int4_kernels(device: torch.device) -> bool:
    """Whether a device runs the Triton kernels; AMD's does not, for which they were not compiled."""
    return (
        HAS_TRITON
        and device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@torch.library.custom_op("mistral_large::dequantize_int4", mutates_args=())
def dequantize_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """BF16 [rows, columns] of int32 words [rows, columns / 8] and BF16 scales [rows, groups], read and written once."""
    from modeling_mistral_large.inference.gpu_kernels import dequantized_int4

    with torch.cuda.device(packed.get_device()):
        return dequantized_int4(packed.contiguous(), scales.contiguous())


@dequantize_int4.register_fake
def _(packed: Tensor, scales: Tensor) -> Tensor:
    return packed.new_empty(packed.shape[0], packed.shape[1] * 8, dtype=torch.bfloat16)


@torch.library.custom_op("mistral_large::int4_product", mutates_args=())
def int4_product(tokens: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """tokens [1 to 16, columns] @ weight.T in BF16, of groups of 64 or 128."""
    from modeling_mistral_large.inference.gpu_kernels import int4_product

    with torch.cuda.device(packed.get_device()):
        return int4_product(tokens.contiguous(), packed.contiguous(), scales.contiguous())


@int4_product.register_fake
def _(tokens: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], packed.shape[0])
