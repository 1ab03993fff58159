"""Two faster products for a single new token, for bf16 on the CPU, where torch's own are slow.

They read the same weights and the same cache as the plain products, keep nothing, and differ from them by no more than
bf16's rounding. Both run in eval mode only, without gradients or autocast; everything else is computed as transformers
computes it.

- Grouped attention, always: the query heads that share a key-value head are given to sdpa as the tokens of one head,
  which reads the cache once; with `enable_gqa=True` torch reads it for every query head.
- Vector products, after `use_vector_products_(model)`: a product with a single row is computed as matrix times vector,
  which on processors with AMX reads the weights at the memory's full bandwidth.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mistral_large_conversion.errors import SettingError
from modeling_mistral_large.inference.attention import is_plain_sdpa

# The function is torch's own, and not in all its versions.
HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _is_bf16_inference(module: nn.Module, states: Tensor) -> bool:
    return (
        states.device.type == "cpu"
        and states.dtype == torch.bfloat16
        and not module.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


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
            _is_bf16_inference(self, input)
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


def takes_grouped_attention(module: Any, query: Tensor, options: Iterable[str]) -> bool:
    """Whether [batch, heads, queries, head_dim] are the queries of single tokens that sdpa would be slow with."""
    # sdpa first, as other attentions may call with what is no tensor.
    return is_plain_sdpa(module, options) and _is_bf16_inference(module, query) and query.shape[2] == 1


def grouped_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa attention of one position a sequence; dropout is for training, which does not come here.

    `query` is [batch, heads, 1, head_dim], `key` and `value` are [batch, kv_heads, keys, head_dim], the mask is
    [batch, 1 or heads, 1, keys]. Returns [batch, 1, heads, head_dim].
    """
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    if attention_mask is not None and attention_mask.shape[1] > 1:
        attention_mask = attention_mask.reshape(batch, kv_heads, heads // kv_heads, -1)
    attended = nn.functional.scaled_dot_product_attention(
        query.reshape(batch, kv_heads, heads // kv_heads, head_dim),  # the group in the place of the positions
        key,
        value,
        attn_mask=attention_mask,
        scale=scaling,
    )
    return attended.reshape(batch, 1, heads, head_dim), None
