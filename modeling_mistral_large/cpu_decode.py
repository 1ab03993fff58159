"""Two faster ways to compute what a single new token needs, for bf16 on the CPU, where torch's own are slow.

They read the same weights and the same cache as the plain ways, keep nothing, and differ from them by no more than the
rounding of bf16. Each is taken by itself, in eval mode and without gradients or autocast; everything else goes the
plain way. By name they can be turned off: `turn_off("linear")`, or `MISTRAL_LARGE_CPU_DECODE_OFF=attention,linear`
before the import.

- `attention`: the query heads that share a key-value head are given to sdpa as the positions of one head, which reads
  the cache once; with `enable_gqa=True` torch reads it for every query head.
- `linear`: a product with a single row is computed as matrix times vector, which reads the weights as fast as the
  memory gives them; torch's product of matrices does not. This is so on processors with AMX, and only there it is
  taken: with AVX512 and BF16 alone the vector's product is slower, and with neither they are alike.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SettingError
from .masked_attention import is_plain_sdpa

PATHS = frozenset({"attention", "linear"})
OFF_VARIABLE = "MISTRAL_LARGE_CPU_DECODE_OFF"
# The function is torch's own, and not in all its versions.
HAS_AMX = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _known(paths: Iterable[str], asked_by: str) -> frozenset[str]:
    names = frozenset(paths)
    if unknown := names - PATHS:
        raise SettingError(
            f"{asked_by}: {sorted(unknown)[0]!r} is no fast path of decoding on the CPU; "
            f"name one of {', '.join(sorted(PATHS))}, or several"
        )
    return names


def named_in_environment() -> frozenset[str]:
    """The paths that the environment turns off; SettingError for other names."""
    return _known(filter(None, os.environ.get(OFF_VARIABLE, "").replace(" ", "").split(",")), OFF_VARIABLE)


# Bound anew on every change: compiled graphs are guarded by its value.
_off = named_in_environment()


def switched_off() -> frozenset[str]:
    """The paths that are not taken now."""
    return _off


def turn_off(*paths: str) -> None:
    """Compute the plain way what the named paths do, for all models of this process; SettingError for other names."""
    global _off
    _off |= _known(paths, "turn_off")


def turn_on(*paths: str) -> None:
    """Let the named paths be taken again where they can be; SettingError for other names."""
    global _off
    _off -= _known(paths, "turn_on")


def _takes(path: str, module: nn.Module, states: Tensor) -> bool:
    return (
        states.device.type == "cpu"
        and states.dtype == torch.bfloat16
        and not module.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and path not in _off
    )


@torch.library.custom_op("mistral_large::matrix_vector", mutates_args=())
def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """`torch.mv` that torch.compile calls as it is; what it makes of the plain one is slower than a matrix product."""
    return torch.mv(matrix, vector)


@matrix_vector.register_fake
def _(matrix: Tensor, vector: Tensor) -> Tensor:
    return vector.new_empty(matrix.shape[0])


class Linear(nn.Linear):
    """A linear layer that multiplies one row of bf16 on a CPU with AMX as a vector, and is torch's in all else.

    It has torch's name, as quantizers look for linear layers by it. Layers that take its place have their own products.
    """

    def forward(self, input: Tensor) -> Tensor:
        if (
            HAS_AMX
            and _takes("linear", self, input)
            and input.numel() == self.in_features
            # Not the weights that a subclass of Tensor spreads over ranks or quantizes.
            and type(self.weight) is nn.Parameter
            and self.bias is None
        ):
            product = matrix_vector if torch.compiler.is_compiling() else torch.mv
            return product(self.weight, input.reshape(-1)).view(*input.shape[:-1], -1)
        return super().forward(input)


def takes_grouped_attention(module: Any, query: Tensor, options: Iterable[str]) -> bool:
    """Whether [batch, heads, queries, head_dim] are the queries of single tokens that sdpa would be slow with."""
    # sdpa first, as other attentions may call with what is no tensor.
    return is_plain_sdpa(module, options) and _takes("attention", module, query) and query.shape[2] == 1


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
