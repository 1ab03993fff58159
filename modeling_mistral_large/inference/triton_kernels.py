"""Triton kernels between products: norm, rotation, cache, attention, activation; `gpu_kernels` launches them."""

import triton
import triton.language as tl

from modeling_mistral_large.inference.triton_products import as_bf16, place_of, wide_fp8


@triton.jit
def fp8_codes(x):
    """E4M3 codes of FP32 within the type's range, to nearest even, on GPUs without the type too."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # From 2 ** -6 on a code is exponent and mantissa, with an exponent offset of 7 instead of 127.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below it is a multiple of 2 ** -9, as are the last bits of a sum with 2 ** 14.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 15
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def divided(x, scale):
    """x / scale within the range of FP8."""
    return tl.minimum(tl.maximum(tl.div_rn(x, scale), -448.0), 448.0)


@triton.jit
def rounded_row(x, scale_ptr):
    """Values of FP8 codes, as BF16, of a row of BF16 values in FP32; stores the scale, 1 for nothing but zeros."""
    scale = tl.div_rn(tl.max(tl.abs(x), axis=0), 448.0)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scale_ptr, scale)
    return wide_fp8(fp8_codes(divided(x, scale)), True).to(tl.bfloat16)


@triton.jit
def round_rows(x_ptr, y_ptr, scale_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """y [m, COLUMNS], values of FP8, and scales [m] of x [m, COLUMNS]; a program for each row."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    x = tl.load(x_ptr + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * COLUMNS + column, rounded_row(x, scale_ptr + row), mask=inside)


@triton.jit
def added_parts(part_ptr, at, stride, mask, SPLITS: tl.constexpr):
    """The sum over all splits of partial sums; `stride` is the distance from one split to the next."""
    total = tl.load(part_ptr + at, mask=mask, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + split * stride + at, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["m"])
def add_and_norm(stream_ptr, part_ptr, gain_ptr, y_ptr, scale_ptr, m, eps,
                 COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
                 FP8: tl.constexpr):  # fmt: skip
    """Add a product, if SPLITS > 0, to the stream [m, COLUMNS]; y is its RMSNorm. A program for each row.

    FP8 rounds y to values of FP8, with scales [m].
    """
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < COLUMNS
    stream = tl.load(stream_ptr + row * COLUMNS + column, mask=inside, other=0.0)
    if SPLITS > 0:
        # Rounded in between, as layers hand on BF16.
        product = as_bf16(added_parts(part_ptr, row * COLUMNS + column, m * COLUMNS, inside, SPLITS))
        stream = as_bf16(stream.to(tl.float32) + product.to(tl.float32))
        tl.store(stream_ptr + row * COLUMNS + column, stream, mask=inside)
    wide = stream.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / COLUMNS + eps)
    wide *= tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = as_bf16(wide)
    if FP8:
        normed = rounded_row(normed.to(tl.float32), scale_ptr + row)
    tl.store(y_ptr + row * COLUMNS + place_of(column, GROUP), normed, mask=inside)


@triton.jit(do_not_specialize=["m"])
def rotate_and_store(part_ptr, q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, cos_ptr, sin_ptr, length_ptr, start_ptr, m, room,
                     HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
                     QUERIES: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """Take query, key and value from their product [m, (HEADS + 2 * KV_HEADS) * D]; a program for each head and row.

    Queries are rotated into q [m, HEADS, D], keys rotated into the cache [m / QUERIES, KV_HEADS, room, D] at the row's
    length, values stored next to them. QUERIES rows in turn are tokens of one sequence. A row's position is
    length - start. The angles' table is [room, D], both halves alike. An FP8 cache keeps codes, as bytes, with a BF16
    scale for each slot of a head in ks and vs [m / QUERIES, KV_HEADS, room], as `kv_cache.pack` makes them.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_ptr + row)
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
    first, second = as_bf16(first), as_bf16(second)
    if head < HEADS:
        query = q_ptr + (row * HEADS + head) * D
        tl.store(query + i, first)
        tl.store(query + i + D // 2, second)
    else:
        kv_head = (head - HEADS) % KV_HEADS
        slot = (row // QUERIES * KV_HEADS + kv_head).to(tl.int64) * room + length
        out = (k_ptr if head < HEADS + KV_HEADS else v_ptr) + slot * D
        if FP8:
            wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(wide_first), axis=0), tl.max(tl.abs(wide_second), axis=0))
            # At least the smallest normal number, so that zeros have a scale too.
            scale = as_bf16(tl.maximum(tl.div_rn(largest, 448.0), 1.1754943508222875e-38))
            tl.store((ks_ptr if head < HEADS + KV_HEADS else vs_ptr) + slot, scale)
            tl.store(out + i, fp8_codes(divided(wide_first, scale.to(tl.float32))))
            tl.store(out + i + D // 2, fp8_codes(divided(wide_second, scale.to(tl.float32))))
        else:
            tl.store(out + i, first)
            tl.store(out + i + D // 2, second)


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, part_ptr, stat_ptr, length_ptr, start_ptr, scale, room,
              HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, GROUP_SIDE: tl.constexpr,
              BLOCK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr,
              FP8: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Attention of each row over slots start to length of its sequence, both included; a grid [KV_HEADS, m, SPLITS].

    Leaves part [m, HEADS, SPLITS, D], and for each of them the greatest score and the sum of exponentials of base 2.
    `scale` holds log2(e). An FP8 cache is that of `rotate_and_store`, read as bytes with BITS.
    """
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    start, end = tl.load(start_ptr + row), tl.load(length_ptr + row) + 1
    per_split = tl.cdiv(tl.cdiv(end - start, SPLITS), BLOCK) * BLOCK
    first = start + split * per_split
    last = tl.minimum(first + per_split, end)
    member = tl.arange(0, GROUP_SIDE)
    d = tl.arange(0, D)
    head = row * HEADS + kv_head * group + member
    q = tl.load(q_ptr + head[:, None] * D + d[None, :], mask=(member < group)[:, None], other=0.0)
    slots = (row // QUERIES * KV_HEADS + kv_head).to(tl.int64) * room
    base = slots * D
    top = tl.full([GROUP_SIDE], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_SIDE], tl.float32)
    sums = tl.zeros([GROUP_SIDE, D], tl.float32)
    for slot in tl.range(first, last, BLOCK, num_stages=STAGES):
        at = slot + tl.arange(0, BLOCK)
        k = tl.load(k_ptr + base + at[None, :] * D + d[:, None], mask=(at < last)[None, :], other=0.0)
        if FP8:
            key_scales = tl.load(ks_ptr + slots + at, mask=at < last, other=0.0).to(tl.float32)
            scores = tl.dot(q.to(DOT), wide_fp8(k, BITS).to(DOT)) * (key_scales * scale)[None, :]
        else:
            scores = tl.dot(q.to(DOT), k.to(DOT)) * scale
        scores = tl.where((at < last)[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + base + at[:, None] * D + d[None, :], mask=(at < last)[:, None], other=0.0)
        if FP8:
            weights *= tl.load(vs_ptr + slots + at, mask=at < last, other=0.0).to(tl.float32)[None, :]
            v = wide_fp8(v, BITS)
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
    tl.store(y_ptr + row * HEADS * D + place_of(head * D + d, GROUP), as_bf16(y))


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
    tl.store(y_ptr + row * COLUMNS + place_of(column, GROUP), as_bf16(y), mask=inside)
