"""The coefficients (6) of dense calls from a chunk's unit rows, stored as operands of the products that follow.

Reads the unit rows from the L2 cache. Of a tile of cosines nothing leaves the registers but what every sample sums over
all classes, and the coefficients `[padded N, chunk]`: once for ∂x and once for ∂w, each with powers of two of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    IGNORED,
    NO_COSINE,
    SPLIT_EXPONENT,
    arccos,
    cosine_tile,
    exponent_of,
    finite_or_nan,
    load_sums,
    nearer_class,
    power_of_two,
    sigmoid_of_angle,
    store_operand,
)

FP16_PEAK: tl.constexpr = tl.constexpr(13)  # exponent of the largest coefficient in fp16, which ends at 15


@triton.jit
def shift_to_peak(g, AXIS: tl.constexpr):
    """Exponents of the powers of two that bring the largest along AXIS of the tile `g` to FP16_PEAK."""
    return tl.minimum(-exponent_of(tl.max(tl.abs(g), AXIS)) + FP16_PEAK, 126 - SPLIT_EXPONENT)


@triton.jit
def weigh(
    cos, weight, own, past, u, corner, in_rows, in_classes, first, inter, dropped, best, best_class, active,
    row_coefficient_ptr, row_shift_ptr, class_coefficient_ptr, class_shift_ptr, along_ptr, padded_chunk,
    k_intra, a, filter_eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr, FILTERED: tl.constexpr, BACKWARD: tl.constexpr,
    OWN_U: tl.constexpr, NEED_GRAD: tl.constexpr, NEED_GRAD_W: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores the coefficients of a tile of cosines, and adds what it has to a sample's sums, which it returns.

    MASKED: it has own classes, in the columns `own` `[BLOCK_N]`, or columns from `past` on, which are no classes, or
    samples that do not count. Most tiles have none of these.
    """
    PARTS: tl.constexpr = 2 if SPLIT else 1
    column = tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_N)
    at = corner + row[:, None] * (PARTS * padded_chunk) + column[None, :]
    if MASKED:
        marked = tl.where(column[None, :] == own[:, None], -1.0, weight)
        marked = tl.where((column < past)[None, :], marked, -2.0)
        weight = tl.maximum(marked, 0.0)
    if not BACKWARD:
        other_cos = tl.where(marked < 0, NO_COSINE, cos) if MASKED else cos
        best, best_class = nearer_class(best, best_class, other_cos, first, column, BLOCK_C)
    g = weight  # for ∂x
    if FILTERED:
        kept = weight >= filter_eps
        g = tl.where(kept, weight, 0.0)
    if not BACKWARD:
        inter += tl.sum(weight * cos, 1)
        if FILTERED:
            dropped += tl.sum(weight - g, 1)
            active += tl.sum(kept.to(tl.int32), 1)
        elif MASKED:
            active += tl.sum((marked >= 0).to(tl.int32), 1)
        else:
            active += BLOCK_C
    if NEED_GRAD_W:
        h = g  # for ∂w
        if MASKED:
            own_cos = tl.sum(tl.where(marked == -1, cos, 0.0), 1)  # [BLOCK_N]
            h = tl.where(marked == -1, -sigmoid_of_angle(arccos(own_cos), -k_intra, a)[:, None], h)
        if MASKED or OWN_U:
            h *= u[:, None]
        shift = shift_to_peak(h, 0)  # [BLOCK_C]
        tl.store(along_ptr + in_classes, tl.sum(h * cos, 0))
        tl.store(class_shift_ptr + in_classes, shift)
        store_operand(class_coefficient_ptr + at, padded_chunk, h * power_of_two(shift)[None, :], None, PARTS == 2)
    if NEED_GRAD:
        if SPLIT:
            shift = shift_to_peak(g, 1)  # [BLOCK_N]
            g *= power_of_two(shift)[:, None]
            tl.store(row_shift_ptr + in_rows, shift)
        store_operand(row_coefficient_ptr + at, padded_chunk, g, None, PARTS == 2)
    return inter, dropped, best, best_class, active


@triton.jit(do_not_specialize=["n", "row_blocks", "tiles", "stripes", "begun"])
def coefficients(
    # pointers
    unit_x,  # [padded N, parts, PADDED_D]: two parts with SPLIT, else one
    unit_w,  # [padded chunk, parts, PADDED_D]
    target_ptr,  # [N]
    row_coefficient_ptr,  # [padded N, parts, padded chunk] out: (6) without s, own classes left out
    class_coefficient_ptr,  # the same shape, out: (6) without s, times u and 2^shift
    sums_ptr,  # [4, stripes, padded N]: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine
    best_class_ptr,  # [stripes, padded N] int32
    count_ptr,  # [stripes, padded N] int32 active pairs
    grad_row_ptr,  # OWN_U, [N], u, which is 1 otherwise
    largest_ptr,  # OWN_U, [1], max |u|
    along_ptr,  # [row blocks, padded chunk] out: Σ_i u_i g_ij c_ij / s of each block of samples
    row_shift_ptr,  # int32 out, with SPLIT: of each tile of classes and sample, [tiles, padded N]
    class_shift_ptr,  # int32 out: of each block of samples and class, [row blocks, padded chunk]
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
    FILTERED: tl.constexpr,  # filter_eps is not 0
    BACKWARD: tl.constexpr,  # without the sums
    OWN_U: tl.constexpr,  # each sample has an upstream gradient of its own
    NEED_GRAD: tl.constexpr,  # whether row_gradient follows
    NEED_GRAD_W: tl.constexpr,  # whether class_gradient does
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,  # unit rows are given by descriptors, else by pointers
):
    """A program owns a block of samples, and takes every `stripes`-th tile of classes.

    A power of two brings u to 1. As fp16 has little range, others bring the largest coefficient for ∂w of each class in
    a tile to FP16_PEAK, and with SPLIT that for ∂x of each sample: the kernel that multiplies takes them off again.
    """
    pid = tl.program_id(0)
    block = pid % row_blocks
    # 64 bits for the block's first row alone, not for each of its rows: registers are scarce
    first_row = block.to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + first_row + row, mask=row < n - first_row, other=IGNORED).to(tl.int32)
    counted = target != IGNORED
    u = counted.to(tl.float32)
    inter = tl.zeros([BLOCK_N], tl.float32)
    dropped, cos_sum, best = inter, inter, inter + NO_COSINE
    best_class = tl.zeros([BLOCK_N], tl.int32) - 1
    active = best_class + 1
    at = (pid // row_blocks).to(tl.int64) * padded_n + first_row
    plane = padded_n.to(tl.int64) * stripes
    if OWN_U:
        u = tl.load(grad_row_ptr + first_row + row, mask=counted, other=0.0)
        u = finite_or_nan(u * power_of_two(-exponent_of(tl.load(largest_ptr))))
    if not BACKWARD:
        later = row < begun - first_row
        sums, best_classes, counts = sums_ptr + at, best_class_ptr + at, count_ptr + at
        inter, dropped, cos_sum, best, best_class = load_sums(sums, best_classes, row, plane, later)
        active = tl.load(counts + row, mask=later, other=0)
    for tile in range(pid // row_blocks, tiles, stripes):
        cos = cosine_tile(
            unit_x, unit_w, block * BLOCK_N, tile * BLOCK_C, BLOCK_N, BLOCK_C, BLOCK_K, PADDED_D, SPLIT, False, TMA
        )
        if not BACKWARD:
            cos_sum += tl.sum(cos, 1)  # before NaN is dropped
        cos = tl.minimum(tl.maximum(cos, -1.0), 1.0)
        weight = sigmoid_of_angle(arccos(cos), k_inter, b)
        corner = block.to(tl.int64) * BLOCK_N * ((2 if SPLIT else 1) * padded_chunk) + tile * BLOCK_C
        in_rows = tile * padded_n + first_row + row
        in_classes = block.to(tl.int64) * padded_chunk + tile * BLOCK_C + tl.arange(0, BLOCK_C)
        first = first_class + tile * BLOCK_C
        own, past = target - first, c - first
        masked = ((own >= 0) & (own < BLOCK_C)) | ~counted
        if (tl.max(masked.to(tl.int32), 0) > 0) | (past < BLOCK_C):
            inter, dropped, best, best_class, active = weigh(
                cos, weight, own, past, u, corner, in_rows, in_classes, first, inter, dropped, best, best_class, active,
                row_coefficient_ptr, row_shift_ptr, class_coefficient_ptr, class_shift_ptr, along_ptr, padded_chunk,
                k_intra, a, filter_eps,
                BLOCK_N, BLOCK_C, True, FILTERED, BACKWARD, OWN_U, NEED_GRAD, NEED_GRAD_W, SPLIT,
            )  # fmt: skip
        else:
            inter, dropped, best, best_class, active = weigh(
                cos, weight, own, past, u, corner, in_rows, in_classes, first, inter, dropped, best, best_class, active,
                row_coefficient_ptr, row_shift_ptr, class_coefficient_ptr, class_shift_ptr, along_ptr, padded_chunk,
                k_intra, a, filter_eps,
                BLOCK_N, BLOCK_C, False, FILTERED, BACKWARD, OWN_U, NEED_GRAD, NEED_GRAD_W, SPLIT,
            )  # fmt: skip
    if not BACKWARD:
        tl.store(sums + row, inter)
        tl.store(sums + plane + row, dropped)
        tl.store(sums + 2 * plane + row, cos_sum)
        tl.store(sums + 3 * plane + row, best)
        tl.store(best_classes + row, best_class)
        tl.store(counts + row, active)
