"""The attention functions of the model: transformers' by name, with an `sdpa` for grouped-query attention.

transformers' sdpa repeats keys and values for every query head when there is a mask: at 131072 tokens of 2407 that is
6.4 GB in each layer. For a single token in bf16 on the CPU, torch's own grouped attention reads the cache once for
every query head. The `sdpa` here does neither.

Both `sdpa` and `eager` also take ragged states: rows of one token, each of which attends to a cache of its own length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as STOCK_FUNCTIONS

# Options that only transformers' sdpa attention has.
STOCK_OPTIONS = frozenset({"cache", "is_causal", "position_bias", "softcap"})


class RaggedStates(tuple[Tensor, ...]):
    """Keys or values of several sequences, [1, kv_heads, tokens, head_dim] with as many tokens as each of them has."""


def is_bf16_inference(module: nn.Module, states: Tensor) -> bool:
    """Whether a module runs in bf16 on the CPU and in eval mode, without gradients or autocast."""
    return (
        states.device.type == "cpu"
        and states.dtype == torch.bfloat16
        and not module.training
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as written in the paper; the one implementation that returns its weights.

    `query` is [batch, heads, queries, head_dim], `key` and `value` are [batch, kv_heads, keys, head_dim], the mask is
    added to the scores [batch, heads, queries, keys]. Returns [batch, queries, heads, head_dim] and the weights.
    """
    if isinstance(key, RaggedStates) and isinstance(value, RaggedStates):
        rows = zip(query.chunk(len(key)), key, value, strict=True)
        attended = [eager_attention_forward(module, *row, None, scaling, dropout)[0] for row in rows]
        # The weights of the rows have no common shape.
        return torch.cat(attended), None
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that never materializes repeated keys and values.

    `query` is [batch, heads, queries, head_dim], `key` and `value` are [batch, kv_heads, keys, head_dim], the mask is
    [batch, 1 or heads, queries, keys]. Returns [batch, queries, heads, head_dim]. Bit for bit what transformers
    computes, but for single tokens in bf16 on the CPU, where sums are rounded in another order.
    """
    if isinstance(key, RaggedStates) and isinstance(value, RaggedStates):
        return _ragged_attention(query, key, value, scaling), None
    if STOCK_OPTIONS.isdisjoint(options):
        if query.shape[2] == 1 and is_bf16_inference(module, query):
            return _single_token_attention(query, key, value, attention_mask, scaling), None
        if query.shape[2] > 1 and query.shape[1] > key.shape[1] and attention_mask is not None:
            return _masked_attention(query, key, value, attention_mask, scaling, dropout), None
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return attended


def _ragged_attention(query: Tensor, key: Sequence[Tensor], value: Sequence[Tensor], scaling: float) -> Tensor:
    """Attend with one token of each row to the row's own keys and values, which nothing hides from it."""
    rows, heads, _, head_dim = query.shape
    kv_heads = key[0].shape[1]
    grouped = query.reshape(rows, 1, kv_heads, heads // kv_heads, head_dim).unbind()
    attended = [
        nn.functional.scaled_dot_product_attention(row, keys, values, scale=scaling)
        for row, keys, values in zip(grouped, key, value, strict=True)
    ]
    return torch.cat(attended).reshape(rows, 1, heads, head_dim)


def _single_token_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float
) -> Tensor:
    """Attend with the query heads of a key-value head as if they were the tokens of one head."""
    batch, heads, _, head_dim = query.shape
    grouped = (batch, key.shape[1], heads // key.shape[1], -1)
    if attention_mask is not None and attention_mask.shape[1] > 1:
        attention_mask = attention_mask.reshape(grouped)
    attended = nn.functional.scaled_dot_product_attention(
        query.reshape(grouped), key, value, attn_mask=attention_mask, scale=scaling
    )
    return attended.reshape(batch, 1, heads, head_dim)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, dropout: float
) -> Tensor:
    """Attend by one key-value head after the other, whose query heads see it through a view."""
    batch, heads, queries, head_dim = query.shape
    group = heads // key.shape[1]
    attended = query.new_empty(batch, queries, heads, head_dim)
    for head in range(key.shape[1]):
        of_head = slice(head * group, (head + 1) * group)
        attended[:, :, of_head] = nn.functional.scaled_dot_product_attention(
            query[:, of_head],
            key[:, head : head + 1].expand(-1, group, -1, -1),
            value[:, head : head + 1].expand(-1, group, -1, -1),
            attn_mask=attention_mask if attention_mask.shape[1] == 1 else attention_mask[:, of_head],
            dropout_p=dropout,
            scale=scaling,
        ).transpose(1, 2)
    return attended


class _AttentionFunctions(AttentionInterface):
    """transformers' attention functions, also those that an engine sets on `ALL_ATTENTION_FUNCTIONS`, with our sdpa."""

    def __getitem__(self, key: str) -> Callable[..., Any]:
        function: Callable[..., Any] = sdpa_attention if key == "sdpa" else STOCK_FUNCTIONS[key]
        return function


# The name by which transformers sees that a model takes `set_attn_implementation`: it searches the model's source.
ALL_ATTENTION_FUNCTIONS = _AttentionFunctions()  # type: ignore[no-untyped-call]  # transformers does not type it
