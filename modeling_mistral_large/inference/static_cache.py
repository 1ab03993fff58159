"""Keys and values of a cache whose memory is allocated once, in BF16 or FP8."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from modeling_mistral_large.inference.kv_cache import SCALE, pack


class Fp8States(NamedTuple):
    """Keys or values in FP8: E4M3 codes [batch, kv_heads, slots, head_dim] and a BF16 scale for each vector of them."""

    codes: Tensor
    scales: Tensor


# Keys or values of a layer; in BF16 a tensor [batch, kv_heads, slots, head_dim].
States: TypeAlias = Tensor | Fp8States


def of_each(function: Callable[[Tensor], Tensor], states: States) -> States:
    """Apply a function to what the states consist of."""
    return Fp8States(*map(function, states)) if isinstance(states, Fp8States) else function(states)


def write(states: States, start: int, new: Tensor) -> Tensor:
    """Put states [batch, kv_heads, tokens, head_dim] into the slots from `start` on; return those of all slots so far.

    FP8 rounds as `Fp8Cache` does, and what is returned is dequantized.
    """
    end = start + new.shape[2]
    if isinstance(states, Tensor):
        states[:, :, start:end] = new
        return states[:, :, :end]
    codes, scales = (tensor[:, :, :end] for tensor in states)
    packed = pack(new)
    codes[:, :, start:].view(torch.uint8).copy_(packed[..., : -SCALE.itemsize])
    scales[:, :, start:] = packed[..., -SCALE.itemsize :].contiguous().view(SCALE)[..., 0]
    return codes.to(new.dtype) * scales[..., None].to(new.dtype)
