"""A key-value cache for one sequence whose memory grows in steps, and the caches of several sequences as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer

from modeling_mistral_large.inference.attention import RaggedStates
from modeling_mistral_large.inference.kv_cache import pack, unpack

# Room for growth, as a part of the tokens in the cache: few copies, little memory.
GROWTH = 8
LEAST_GROWTH = 32


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, written in place; `states` are [2, 1, kv_heads, capacity, head_dim], or packed."""

    def __init__(self, *, fp8: bool = False) -> None:
        super().__init__()
        self.fp8 = fp8
        self.states: Tensor | None = None
        self.length = 0

    @property
    def keys(self) -> Tensor | None:
        return None if self.states is None else self.states[0, :, :, : self.length]

    @keys.setter
    def keys(self, _: Tensor | None) -> None:
        # The base class sets them when it is made.
        pass

    @property
    def values(self) -> Tensor | None:
        return None if self.states is None else self.states[1, :, :, : self.length]

    @values.setter
    def values(self, _: Tensor | None) -> None:
        pass

    @property
    def capacity(self) -> int:
        """The number of tokens there is memory for."""
        return 0 if self.states is None else self.states.shape[3]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [1, kv_heads, tokens, head_dim] and return those of all tokens."""
        return self.append(torch.stack((key_states, value_states)))

    def append(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [2, 1, kv_heads, tokens, head_dim] and return those of all tokens."""
        stored = pack(new) if self.fp8 else new
        end = self.length + new.shape[3]
        self.dtype, self.device, self.is_initialized = new.dtype, new.device, True
        if end > self.capacity:
            self._move(end + max(LEAST_GROWTH, end // GROWTH), stored)
        assert self.states is not None
        self.states.narrow(3, self.length, new.shape[3]).copy_(stored)
        self.length = end
        seen = self.states.narrow(3, 0, end)
        keys, values = (unpack(seen, new.dtype) if self.fp8 else seen).unbind()
        return keys, values

    def _move(self, capacity: int, like: Tensor) -> None:
        """Move what is stored into memory for `capacity` tokens, of the kind of [2, 1, kv_heads, tokens, width]."""
        states = like.new_empty(*like.shape[:3], capacity, like.shape[4])
        if self.states is not None:
            states[:, :, :, : self.length] = self.states[:, :, :, : self.length]
        self.states = states

    def reserve(self, tokens: int) -> None:
        """Make room for a number of tokens, once it is known what they look like."""
        if self.states is not None and tokens > self.capacity:
            self._move(tokens, self.states)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens off, given as a negative number; memory that is for the most part empty is freed."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative number")
        self.length = max(0, self.length + tokens_to_remove)
        if not self.length:
            self.reset()
        elif self.states is not None and self.capacity > 2 * self.length + LEAST_GROWTH:
            self._move(self.length, self.states)

    def copy_from(self, other: GrowingLayer, end: int) -> None:
        """Append what another layer has of the tokens from the own length up to `end`."""
        assert other.states is not None
        assert self.length <= end <= other.length
        if end > self.capacity:
            self._move(end, other.states)
        assert self.states is not None
        self.states[:, :, :, self.length : end] = other.states[:, :, :, self.length : end]
        self.dtype, self.device, self.is_initialized = other.dtype, other.device, True
        self.length = end

    def get_seq_length(self) -> int:
        """The number of tokens in the cache."""
        return self.length

    def reset(self) -> None:
        """Free the memory."""
        self.states, self.length, self.is_initialized = None, 0, False

    def _refuse(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("a GrowingCache holds one sequence; pass another cache, or none")

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


class GrowingCache(Cache):
    """The cache of one sequence: what `DynamicCache` or `Fp8Cache` holds, without a copy of it for each token."""

    layers: list[GrowingLayer]  # type: ignore[assignment]  # transformers knows its own layers only

    def __init__(self, config: PreTrainedConfig, *, fp8: bool = False) -> None:
        super().__init__(layers=[GrowingLayer(fp8=fp8) for _ in range(config.num_hidden_layers)])

    def reserve(self, tokens: int) -> None:
        """Make room for a number of tokens; a cache that is empty does so with its first ones."""
        for layer in self.layers:
            layer.reserve(tokens)

    def crop_to(self, tokens: int) -> None:
        """Keep the first tokens only, also where a forward that broke off left layers of different lengths."""
        for layer in self.layers:
            layer.crop(min(0, tokens - layer.length))

    def copy_from(self, other: GrowingCache, end: int) -> None:
        """Append what another cache has of the tokens from the own length up to `end`."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.copy_from(source, end)

    def bytes_by_device(self) -> Counter[torch.device]:
        """The memory of the cache."""
        memory: Counter[torch.device] = Counter()
        for layer in self.layers:
            if layer.states is not None:
                memory[layer.states.device] += layer.states.nbytes
        return memory


class RaggedLayer(DynamicLayer):
    """One layer of several caches, of which each takes one row of a batch."""

    def __init__(self, layers: Sequence[GrowingLayer]) -> None:
        super().__init__()
        self.layers = layers

    def update(  # type: ignore[override]  # the attention functions of this package take ragged states
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[RaggedStates, RaggedStates]:
        """Append a token [rows, kv_heads, 1, head_dim] to each cache and return those of all tokens, row by row."""
        rows = torch.stack((key_states, value_states)).chunk(len(self.layers), dim=1)
        seen = [layer.append(row) for layer, row in zip(self.layers, rows, strict=True)]
        return RaggedStates(keys for keys, _ in seen), RaggedStates(values for _, values in seen)

    def get_seq_length(self) -> int:
        """The number of tokens in the longest cache."""
        return max(layer.length for layer in self.layers)


class RaggedCache(Cache):
    """Several caches for one forward of a token each; their memory stays their own, and nothing is padded."""

    def __init__(self, caches: Sequence[GrowingCache]) -> None:
        super().__init__(
            layers=[RaggedLayer(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
        )
