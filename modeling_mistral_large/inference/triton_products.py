"""Triton kernels that read weights: products of few rows, and int4 dequantized for products of many."""

import os

import triton
import triton.language as tl

# Least size of a side of `tl.dot`.
LEAST_SIDE = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies no BF16 and runs no assembly.
DOT = tl.float32 if INTERPRETED else tl.bfloat16
ASSEMBLY = not INTERPRETED
TRUNCATES = tl.constexpr(INTERPRETED)


@triton.jit
def as_bf16(x):
    """FP32 rounded to the nearest BF16, which the interpreter does not do by itself."""
    if TRUNCATES:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def place_of(column, GROUP: tl.constexpr):
    """Where int4 products want an input: pairs of codes four apart become neighbours, see `int4_sums`.

    Column 8 * word + 4 * half + pair of a group goes to [pair, word, half]. A GROUP of 0 leaves the order alone.
    """
    if GROUP == 0:
        return column
    inside = column % GROUP
    return column - inside + (inside % 4) * (GROUP // 4) + (inside // 8) * 2 + (inside // 4) % 2


@triton.jit
def wide_fp8(codes, BITS: tl.constexpr):
    """FP32 values of FP8 (E4M3) codes; of their bits where the GPU has no such type."""
    if BITS:
        codes = codes.to(tl.uint16)
        # Moved to FP16 the exponent's offset is 15 instead of 7: the value comes out 2 ** -8 too small.
        return (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    # Through FP16 and FP32, because the GPU's instruction from FP16 to BF16 is a slow one.
    return codes.to(tl.float16).to(tl.float32)


@triton.jit
def two_codes(words, PAIR: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Codes PAIR and PAIR + 4 of words of eight, less 8, as BF16 values in the lower and the upper half of 32 bits."""
    moved = words >> (4 * PAIR)
    if ASSEMBLY:
        # A code in the lowest bits of the BF16 number 128 is 128 + code; 136 is taken off both halves at once.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 both, one, offset;
            mov.b32 one, 0x3F803F80;
            mov.b32 offset, 0xC308C308;
            lop3.b32 both, $1, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, both, one, offset;
            }""",
            "=r,r",
            [moved],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    low = ((moved & 15).to(tl.float32) - 8.0).to(tl.int32, bitcast=True)
    high = (((moved >> 16) & 15).to(tl.float32) - 8.0).to(tl.int32, bitcast=True)
    # Small whole numbers have no bits in the lower half of FP32: the upper one is BF16.
    return ((low >> 16) & 0xFFFF) | (high & -65536)


@triton.jit
def vector_sums(x_ptr, w, start, end, COLUMNS: tl.constexpr, FP8: tl.constexpr, BITS: tl.constexpr,
                BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """FP32 [BLOCK_ROWS] of rows of weights at `w` [BLOCK_ROWS, 1] times a single row of x, columns start to end."""
    column = tl.arange(0, BLOCK_COLUMNS)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in tl.range(start, end, BLOCK_COLUMNS, num_stages=STAGES):
        if COLUMNS % BLOCK_COLUMNS == 0:
            weights = tl.load(w + first + column[None, :])
            x = tl.load(x_ptr + first + column)
        else:
            inside = first + column < COLUMNS
            weights = tl.load(w + first + column[None, :], mask=inside[None, :], other=0.0)
            x = tl.load(x_ptr + first + column, mask=inside, other=0.0)
        weights = wide_fp8(weights, BITS) if FP8 else weights.to(tl.float32)
        sums += weights * x.to(tl.float32)[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def dot_sums(x_ptr, w, start, end, some, COLUMNS: tl.constexpr, FP8: tl.constexpr, BITS: tl.constexpr,
             BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
             DOT: tl.constexpr):  # fmt: skip
    """FP32 [BLOCK_ROWS, INPUTS] of rows of weights at `w` times the rows `some` of x, columns start to end."""
    column = tl.arange(0, BLOCK_COLUMNS)
    x_at = x_ptr + some[None, :] * COLUMNS + column[:, None]
    sums = tl.zeros([BLOCK_ROWS, INPUTS], tl.float32)
    for first in tl.range(start, end, BLOCK_COLUMNS, num_stages=STAGES):
        if COLUMNS % BLOCK_COLUMNS == 0:
            weights = tl.load(w + first + column[None, :])
            x = tl.load(x_at + first)
        else:
            inside = first + column < COLUMNS
            weights = tl.load(w + first + column[None, :], mask=inside[None, :], other=0.0)
            x = tl.load(x_at + first, mask=inside[:, None], other=0.0)
        weights = wide_fp8(weights, BITS) if FP8 else weights
        sums = tl.dot(weights.to(DOT), x.to(DOT), sums)
    return sums


@triton.jit
def int4_sums(x_ptr, w, s, start, end, some, COLUMNS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
              BLOCK_ROWS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
              ASSEMBLY: tl.constexpr):  # fmt: skip
    """As `dot_sums`, of int4 weights, GROUPS at a time from start to end; x lies in the order of `place_of`.

    `w` [BLOCK_ROWS, 1] points to words of eight codes, the first in the lowest bits, `s` [BLOCK_ROWS] to their scales.
    """
    word = tl.arange(0, GROUP // 8)
    x_at = x_ptr + some[None, :] * COLUMNS + tl.arange(0, GROUP // 4)[:, None]
    sums = tl.zeros([BLOCK_ROWS, INPUTS], tl.float32)
    for unit in tl.range(start, end, num_stages=STAGES):
        for inner in tl.static_range(GROUPS):
            group = unit * GROUPS + inner
            words = tl.load(w + group * (GROUP // 8) + word[None, :])
            part = tl.zeros([BLOCK_ROWS, INPUTS], tl.float32)
            for pair in tl.static_range(4):
                x = tl.load(x_at + group * GROUP + pair * (GROUP // 4))
                both = two_codes(words, pair, ASSEMBLY)
                low = both.to(tl.int16).to(tl.bfloat16, bitcast=True)
                high = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
                codes = tl.join(low, high).reshape(BLOCK_ROWS, GROUP // 4)
                part = tl.dot(codes.to(DOT), x.to(DOT), part)
            if GROUPS % 2 == 0:
                # Two scales by one load, which is wide enough to be asynchronous.
                if inner % 2 == 0:
                    both_scales = tl.load(s.to(tl.pointer_type(tl.int32), bitcast=True) + (unit * GROUPS + inner) // 2)
                    scales = (both_scales << 16).to(tl.float32, bitcast=True)
                else:
                    scales = (both_scales & -65536).to(tl.float32, bitcast=True)
            else:
                scales = tl.load(s + group).to(tl.float32)
            sums += part * scales[:, None]
    return sums


# Not compiled anew for other numbers of sequences.
@triton.jit(do_not_specialize=["m"])
def product(x_ptr, xs_ptr, part_ptr, w_0, s_0, w_1, s_1, w_2, s_2, m, rows_0, rows_1, rows_2,
            COLUMNS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
            BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
            DOT: tl.constexpr, ASSEMBLY: tl.constexpr):  # fmt: skip
    """part[split, m, rows_0 + rows_1 + rows_2] of x[m, COLUMNS] times up to three weights [rows, COLUMNS] at once.

    KIND is "bf16", "fp8", "fp8_bits" or "int4"; a VECTOR has m = 1. With FP8 weights, the inputs are values of FP8 with
    a scale for each row, xs[m]. A grid of [blocks of rows, splits].
    """
    block, split = tl.program_id(0), tl.program_id(1)
    blocks_0, blocks_1 = tl.cdiv(rows_0, BLOCK_ROWS), tl.cdiv(rows_1, BLOCK_ROWS)
    w, s, rows, before = w_0, s_0, rows_0, 0
    if block >= blocks_0 + blocks_1:
        block -= blocks_0 + blocks_1
        w, s, rows, before = w_2, s_2, rows_2, rows_0 + rows_1
    elif block >= blocks_0:
        block -= blocks_0
        w, s, rows, before = w_1, s_1, rows_1, rows_0
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Rows behind the last one are computed as the last one, and not stored.
    there = tl.minimum(row, rows - 1).to(tl.int64)
    some = tl.arange(0, INPUTS)
    sequence = tl.minimum(some, m - 1)
    units = tl.cdiv(COLUMNS, BLOCK_COLUMNS)
    per_split = tl.cdiv(units, tl.num_programs(1))
    start, end = split * per_split, tl.minimum(split * per_split + per_split, units)
    part_ptr += split * m * (rows_0 + rows_1 + rows_2) + before
    total = rows_0 + rows_1 + rows_2
    if KIND == "int4":
        w_at = w + there[:, None] * (COLUMNS // 8)
        s_at = s + there * (COLUMNS // GROUP)
        groups: tl.constexpr = BLOCK_COLUMNS // GROUP
        sums = int4_sums(
            x_ptr, w_at, s_at, start, end, sequence, COLUMNS, GROUP, groups, BLOCK_ROWS, INPUTS, STAGES, DOT, ASSEMBLY
        )
    else:
        w_at = w + there[:, None] * COLUMNS
        start *= BLOCK_COLUMNS
        end *= BLOCK_COLUMNS
        fp8: tl.constexpr = KIND != "bf16"
        bits: tl.constexpr = KIND == "fp8_bits"
        if VECTOR:
            sums = vector_sums(x_ptr, w_at, start, end, COLUMNS, fp8, bits, BLOCK_ROWS, BLOCK_COLUMNS, STAGES)
            if fp8:
                sums *= tl.load(s + there) * tl.load(xs_ptr)
        else:
            sums = dot_sums(
                x_ptr, w_at, start, end, sequence, COLUMNS, fp8, bits, BLOCK_ROWS, BLOCK_COLUMNS, INPUTS, STAGES, DOT
            )
            if fp8:
                sums *= tl.load(s + there)[:, None] * tl.load(xs_ptr + sequence)[None, :]
    if VECTOR:
        tl.store(part_ptr + row, sums, mask=row < rows)
    else:
        out = part_ptr + some[None, :] * total + row[:, None]
        tl.store(out, sums, mask=(some < m)[None, :] & (row < rows)[:, None])


@triton.jit
def dequantize(w_ptr, s_ptr, y_ptr, rows, COLUMNS: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
               BLOCK_WORDS: tl.constexpr):  # fmt: skip
    """BF16 y [rows, COLUMNS] of int4 weights, rounded once; a grid of blocks of rows and of words."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    word = tl.program_id(1) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    there = (row < rows)[:, None] & (word < COLUMNS // 8)[None, :]
    words = tl.load(w_ptr + row[:, None] * (COLUMNS // 8) + word[None, :], mask=there, other=0)
    scale_at = s_ptr + row[:, None] * (COLUMNS // GROUP) + (word // (GROUP // 8))[None, :]
    scales = tl.load(scale_at, mask=there, other=0.0).to(tl.float32)
    # The last join is the lowest bit of a code's place in its word.
    even = tl.join(
        tl.join(scaled_code(words, scales, 0), scaled_code(words, scales, 4)),
        tl.join(scaled_code(words, scales, 2), scaled_code(words, scales, 6)),
    )
    odd = tl.join(
        tl.join(scaled_code(words, scales, 1), scaled_code(words, scales, 5)),
        tl.join(scaled_code(words, scales, 3), scaled_code(words, scales, 7)),
    )
    y = tl.join(even, odd).reshape(BLOCK_ROWS, BLOCK_WORDS * 8)
    column = tl.program_id(1) * BLOCK_WORDS * 8 + tl.arange(0, BLOCK_WORDS * 8)
    inside = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    tl.store(y_ptr + row[:, None] * COLUMNS + column[None, :], y, mask=inside)


@triton.jit
def scaled_code(words, scales, PLACE: tl.constexpr):
    return as_bf16((((words >> (4 * PLACE)) & 15).to(tl.float32) - 8.0) * scales)
