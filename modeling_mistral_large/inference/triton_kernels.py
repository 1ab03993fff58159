"""The Triton kernels that `gpu_kernels` launches; its docstring says what they read and leave."""

import os

import triton
import triton.language as tl

# Least size of a side of `tl.dot`.
LEAST_SIDE = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies no BF16 and runs no assembly.
DOT = tl.float32 if INTERPRETED else tl.bfloat16
ASSEMBLY = not INTERPRETED


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
def added_parts(part_ptr, at, stride, mask, SPLITS: tl.constexpr):
    """The sum over all splits of partial sums; `stride` is the distance from one split to the next."""
    total = tl.load(part_ptr + at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + split * stride + at, mask=mask, other=0.0)
    return total


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
             BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
             DOT: tl.constexpr):  # fmt: skip
    """FP32 [BLOCK_ROWS, 16] of rows of weights at `w` times the rows `some` of x, columns start to end."""
    column = tl.arange(0, BLOCK_COLUMNS)
    x_at = x_ptr + some[None, :] * COLUMNS + column[:, None]
    sums = tl.zeros([BLOCK_ROWS, 16], tl.float32)
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
def int4_sums(x_ptr, w, s, start, end, some, COLUMNS: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
              STAGES: tl.constexpr, DOT: tl.constexpr, ASSEMBLY: tl.constexpr):  # fmt: skip
    """As `dot_sums`, of groups start to end of int4 weights; x lies in the order of `place_of`.

    `w` [BLOCK_ROWS, 1] points to words of eight codes, the first in the lowest bits, `s` [BLOCK_ROWS] to their scales.
    """
    word = tl.arange(0, GROUP // 8)
    k = tl.arange(0, GROUP // 4)
    x_at = x_ptr + some[None, :] * COLUMNS + k[:, None]
    sums = tl.zeros([BLOCK_ROWS, 16], tl.float32)
    for group in tl.range(start, end, num_stages=STAGES):
        words = tl.load(w + group * (GROUP // 8) + word[None, :])
        scales = tl.load(s + group).to(tl.float32)
        part = tl.zeros([BLOCK_ROWS, 16], tl.float32)
        for pair in tl.static_range(4):
            x = tl.load(x_at + group * GROUP + pair * (GROUP // 4))
            both = two_codes(words, pair, ASSEMBLY)
            low = both.to(tl.int16).to(tl.bfloat16, bitcast=True)
            high = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            codes = tl.join(low, high).reshape(BLOCK_ROWS, GROUP // 4)
            part = tl.dot(codes.to(DOT), x.to(DOT), part)
        sums += part * scales[:, None]
    return sums


# Not compiled anew for other numbers of sequences.
@triton.jit(do_not_specialize=["m"])
def product(x_ptr, part_ptr, w_0, s_0, w_1, s_1, w_2, s_2, m, rows_0, rows_1, rows_2,
            COLUMNS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, VECTOR: tl.constexpr,
            BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr,
            DOT: tl.constexpr, ASSEMBLY: tl.constexpr):  # fmt: skip
    """part[split, m, rows_0 + rows_1 + rows_2] of x[m, COLUMNS] times up to three weights [rows, COLUMNS] at once.

    KIND is "bf16", "fp8", "fp8_bits" or "int4"; a VECTOR has m = 1. A grid of [blocks of rows, splits].
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
    some = tl.arange(0, 16)
    sequence = tl.minimum(some, m - 1)
    units = tl.cdiv(COLUMNS, BLOCK_COLUMNS)
    per_split = tl.cdiv(units, tl.num_programs(1))
    start, end = split * per_split, tl.minimum(split * per_split + per_split, units)
    part_ptr += split * m * (rows_0 + rows_1 + rows_2) + before
    total = rows_0 + rows_1 + rows_2
    if KIND == "int4":
        w_at = w + there[:, None] * (COLUMNS // 8)
        s_at = s + there * (COLUMNS // GROUP)
        sums = int4_sums(x_ptr, w_at, s_at, start, end, sequence, COLUMNS, GROUP, BLOCK_ROWS, STAGES, DOT, ASSEMBLY)
    else:
        w_at = w + there[:, None] * COLUMNS
        start *= BLOCK_COLUMNS
        end *= BLOCK_COLUMNS
        fp8: tl.constexpr = KIND != "bf16"
        bits: tl.constexpr = KIND == "fp8_bits"
        if VECTOR:
            sums = vector_sums(x_ptr, w_at, start, end, COLUMNS, fp8, bits, BLOCK_ROWS, BLOCK_COLUMNS, STAGES)
            if fp8:
                sums *= tl.load(s + there)
        else:
            sums = dot_sums(
                x_ptr, w_at, start, end, sequence, COLUMNS, fp8, bits, BLOCK_ROWS, BLOCK_COLUMNS, STAGES, DOT
            )
            if fp8:
                sums *= tl.load(s + there)[:, None]
    if VECTOR:
        tl.store(part_ptr + row, sums, mask=row < rows)
    else:
        out = part_ptr + some[None, :] * total + row[:, None]
        tl.store(out, sums, mask=(some < m)[None, :] & (row < rows)[:, None])


@triton.jit(do_not_specialize=["m"])
def add_and_norm(stream_ptr, part_ptr, gain_ptr, y_ptr, m, eps,
                 COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Add a product, if SPLITS > 0, to the stream [m, COLUMNS]; y is its RMSNorm. A program for each row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    stream = tl.load(stream_ptr + row * COLUMNS + column, mask=inside, other=0.0)
    if SPLITS > 0:
        # Rounded in between, as layers hand on BF16.
        product = added_parts(part_ptr, row * COLUMNS + column, m * COLUMNS, inside, SPLITS).to(tl.bfloat16)
        stream = (stream.to(tl.float32) + product.to(tl.float32)).to(tl.bfloat16)
        tl.store(stream_ptr + row * COLUMNS + column, stream, mask=inside)
    wide = stream.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / COLUMNS + eps)
    wide *= tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * COLUMNS + place_of(column, GROUP), wide.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["m"])
def rotate_and_store(part_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, length_ptr, start_ptr, m, room,
                     HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Take query, key and value from their product [m, (HEADS + 2 * KV_HEADS) * D]; a program for each head and row.

    Queries are rotated into q [m, HEADS, D], keys rotated into the cache [m, KV_HEADS, room, D] at `length`, values
    stored next to them. A row's position is length - start. The angles' table is [room, D], both halves alike.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_ptr)
    position = length - tl.load(start_ptr + row)
    i = tl.arange(0, D // 2)
    all_heads: tl.constexpr = HEADS + 2 * KV_HEADS
    at = (row * all_heads + head) * D + i
    first = added_parts(part_ptr, at, m * all_heads * D, i >= 0, SPLITS)
    second = added_parts(part_ptr, at + D // 2, m * all_heads * D, i >= 0, SPLITS)
    cos = tl.load(cos_ptr + position * D + i).to(tl.float32)
    sin = tl.load(sin_ptr + position * D + i).to(tl.float32)
    if head < HEADS + KV_HEADS:
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    if head < HEADS:
        query = q_ptr + (row * HEADS + head) * D
        tl.store(query + i, first.to(tl.bfloat16))
        tl.store(query + i + D // 2, second.to(tl.bfloat16))
    else:
        kv_head = (head - HEADS) % KV_HEADS
        slot = ((row * KV_HEADS + kv_head).to(tl.int64) * room + length) * D
        out = (k_ptr if head < HEADS + KV_HEADS else v_ptr) + slot
        tl.store(out + i, first.to(tl.bfloat16))
        tl.store(out + i + D // 2, second.to(tl.bfloat16))


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, part_ptr, stat_ptr, length_ptr, start_ptr, scale, room,
              HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, GROUP_SIDE: tl.constexpr,
              BLOCK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Attention of one token over slots start to length of the cache, both included; a grid [KV_HEADS, m, SPLITS].

    Leaves part [m, HEADS, SPLITS, D], and for each of them the greatest score and the sum of exponentials of base 2.
    `scale` holds log2(e).
    """
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    start, end = tl.load(start_ptr + row), tl.load(length_ptr) + 1
    per_split = tl.cdiv(tl.cdiv(end - start, SPLITS), BLOCK) * BLOCK
    first = start + split * per_split
    last = tl.minimum(first + per_split, end)
    member = tl.arange(0, GROUP_SIDE)
    d = tl.arange(0, D)
    head = row * HEADS + kv_head * group + member
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=(member < group)[:, None], other=0.0)
    base = (row * KV_HEADS + kv_head).to(tl.int64) * room * D
    top = tl.full([GROUP_SIDE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_SIDE], tl.float32)
    sums = tl.zeros([GROUP_SIDE, D], tl.float32)
    for slot in tl.range(first, last, BLOCK, num_stages=STAGES):
        at = slot + tl.arange(0, BLOCK)
        k = tl.load(k_ptr + base + at[None, :] * D + d[:, None], mask=(at < last)[None, :], other=0.0)
        scores = tl.dot(q.to(DOT), k.to(DOT)) * scale
        scores = tl.where((at < last)[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + base + at[:, None] * D + d[None, :], mask=(at < last)[:, None], other=0.0)
        sums = tl.dot(weights.to(DOT), v.to(DOT), sums * shrink[:, None])
        top = new
    place = head * SPLITS + split
    tl.store(part_ptr + place[:, None] * D + d[None, :], sums, mask=(member < group)[:, None])
    tl.store(stat_ptr + place * 2, top, mask=member < group)
    tl.store(stat_ptr + place * 2 + 1, total, mask=member < group)


@triton.jit
def join_attention(part_ptr, stat_ptr, y_ptr, HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
                   GROUP: tl.constexpr):  # fmt: skip
    """y [m, HEADS * D] of what the splits of `attention` left; a program for each head and row."""
    head, row = tl.program_id(0), tl.program_id(1)
    split = (row * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    top = tl.load(stat_ptr + split * 2)
    total = tl.load(stat_ptr + split * 2 + 1)
    # Splits with no slots have a greatest score of -inf and so the weight 0, and sums of 0.
    weights = tl.exp2(top - tl.max(top, axis=0))
    parts = tl.load(part_ptr + split[:, None] * D + d[None, :])
    y = tl.sum(parts * weights[:, None], axis=0) / tl.sum(total * weights, axis=0)
    tl.store(y_ptr + row * HEADS * D + place_of(head * D + d, GROUP), y.to(tl.bfloat16))


@triton.jit(do_not_specialize=["m"])
def silu_and_multiply(part_ptr, y_ptr, m, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
                      GROUP: tl.constexpr):  # fmt: skip
    """y [m, COLUMNS] = silu(gate) * up of their product [m, 2 * COLUMNS]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    inside = column < COLUMNS
    at = row * 2 * COLUMNS + column
    gate = added_parts(part_ptr, at, m * 2 * COLUMNS, inside, SPLITS)
    up = added_parts(part_ptr, at + COLUMNS, m * 2 * COLUMNS, inside, SPLITS)
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * COLUMNS + place_of(column, GROUP), y.to(tl.bfloat16), mask=inside)
