"""sdpa attention with a mask, as the parts of a long prompt and padded prompts have one, without repeating the cache.

transformers repeats keys and values for every query head when there is a mask: for 131072 positions of 2407 that is
6.4 GB in each layer. Here the heads of one key-value head at a time see it through a view. The results are the same
bit for bit.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from modeling_mistral_large.transformers_api import attention_implementation

# Options of transformers' sdpa attention that are not known here.
OTHER_OPTIONS = frozenset({"cache", "is_causal", "position_bias", "softcap"})


def is_plain_sdpa(module: Any, options: Iterable[str]) -> bool:
    """Whether an attention layer is to run transformers' sdpa attention, without options that only that one has."""
    return attention_implementation(module.config) == "sdpa" and OTHER_OPTIONS.isdisjoint(options)


def takes_masked_attention(module: Any, query: Tensor, attention_mask: Any, options: Iterable[str]) -> bool:
    """Whether several positions [batch, heads, queries, head_dim] are to be masked by a tensor, in sdpa."""
    # sdpa first, as other attentions may call with what is no tensor.
    return (
        is_plain_sdpa(module, options)
        and isinstance(attention_mask, Tensor)
        and query.shape[2] > 1
        and module.num_key_value_groups > 1
    )


def masked_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with the heads of one key-value head after those of another.

    `query` is [batch, heads, queries, head_dim], `key` and `value` are [batch, kv_heads, keys, head_dim], the mask is
    [batch, 1 or heads, queries, keys]. Returns [batch, queries, heads, head_dim].
    """
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
    return attended, None
