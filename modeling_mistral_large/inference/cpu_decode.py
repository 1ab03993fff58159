"""Linear layers that multiply a single token as a vector, for bf16 on CPUs with AMX.

There torch's matrix times vector reads the weights at the memory's full bandwidth, and its product of matrices with one
row does not. The weights are the same, nothing is copied, and the results differ by no more than bf16's rounding.
"""

import torch
from torch import Tensor, nn

from mistral_large_conversion.errors import SettingError
from modeling_mistral_large.inference.attention import is_bf16_inference

# The function is torch's own, and not in all its versions.
HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@torch.library.custom_op("mistral_large::matrix_vector", mutates_args=())
def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """`torch.mv` that torch.compile calls unchanged; what it makes of the plain one is slower than a matrix product."""
    return torch.mv(matrix, vector)


@matrix_vector.register_fake
def _(matrix: Tensor, vector: Tensor) -> Tensor:
    return vector.new_empty(matrix.shape[0])


class _VectorLinear(nn.Linear):
    """A linear layer that multiplies one row of bf16 on the CPU as a vector, and is torch's in all else."""

    def forward(self, input: Tensor) -> Tensor:
        if (
            is_bf16_inference(self, input)
            and input.numel() == self.in_features
            # Not the weights that a subclass of Tensor shards over ranks or quantizes.
            and type(self.weight) is nn.Parameter
        ):
            product = matrix_vector if torch.compiler.is_compiling() else torch.mv
            return product(self.weight, input.reshape(-1)).view(*input.shape[:-1], -1)
        return super().forward(input)


def use_vector_products_(model: nn.Module) -> None:
    """Let a loaded model compute the linear layers of a single token, batch size 1, as matrix times vector.

    It changes the plain `nn.Linear` layers without bias whose weights are bf16 on the CPU; quantized and offloaded ones
    stay. Call it after loading and after quantizing: quantizers look for `nn.Linear` and pass over what it changes.

    Raises:
        SettingError: it would not make the model faster, because the processor has no AMX or no layer is such a one.
    """
    if not HAS_AMX:
        raise SettingError(
            "use_vector_products_: this processor has no AMX, without which torch's own product is as fast or faster; "
            "leave the call out"
        )
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.bias is None
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.bfloat16
    ]
    if not layers:
        raise SettingError(
            "use_vector_products_: the model has no linear layer in bf16 on the CPU; load it with dtype='bfloat16' "
            "and without a quantization or device_map, or leave the call out"
        )
    for layer in layers:
        layer.__class__ = _VectorLinear


def uses_vector_products(model: nn.Module) -> bool:
    """Whether a model computes single tokens as matrix times vector."""
    return any(isinstance(module, _VectorLinear) for module in model.modules())
