"""How many tokens a layer of a cache holds, whatever has broken off a forward pass in the middle."""

from typing import Any

from transformers.cache_utils import Cache


def capacity(cache: Cache) -> int | None:
    """How many tokens a static cache can hold; None for a cache that grows."""
    sizes = [int(layer.max_cache_len) for layer in cache.layers if hasattr(layer, "max_cache_len")]
    return min(sizes, default=None)


def keep_first(cache: Cache, tokens: int) -> None:
    """Leave the first `tokens` of every layer, also where a forward pass ended between two layers or inside of one."""
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        # `crop` takes as many off the values as off the keys.
        if keys is not None and values is not None and values.shape[-2:-1] < keys.shape[-2:-1]:
            layer.keys = keys[..., : values.shape[-2], :]
        excess = int(layer.get_seq_length()) - tokens
        if excess <= 0:
            continue
        if layer.is_croppable:
            layer.crop(-excess)
        else:
            # Before 5.24 a static layer has no method for it, and its count is all.
            layer.cumulative_length.sub_(excess)
