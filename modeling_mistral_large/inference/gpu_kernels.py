"""Triton kernels of a decoding step: products of 1 to 16 rows with BF16, FP8 or int4 weights, attention over a static
cache, and what lies between them.

Weights are read in the layout of the checkpoint (`quantized`), dequantized in registers. Activations are BF16, and for
FP8 weights they are rounded to FP8 row by row, by the rule of `quantization.linear.round_to_fp8`. A product leaves FP32
partial sums [splits, rows, outputs], and the kernel after it adds them up.

`m` is the number of rows, that is of sequences: 1 to 16. `columns` are the inputs of a weight [outputs, columns].

The Triton interpreter (`TRITON_INTERPRET=1`) runs all of it on CPU tensors.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from modeling_mistral_large.inference.static_cache import Fp8States
from modeling_mistral_large.inference.triton_kernels import (
    add_and_norm,
    attention,
    join_attention,
    rotate_and_store,
    round_rows,
    silu_and_multiply,
)
from modeling_mistral_large.inference.triton_products import ASSEMBLY, DOT, LEAST_SIDE, dequantize, product


@dataclass(frozen=True)
class Tile:
    """What one program of `product` computes: rows, and columns at a time, which are whole groups of int4.

    A vector's tile is for a single row of activations and not for int4; one for matrices has at least 16 rows, and
    takes up to `inputs` rows of activations.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1
    is_vector: bool = False
    inputs: int = 16
    # Fewer programs than this times the multiprocessors leave memory idle.
    programs: int = 4


VECTOR_TILE = {
    "bf16": Tile(8, 512, is_vector=True),
    "fp8": Tile(8, 1024, is_vector=True),
    "fp8_bits": Tile(8, 1024, is_vector=True),
}
# FP8 and BF16: the fastest on an H200, of those that benchmarks/gpu.py tries. int4: not measured yet; the one that
# reads whole lines of memory and has the fewest instructions for a weight.
DOT_TILE = {
    "bf16": Tile(64, 128, stages=4),
    "fp8": Tile(128, 128, warps=8, stages=3),
    "fp8_bits": Tile(128, 128, warps=8, stages=3),
    "int4": Tile(128, 256, stages=3, inputs=8, programs=16),
}
MOST_SPLITS = 4
# Of compute capability 8.x, whose multiprocessors have less room for what is loaded ahead.
SMALL_INT4_TILE = Tile(64, 256, stages=3, inputs=8, programs=16)
ATTENTION_BLOCK = 64
# Elements of a row in one program of the kernels between products.
ELEMENTS = 1024
# Words of int4 codes, of one row, in a program that dequantizes.
WORDS = 128


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

    @property
    def takes_fp8(self) -> bool:
        """Whether activations are rounded to FP8: W8A8 for FP8 weights, W4A16 for int4."""
        return self.kind in ("fp8", "fp8_bits")

    def tile(self, m: int) -> Tile:
        if self.kind == "int4":
            return int4_tile(self.weights[0].device)
        return VECTOR_TILE[self.kind] if m == 1 and self.kind in VECTOR_TILE else DOT_TILE[self.kind]

    def splits(self, m: int, tile: Tile | None = None) -> int:
        """Into how many programs the columns of a product are split: more where the rows give too few."""
        tile = tile or self.tile(m)
        device = self.weights[0].device
        wanted = tile.programs * (multiprocessors(device) if device.type == "cuda" else 1)
        programs = sum(triton.cdiv(weight.shape[0], tile.rows) for weight in self.weights)
        most = min(MOST_SPLITS, triton.cdiv(self.columns, 1024))
        return int(max(1, min(most, triton.cdiv(wanted, programs))))


def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def int4_tile(device: torch.device) -> Tile:
    is_small = device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)
    return SMALL_INT4_TILE if is_small else DOT_TILE["int4"]


def has_fp8_type(device: torch.device) -> bool:
    """Whether kernels can read E4M3; else they read its bits."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Values of FP8 codes, as BF16, and FP32 scales [m] of x [m, columns]."""
    m, columns = x.shape
    values, scales = torch.empty_like(x), torch.empty(m, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    round_rows[(m,)](x, values, scales, COLUMNS=columns, BLOCK=block, num_warps=warps_for(block))
    return values, scales


def multiply(
    x: Tensor,
    weights: Weights,
    part: Tensor,
    scales: Tensor | None = None,
    *,
    tile: Tile | None = None,
    splits: int | None = None,
) -> int:
    """Leave partial sums [splits, m, rows] of x [m, columns] @ weights.T at the start of `part`; returns the splits.

    For weights that take FP8, `scales` [m] say that x is rounded; without them it is done here.
    """
    m = x.shape[0]
    if not weights.takes_fp8:
        scales = x
    elif scales is None:
        x, scales = rounded(x)
    tile = tile or weights.tile(m)
    splits = splits or weights.splits(m, tile)
    count = len(weights.weights)
    given = [tensor for pair in zip(weights.weights, weights.scales, strict=True) for tensor in pair]
    given += given[:2] * (3 - count)
    rows = [weight.shape[0] for weight in weights.weights] + [0] * (3 - count)
    block_columns = min(tile.columns, triton.next_power_of_2(weights.columns))
    if weights.group:
        # As many groups as divide a row.
        groups = max(1, tile.columns // weights.group)
        block_columns = math.gcd(groups, weights.columns // weights.group) * weights.group
    product[(sum(triton.cdiv(each, tile.rows) for each in rows), splits)](
        x,
        scales,
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
        INPUTS=tile.inputs if m <= tile.inputs else 16,
        STAGES=tile.stages,
        DOT=DOT,
        ASSEMBLY=ASSEMBLY,
        num_warps=tile.warps,
    )
    return splits


def warps_for(elements: int) -> int:
    return max(1, min(16, elements // ELEMENTS))


def norm(
    stream: Tensor, part: Tensor, splits: int, gain: Tensor, eps: float, y: Tensor, group: int,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Add partial sums to the stream [m, columns] in place, none of them if `splits` is 0, and norm it into y.

    With room for FP32 `scales` [m], y is rounded to FP8 for `multiply`.
    """
    m, columns = stream.shape
    block = triton.next_power_of_2(columns)
    add_and_norm[(m,)](
        stream, part, gain, y, y if scales is None else scales, m, eps,
        COLUMNS=columns, BLOCK=block, SPLITS=splits, GROUP=group, FP8=scales is not None, num_warps=warps_for(block),
    )  # fmt: skip


def rotate(
    part: Tensor, splits: int, q: Tensor, keys: Tensor | Fp8States, values: Tensor | Fp8States, angles: Any, at: Any
) -> None:
    """See `rotate_and_store`; `angles` are cosines and sines, `at` is each row's length [m] and start [m], as int32.

    A row's length is the slot of its own key. Where the cache has fewer sequences than there are rows, as many rows in
    turn belong to each of them: tokens of a draft, whose lengths go up by one.
    """
    m, heads, head_dim = q.shape
    is_fp8 = isinstance(keys, Fp8States)
    (keys, key_scales), (values, value_scales) = codes_and_scales(keys), codes_and_scales(values)
    sequences, kv_heads, room = keys.shape[:3]
    if is_fp8:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    rotate_and_store[(heads + 2 * kv_heads, m)](
        part, q, keys, values, key_scales, value_scales, *angles, *at, m, room,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, SPLITS=splits, QUERIES=m // sequences, FP8=is_fp8, num_warps=1,
    )  # fmt: skip


def codes_and_scales(states: Tensor | Fp8States) -> tuple[Tensor, Tensor]:
    """Both of an FP8 cache; a cache in BF16 twice, as it has no scales."""
    return states if isinstance(states, Fp8States) else (states, states)


def attend(
    q: Tensor, keys: Tensor | Fp8States, values: Tensor | Fp8States, at: Any, scaling: float, parts: Tensor,
    stats: Tensor, y: Tensor, group: int, *, stages: int = 2,
) -> None:  # fmt: skip
    """y [m, heads * head_dim] of q [m, heads, head_dim] over the filled slots of the cache; see `rotate` for `at`.

    `parts` [m, heads, splits, head_dim] and `stats` [m, heads, splits, 2] are FP32 room for what the splits leave.
    """
    m, heads, head_dim = q.shape
    is_fp8 = isinstance(keys, Fp8States)
    (keys, key_scales), (values, value_scales) = codes_and_scales(keys), codes_and_scales(values)
    sequences, kv_heads, room = keys.shape[:3]
    by_bits = is_fp8 and not has_fp8_type(keys.device)
    if by_bits:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    splits = parts.shape[2]
    attention[(kv_heads, m, splits)](
        q, keys, values, key_scales, value_scales, parts, stats, *at, scaling * 1.4426950408889634, room,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim,
        GROUP_SIDE=max(LEAST_SIDE, triton.next_power_of_2(heads // kv_heads)),
        BLOCK=ATTENTION_BLOCK, SPLITS=splits, STAGES=stages, QUERIES=m // sequences,
        FP8=is_fp8, BITS=by_bits, DOT=DOT,
    )  # fmt: skip
    join_attention[(heads, m)](parts, stats, y, HEADS=heads, D=head_dim, SPLITS=splits, GROUP=group)


def gate(part: Tensor, splits: int, y: Tensor, group: int) -> None:
    """y [m, columns] = silu(gate) * up, from the partial sums of their product."""
    m, columns = y.shape
    block = min(ELEMENTS, triton.next_power_of_2(columns))
    silu_and_multiply[(triton.cdiv(columns, block), m)](
        part, y, m, COLUMNS=columns, BLOCK=block, SPLITS=splits, GROUP=group
    )


def dequantized_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """BF16 [rows, columns] of words [rows, columns / 8] of eight codes and BF16 scales [rows, groups], in one pass."""
    rows, words = packed.shape
    y = torch.empty(rows, words * 8, dtype=torch.bfloat16, device=packed.device)
    block_words = min(WORDS, triton.next_power_of_2(words))
    block_rows = max(1, WORDS * 4 // block_words)
    dequantize[(triton.cdiv(rows, block_rows), triton.cdiv(words, block_words))](
        packed, scales, y, rows, COLUMNS=words * 8, GROUP=words * 8 // scales.shape[1], BLOCK_ROWS=block_rows,
        BLOCK_WORDS=block_words,
    )  # fmt: skip
    return y


def placed(x: Tensor, group: int) -> Tensor:
    """Inputs [m, columns] in the order that int4 products want, as `place_of` has it."""
    m, columns = x.shape
    return x.view(m, columns // group, group // 8, 2, 4).permute(0, 1, 4, 2, 3).reshape(m, columns)


def int4_product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """BF16 [m, rows] of x [m, columns] and one int4 weight; see `dequantized_int4`."""
    m, columns = x.shape
    group = columns // scales.shape[1]
    weights = Weights("int4", columns, group, (packed,), (scales,))
    part = torch.empty(weights.splits(m), m, weights.rows, dtype=torch.float32, device=x.device)
    multiply(placed(x, group), weights, part)
    return part.sum(0).bfloat16()
