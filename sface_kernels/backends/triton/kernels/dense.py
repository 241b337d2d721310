"""Whole calls by dense products: `filter_eps=0`, and steps in which many pairs are active.

Chunk by chunk of classes: unit rows, then coefficients (6) `[padded N, chunk]`, then their product with the other
operand. A chunk of coefficients is written and read while it is in the L2 cache; N×C is never in memory. The backward
computes the coefficients again. Four products of 2·N·C·D operations in all: two cosines, ∂x, ∂w.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    IGNORED,
    NO_COSINE,
    SPLIT_EXPONENT,
    SPLIT_SCALE,
    arccos,
    exponent_of,
    is_finite,
    load_operand,
    nearer_class,
    power_of_two,
    product,
    sigmoid_of_angle,
    store_class_gradient,
    store_operand,
)

FP16_PEAK: tl.constexpr = tl.constexpr(13)  # exponent of the largest coefficient in fp16, which ends at 15


@triton.jit
def shift_to_peak(g, AXIS: tl.constexpr):
    """Exponents of the powers of two that bring the largest along AXIS of the tile `g` to FP16_PEAK."""
    return tl.minimum(-exponent_of(tl.max(tl.abs(g), AXIS)) + FP16_PEAK, 126 - SPLIT_EXPONENT)


@triton.jit
def without_shift(shift, SPLIT: tl.constexpr):
    """What takes a shift off a sum of coefficients times unit rows."""
    return power_of_two(-shift - SPLIT_EXPONENT) if SPLIT else power_of_two(-shift)


@triton.jit
def cosine_tile(
    unit_x, unit_w, first_x, first_w, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PADDED_D: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """(1) `[BLOCK_N, BLOCK_C]` from padded unit rows, not clamped."""
    PARTS: tl.constexpr = 2 if SPLIT else 1
    if not TMA:
        k = tl.arange(0, BLOCK_K)
        x_row = (first_x + tl.arange(0, BLOCK_N)).to(tl.int64)
        w_row = (first_w + tl.arange(0, BLOCK_C)).to(tl.int64)
        x_tile = unit_x + x_row[:, None] * (PARTS * PADDED_D) + k[None, :]
        w_tile = unit_w + w_row[None, :] * (PARTS * PADDED_D) + k[:, None]
    cos = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for first in range(0, PADDED_D, BLOCK_K):
        if TMA:
            x = unit_x.load([first_x, first])
            w = unit_w.load([first_w, first]).T
            x_rest, w_rest = x, w
            if SPLIT:
                x_rest = unit_x.load([first_x, first + PADDED_D])
                w_rest = unit_w.load([first_w, first + PADDED_D]).T
        else:
            x, x_rest = load_operand(x_tile + first, PADDED_D, None, SPLIT)
            w, w_rest = load_operand(w_tile + first, PADDED_D, None, SPLIT)
        if PARTS == 2:
            # a sum of its own for each step: a tensor core cuts off what it adds to a long one
            cos += product(x, x_rest, w, w_rest, tl.zeros_like(cos), SPLIT, UPCAST)
        else:
            cos = product(x, x_rest, w, w_rest, cos, SPLIT, UPCAST)
    return cos * (1.0 / (SPLIT_SCALE * SPLIT_SCALE)) if PARTS == 2 else cos


@triton.jit(do_not_specialize=["n", "row_blocks", "tiles", "stripes", "begun"])
def coefficients(
    # pointers
    unit_x,  # [padded N, parts, PADDED_D]: two parts with SPLIT, else one
    unit_w,  # [padded chunk, parts, PADDED_D]
    target_ptr,  # [N]
    coefficient_ptr,  # [padded N, parts, padded chunk] out: (6) without s; forward: own classes left out; BACKWARD:
    # times u and 2^shift
    sums_ptr,  # forward, [4, stripes, padded N]: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine
    best_class_ptr,  # forward, [stripes, padded N] int32
    count_ptr,  # forward, [stripes, padded N] int32 active pairs
    grad_row_ptr,  # BACKWARD, [N], u
    largest_ptr,  # BACKWARD, [1], max |u|
    along_ptr,  # BACKWARD, [padded chunk] out: Σ_i u_i g_ij c_ij / s
    shift_ptr,  # int32 out: BACKWARD, of each block of samples and class, [row blocks, padded chunk];
    # forward and split, of each tile of classes and sample, [tiles, padded N]
    # sizes, floats
    n,
    c,
    padded_n,
    padded_chunk,
    row_blocks,
    first_class,
    tiles,
    stripes,
    begun,  # samples whose sums an earlier chunk began: 0, or padded N
    k_intra,
    k_inter,
    a,
    b,
    filter_eps,
    # compile time
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_D: tl.constexpr,
    BACKWARD: tl.constexpr,
    NEED_GRAD: tl.constexpr,  # False: only the sums
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,  # unit rows are given by descriptors, else by pointers
    UPCAST: tl.constexpr,
):
    """A program owns a block of samples, and takes every `stripes`-th tile of classes; BACKWARD the other way round.

    In the backward a power of two brings u to 1. As fp16 has little range, others bring the largest coefficient of each
    class in a tile to FP16_PEAK, in the forward that of each sample: the kernel that multiplies takes them off again.
    """
    PARTS: tl.constexpr = 2 if SPLIT else 1
    pid = tl.program_id(0)
    own_block = pid % row_blocks
    first = pid // row_blocks
    last = tiles
    if BACKWARD:
        first, last = pid * 0, row_blocks
        scale = power_of_two(-exponent_of(tl.load(largest_ptr)))
        along = tl.zeros([BLOCK_C], tl.float32)
        own_rows = pid.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    else:
        at = first.to(tl.int64) * padded_n + own_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        plane = padded_n.to(tl.int64) * stripes
        later = tl.arange(0, BLOCK_N) < begun
        inter = tl.load(sums_ptr + at, mask=later, other=0.0)
        dropped = tl.load(sums_ptr + plane + at, mask=later, other=0.0)
        cos_sum = tl.load(sums_ptr + 2 * plane + at, mask=later, other=0.0)
        best = tl.load(sums_ptr + 3 * plane + at, mask=later, other=NO_COSINE)
        best_class = tl.load(best_class_ptr + at, mask=later, other=-1)
        active = tl.load(count_ptr + at, mask=later, other=0)
    for turn in range(first, last, stripes):
        if BACKWARD:
            block, tile = turn, pid
        else:
            block, tile = own_block, turn
        i = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)  # [BLOCK_N]
        row = (tile * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)  # [BLOCK_C] of the chunk
        j = first_class + row
        target = tl.load(target_ptr + i, mask=i < n, other=IGNORED)
        cos = cosine_tile(
            unit_x, unit_w, block * BLOCK_N, tile * BLOCK_C, BLOCK_N, BLOCK_C, BLOCK_K, PADDED_D, SPLIT, TMA, UPCAST
        )
        if not BACKWARD:
            cos_sum += tl.sum(cos, 1)  # before NaN is dropped
        cos = tl.minimum(tl.maximum(cos, -1.0), 1.0)
        theta = arccos(cos)
        own = j[None, :] == target[:, None]
        if BACKWARD:
            u = tl.load(grad_row_ptr + i, mask=target != IGNORED, other=0.0) * scale
            u = tl.where(is_finite(u), u, float("nan"))  # for all classes, as 0·NaN is NaN
            weight = sigmoid_of_angle(theta, tl.where(own, -k_intra, k_inter), tl.where(own, a, b))
            g = tl.where((j < c)[None, :] & (weight >= filter_eps), weight, 0.0)
            g = tl.where(own, -weight, g) * u[:, None]
            along += tl.sum(g * cos, 0)
            shift = shift_to_peak(g, 0)  # [BLOCK_C]
            g *= power_of_two(shift)[None, :]
            tl.store(shift_ptr + own_rows + block * padded_chunk, shift)
        else:
            other = (j < c)[None, :] & ~own
            weight = tl.where(other, sigmoid_of_angle(theta, k_inter, b), 0.0)
            kept = other & (weight >= filter_eps)
            g = tl.where(kept, weight, 0.0)
            inter += tl.sum(weight * cos, 1)
            dropped += tl.sum(weight - g, 1)
            cos = tl.where(other, cos, NO_COSINE)
            column = tl.arange(0, BLOCK_C)
            best, best_class = nearer_class(best, best_class, cos, first_class + tile * BLOCK_C, column, BLOCK_C)
            active += tl.sum(kept.to(tl.int32), 1)
            if NEED_GRAD and SPLIT:
                shift = shift_to_peak(g, 1)  # [BLOCK_N]
                g *= power_of_two(shift)[:, None]
                tl.store(shift_ptr + tile * padded_n + i, shift)
        if NEED_GRAD:
            g_tile = coefficient_ptr + i[:, None] * (PARTS * padded_chunk) + row[None, :]
            store_operand(g_tile, padded_chunk, g, None, PARTS == 2)
    if BACKWARD:
        tl.store(along_ptr + own_rows, along)
    else:
        tl.store(sums_ptr + at, inter)
        tl.store(sums_ptr + plane + at, dropped)
        tl.store(sums_ptr + 2 * plane + at, cos_sum)
        tl.store(sums_ptr + 3 * plane + at, best)
        tl.store(best_class_ptr + at, best_class)
        tl.store(count_ptr + at, active)


@triton.jit(do_not_specialize=["row_blocks", "steps", "splits", "begun"])
def row_gradient(
    # pointers
    coefficient_ptr,  # [padded N, parts, padded chunk], of `coefficients`
    unit_w_ptr,  # [padded chunk, parts, PADDED_D]
    shift_ptr,  # split: of `coefficients`
    grad_ptr,  # [splits, padded N, D]: Σ weight·ŵ
    # sizes
    d,
    padded_n,
    padded_chunk,
    row_blocks,
    steps,  # of BLOCK_K classes
    splits,
    begun,
    # compile time
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,  # features of the output
    BLOCK_K: tl.constexpr,  # classes, all in the same tile of `coefficients`
    COLUMNS: tl.constexpr,  # classes of such a tile
    PADDED_D: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds the chunk's coefficients times its unit rows to the sum of (7); a split takes every `splits`-th step."""
    PARTS: tl.constexpr = 2 if SPLIT else 1
    pid = tl.program_id(0)
    split = (pid // row_blocks).to(tl.int64)
    i = (pid % row_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (out < d)[None, :]
    row = tl.arange(0, BLOCK_K)
    at = grad_ptr + (split * padded_n + i)[:, None] * d + out[None, :]
    grad = tl.load(at, mask=inside & (i < begun)[:, None], other=0.0)
    for step in range(split, steps, splits):
        j = step * BLOCK_K + row
        g_tile = coefficient_ptr + i[:, None] * (PARTS * padded_chunk) + j[None, :]
        w_tile = unit_w_ptr + j[:, None] * (PARTS * PADDED_D) + out[None, :]
        g, g_rest = load_operand(g_tile, padded_chunk, None, SPLIT)
        w, w_rest = load_operand(w_tile, PADDED_D, (out < PADDED_D)[None, :], SPLIT)
        if PARTS == 2:
            shift = tl.load(shift_ptr + step * BLOCK_K // COLUMNS * padded_n + i)
            added = product(g, g_rest, w, w_rest, tl.zeros_like(grad), SPLIT, UPCAST)
            grad += added * without_shift(shift, SPLIT)[:, None]
        else:
            grad = product(g, g_rest, w, w_rest, grad, SPLIT, UPCAST)
    tl.store(at, grad, mask=inside)


@triton.jit(do_not_specialize=["n"])
def class_gradient(
    # pointers
    coefficient_ptr,  # [padded N, parts, padded chunk], of `coefficients`
    unit_x_ptr,  # [padded N, parts, PADDED_D]
    along_ptr,  # [padded chunk]
    shift_ptr,  # of `coefficients`
    w_ptr,
    inv_norm_ptr,  # [C]
    largest_ptr,  # [1], max |u|
    grad_w_ptr,  # [C, D] out
    # sizes, strides, floats
    n,
    c,
    d,
    padded_chunk,
    first_class,
    w_stride_c,
    w_stride_d,
    s,
    # compile time
    BLOCK_N: tl.constexpr,  # features of the output
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,  # samples, all in the same of the row blocks
    ROWS: tl.constexpr,  # in a row block
    PADDED_D: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(8) for the chunk's classes."""
    PARTS: tl.constexpr = 2 if SPLIT else 1
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.arange(0, BLOCK_K).to(tl.int64)
    raw = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for first in range(0, n, BLOCK_K):
        i = first + sample
        # rows past the last sample were not written
        g_tile = coefficient_ptr + i[None, :] * (PARTS * padded_chunk) + row[:, None]
        x_tile = unit_x_ptr + i[:, None] * (PARTS * PADDED_D) + out[None, :]
        g, g_rest = load_operand(g_tile, padded_chunk, (i < n)[None, :], SPLIT)
        x, x_rest = load_operand(x_tile, PADDED_D, (out < PADDED_D)[None, :], SPLIT)
        shift = tl.load(shift_ptr + first // ROWS * padded_chunk + row)  # [BLOCK_C]
        added = product(g, g_rest, x, x_rest, tl.zeros_like(raw), SPLIT, UPCAST)
        raw += added * without_shift(shift, SPLIT)[:, None]
    j = first_class + row
    inv_w = tl.load(inv_norm_ptr + j, mask=j < c, other=0.0)
    along = tl.load(along_ptr + row)
    scale = s * power_of_two(exponent_of(tl.load(largest_ptr)))
    store_class_gradient(grad_w_ptr, raw, along, j, out, w_ptr, inv_w, scale, c, d, w_stride_c, w_stride_d)
