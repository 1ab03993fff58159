"""Triton kernels of a decoding step: products of 1 to 16 rows with BF16, FP8 or int4 weights, attention over a static
cache, and what lies between them.

Weights are read in the layout of the checkpoint (`quantized`), dequantized in registers; activations are BF16 and are
never rounded to FP8. A product leaves FP32 partial sums [splits, rows, outputs], and the kernel after it adds them up.

`m` is the number of rows, that is of sequences: 1 to 16. `columns` are the inputs of a weight [outputs, columns].

The Triton interpreter (`TRITON_INTERPRET=1`) runs all of it on CPU tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from modeling_mistral_large.inference.triton_kernels import (
    ASSEMBLY,
    DOT,
    LEAST_SIDE,
    add_and_norm,
    attention,
    join_attention,
    product,
    rotate_and_store,
    silu_and_multiply,
)


@dataclass(frozen=True)
class Tile:
    """What one program of `product` computes: rows, and columns at a time; int4 takes a group at a time.

    A vector's tile is for a single row of activations and not for int4; one for matrices has at least 16 rows.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1
    is_vector: bool = False


VECTOR_TILE = {
    "bf16": Tile(8, 512, is_vector=True),
    "fp8": Tile(8, 1024, is_vector=True),
    "fp8_bits": Tile(8, 1024, is_vector=True),
}
# The fastest on an H200, of those that benchmarks/gpu.py tries.
DOT_TILE = {
    "bf16": Tile(64, 128, stages=4),
    "fp8": Tile(128, 128, warps=8, stages=3),
    "fp8_bits": Tile(128, 128, warps=8, stages=3),
    "int4": Tile(128, 0, warps=8, stages=4),
}
# Fewer programs than this times the multiprocessors leave memory idle.
PROGRAMS_PER_MULTIPROCESSOR = 4
MOST_SPLITS = 4
ATTENTION_BLOCK = 64
# Elements of a row in one program of the kernels between products.
ELEMENTS = 1024


@dataclass(frozen=True)
class Weights:
    """Up to three weights [rows, columns] of one kind that are multiplied with the same input in one launch."""

    kind: str
    columns: int
    # Of int4; the order of the input depends on it, see `place_of`. 0 for others.
    group: int
    weights: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        return sum(weight.shape[0] for weight in self.weights)

    def tile(self, m: int) -> Tile:
        return VECTOR_TILE[self.kind] if m == 1 and self.kind in VECTOR_TILE else DOT_TILE[self.kind]

    def splits(self, m: int, tile: Tile | None = None) -> int:
        """Into how many programs the columns of a product are split: more where the rows give too few."""
        tile = tile or self.tile(m)
        device = self.weights[0].device
        wanted = PROGRAMS_PER_MULTIPROCESSOR * (multiprocessors(device) if device.type == "cuda" else 1)
        programs = sum(triton.cdiv(weight.shape[0], tile.rows) for weight in self.weights)
        most = min(MOST_SPLITS, triton.cdiv(self.columns, 1024))
        return int(max(1, min(most, triton.cdiv(wanted, programs))))


def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def multiply(x: Tensor, weights: Weights, part: Tensor, *, tile: Tile | None = None, splits: int | None = None) -> int:
    """Leave partial sums [splits, m, rows] of x [m, columns] @ weights.T at the start of `part`; returns the splits."""
    m = x.shape[0]
    tile = tile or weights.tile(m)
    splits = splits or weights.splits(m, tile)
    count = len(weights.weights)
    given = [tensor for pair in zip(weights.weights, weights.scales, strict=True) for tensor in pair]
    given += given[:2] * (3 - count)
    rows = [weight.shape[0] for weight in weights.weights] + [0] * (3 - count)
    block_columns = weights.group or min(tile.columns, triton.next_power_of_2(weights.columns))
    product[(sum(triton.cdiv(each, tile.rows) for each in rows), splits)](
        x,
        part,
        *given,
        m,
        *rows,
        COLUMNS=weights.columns,
        KIND=weights.kind,
        GROUP=weights.group,
        VECTOR=tile.is_vector,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=block_columns,
        STAGES=tile.stages,
        DOT=DOT,
        ASSEMBLY=ASSEMBLY,
        num_warps=tile.warps,
    )
    return splits


def norm(stream: Tensor, part: Tensor, splits: int, gain: Tensor, eps: float, y: Tensor, group: int) -> None:
    """Add partial sums to the stream [m, columns] in place, none of them if `splits` is 0, and norm it into y."""
    m, columns = stream.shape
    block = triton.next_power_of_2(columns)
    warps = max(1, min(16, block // ELEMENTS))
    add_and_norm[(m,)](
        stream, part, gain, y, m, eps, COLUMNS=columns, BLOCK=block, SPLITS=splits, GROUP=group, num_warps=warps
    )


def rotate(part: Tensor, splits: int, q: Tensor, keys: Tensor, values: Tensor, angles: Any, at: Any) -> None:
    """See `rotate_and_store`; `angles` are cosines and sines, `at` is the length [1] and each row's start [m]."""
    m, heads, head_dim = q.shape
    kv_heads, room = keys.shape[1:3]
    rotate_and_store[(heads + 2 * kv_heads, m)](
        part, q, keys, values, *angles, *at, m, room, HEADS=heads, KV_HEADS=kv_heads, D=head_dim, SPLITS=splits,
        num_warps=1,
    )  # fmt: skip


def attend(
    q: Tensor, keys: Tensor, values: Tensor, at: Any, scaling: float, parts: Tensor, stats: Tensor, y: Tensor,
    group: int, *, stages: int = 2,
) -> None:  # fmt: skip
    """y [m, heads * head_dim] of q [m, heads, head_dim] over the filled slots of the cache.

    `parts` [m, heads, splits, head_dim] and `stats` [m, heads, splits, 2] are FP32 room for what the splits leave.
    """
    m, heads, head_dim = q.shape
    kv_heads, room = keys.shape[1:3]
    splits = parts.shape[2]
    attention[(kv_heads, m, splits)](
        q, keys, values, parts, stats, *at, scaling * 1.4426950408889634, room,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim,
        GROUP_SIDE=max(LEAST_SIDE, triton.next_power_of_2(heads // kv_heads)),
        BLOCK=ATTENTION_BLOCK, SPLITS=splits, STAGES=stages, DOT=DOT,
    )  # fmt: skip
    join_attention[(heads, m)](parts, stats, y, HEADS=heads, D=head_dim, SPLITS=splits, GROUP=group)


def gate(part: Tensor, splits: int, y: Tensor, group: int) -> None:
    """y [m, columns] = silu(gate) * up, from the partial sums of their product."""
    m, columns = y.shape
    block = min(ELEMENTS, triton.next_power_of_2(columns))
    silu_and_multiply[(triton.cdiv(columns, block), m)](
        part, y, m, COLUMNS=columns, BLOCK=block, SPLITS=splits, GROUP=group
    )
