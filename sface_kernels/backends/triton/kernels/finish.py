"""One program per sample: its candidates in fp32 from the original rows, its own class, and all its results.

Reads the rows of w that the sample's list names, and its target's; writes l_i, the statistics, ∂l_i/∂x_i complete, and
for the backward the weight and cosine of each list entry. Samples without a list take the sums of `overflow_samples`
instead, in a dense call of `row_coefficients`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    IGNORED,
    INVALID,
    NO_CLASS,
    NO_COSINE,
    NORM_EPS,
    arccos,
    inter_weight,
    is_finite,
    sigmoid_of_angle,
)


@triton.jit
def locate(rank, counts, stripe, capacity):
    """Where in a sample's list `[stripes, capacity]` the entries number `rank` `[E]` of the filled ones stand."""
    upto = tl.cumsum(counts, 0)  # [STRIPES]
    part = tl.sum((upto[None, :] <= rank[:, None]).to(tl.int32), 1)  # [E]
    before = tl.sum(tl.where(stripe[None, :] < part[:, None], counts[None, :], 0), 1)
    return part * capacity + rank - before


@triton.jit
def harder(cos, cls, other_cos, other_cls):
    """The larger of two cosines and its class, the lower one of equals."""
    wins = (other_cos > cos) | ((other_cos == cos) & (other_cls < cls))
    return tl.maximum(cos, other_cos), tl.where(wins, other_cls, cls)


@triton.jit
def cosines(w, x_unit, inv_norm):
    """(1) of rows `[E, D]` with one unit row `[D]`."""
    return tl.minimum(tl.maximum(tl.sum(w * x_unit[None, :], 1) * inv_norm, -1.0), 1.0)


@triton.jit(do_not_specialize=["n", "stripes", "parts", "grad_parts", "capacity"])
def finish_samples(
    # pointers
    x_ptr,
    w_ptr,
    target_ptr,
    norm_ptr,  # [padded N]
    inv_norm_ptr,  # [C]
    flags_ptr,  # [0]: a row of w is not finite
    overflowed_ptr,  # [padded N] int32
    sums_ptr,  # of the screen, [4, stripes, padded N]
    best_class_ptr,  # [stripes, padded N]
    count_ptr,  # [stripes, padded N]
    list_ptr,  # [padded N, stripes, capacity] classes
    list_weight_ptr,  # the same shape: out, 0 where the entry is not active
    list_cos_ptr,  # the same shape: out
    exact_sums_ptr,  # of row_coefficients or overflow_samples, [4, parts, padded N]
    exact_class_ptr,  # [parts, padded N]
    exact_active_ptr,  # [parts, padded N]
    exact_grad_ptr,  # [grad parts, padded N, D]
    row_loss_ptr,  # [N] out
    stats_ptr,  # [6, N] out, as types.RowStats
    hardest_class_ptr,  # [N] int64 out
    active_ptr,  # [N] int32 out
    row_grad_x_ptr,  # [N, D] out
    target_weight_ptr,  # [N] out, −p_i / s
    cos_target_ptr,  # [N] out
    # sizes, strides, floats
    n,
    d,
    padded_n,
    x_stride_n,
    x_stride_d,
    w_stride_c,
    w_stride_d,
    stripes,
    parts,
    grad_parts,
    capacity,
    s,
    k_intra,
    k_inter,
    a,
    b,
    filter_eps,
    # compile time
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,  # entries at a time
    BLOCK_PARTS: tl.constexpr,  # at least stripes and parts
    ALL_EXACT: tl.constexpr,  # a dense call: there are no lists
    NEED_GRAD: tl.constexpr,
    NEED_LISTS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    in_row = k < d  # where a row may be missing, its length is 0: Triton 3.9's interpreter has no tensor & scalar
    code = tl.load(target_ptr + i)
    counted = code != IGNORED
    norm = tl.load(norm_ptr + i)
    x = tl.load(x_ptr + i * x_stride_n + k * x_stride_d, mask=k < tl.where(counted, d, 0), other=0.0).to(tl.float32)
    x_unit = tl.where(is_finite(norm), x / tl.maximum(norm, NORM_EPS), 0.0)  # [BLOCK_D]
    part = tl.arange(0, BLOCK_PARTS)
    exact = tl.load(overflowed_ptr + i) > 0

    # samples without a list: add up the parts; for the others every load below is masked off
    is_part = part < tl.where(exact, parts, 0)
    at = part.to(tl.int64) * padded_n + i
    plane = padded_n.to(tl.int64) * parts
    inter = tl.sum(tl.load(exact_sums_ptr + at, mask=is_part, other=0.0), 0)
    dropped = tl.sum(tl.load(exact_sums_ptr + plane + at, mask=is_part, other=0.0), 0)
    cos_sum = tl.sum(tl.load(exact_sums_ptr + 2 * plane + at, mask=is_part, other=0.0), 0)
    best = tl.load(exact_sums_ptr + 3 * plane + at, mask=is_part, other=NO_COSINE)
    best_class = tl.load(exact_class_ptr + at, mask=is_part, other=NO_CLASS)
    hardest = tl.max(best, 0)
    hardest_class = tl.min(tl.where(best == hardest, best_class, NO_CLASS), 0)  # the lowest of equals
    active = tl.sum(tl.load(exact_active_ptr + at, mask=is_part, other=0), 0)
    grad = tl.zeros([BLOCK_D], tl.float32)
    if NEED_GRAD:
        for grad_part in range(0, tl.where(exact, grad_parts, 0)):
            row = grad_part * padded_n.to(tl.int64) + i
            grad += tl.load(exact_grad_ptr + row * d + k, mask=in_row, other=0.0)

    if not ALL_EXACT:
        is_stripe = part < tl.where(exact, 0, stripes)
        plane = padded_n.to(tl.int64) * stripes
        inter += tl.sum(tl.load(sums_ptr + at, mask=is_stripe, other=0.0), 0)
        dropped += tl.sum(tl.load(sums_ptr + plane + at, mask=is_stripe, other=0.0), 0)
        cos_sum += tl.sum(tl.load(sums_ptr + 2 * plane + at, mask=is_stripe, other=0.0), 0)
        # the nearest class by the screened cosine, again in fp32
        best = tl.load(sums_ptr + 3 * plane + at, mask=is_stripe, other=NO_COSINE)
        best_class = tl.load(best_class_ptr + at, mask=is_stripe, other=-1)
        nearest = tl.max(tl.where(best == tl.max(best, 0), best_class, -1), 0).to(tl.int64)
        w = tl.load(w_ptr + nearest * w_stride_c + k * w_stride_d, mask=k < tl.where(nearest >= 0, d, 0), other=0.0)
        inv = tl.load(inv_norm_ptr + nearest, mask=nearest >= 0, other=0.0)
        cos = tl.minimum(tl.maximum(tl.sum(w.to(tl.float32) * x_unit, 0) * inv, -1.0), 1.0)

        counts = tl.load(count_ptr + at, mask=is_stripe, other=0)
        entry = tl.arange(0, BLOCK_E)
        total = tl.sum(counts, 0)
        nearest_listed = 0
        for first in range(0, total, BLOCK_E):
            rank = first + entry
            listed = rank < total
            slot = i * stripes * capacity + locate(rank, counts, part, capacity)  # [BLOCK_E]
            j = tl.load(list_ptr + slot, mask=listed, other=0).to(tl.int64)
            rows = tl.load(
                w_ptr + j[:, None] * w_stride_c + k[None, :] * w_stride_d,
                mask=listed[:, None] & in_row[None, :],
                other=0.0,
            ).to(tl.float32)
            scale = tl.load(inv_norm_ptr + j, mask=listed, other=0.0)
            listed_cos = cosines(rows, x_unit, scale)
            weight = tl.where(listed, inter_weight(listed_cos, k_inter, b), 0.0)
            g = tl.where(weight >= filter_eps, weight, 0.0)
            inter += tl.sum(weight * listed_cos, 0)
            dropped += tl.sum(weight - g, 0)
            active += tl.sum((listed & (weight >= filter_eps)).to(tl.int32), 0)
            listed_cos = tl.where(listed, listed_cos, NO_COSINE)
            top = tl.max(listed_cos, 0)
            top_class = tl.min(tl.where(listed_cos == top, j, NO_CLASS), 0).to(tl.int32)
            hardest, hardest_class = harder(hardest, hardest_class, top, top_class)
            nearest_listed = tl.maximum(nearest_listed, tl.max((listed & (j == nearest)).to(tl.int32), 0))
            if NEED_GRAD:
                grad += tl.sum((g * scale)[:, None] * rows, 0)
            if NEED_LISTS:
                tl.store(list_weight_ptr + slot, g, mask=listed)
                tl.store(list_cos_ptr + slot, listed_cos, mask=listed)
        # as a candidate it has been counted, with a cosine that may be summed in another order
        cos = tl.where((nearest >= 0) & (nearest_listed == 0), cos, NO_COSINE)
        hardest, hardest_class = harder(hardest, hardest_class, cos, nearest.to(tl.int32))

    has_target = code >= 0
    own = tl.maximum(code, 0)
    w = tl.load(w_ptr + own * w_stride_c + k * w_stride_d, mask=k < tl.where(has_target, d, 0), other=0.0)
    w = w.to(tl.float32)
    inv = tl.load(inv_norm_ptr + own, mask=has_target, other=0.0)
    cos_target = tl.minimum(tl.maximum(tl.sum(w * x_unit, 0) * inv, -1.0), 1.0)
    p = tl.where(has_target, sigmoid_of_angle(arccos(cos_target), -k_intra, a), 0.0)  # (3) without s
    cos_target = tl.where(has_target, cos_target, 0.0)
    cos_sum -= cos_target

    poison = (tl.load(flags_ptr) > 0) | ~is_finite(norm)
    nan = float("nan")
    row_nan = poison | (code == INVALID)
    intra_loss = tl.where(row_nan, nan, -s * p * cos_target)
    inter_loss = tl.where(poison, nan, s * inter)
    hardest_class = tl.where((hardest < -1.5) | poison | ~counted, -1, hardest_class)
    hardest = tl.where(hardest < -1.5, float("-inf"), hardest)
    tl.store(row_loss_ptr + i, tl.where(counted, intra_loss + inter_loss, 0.0))
    tl.store(stats_ptr + i, tl.where(counted, intra_loss, 0.0))
    tl.store(stats_ptr + n + i, tl.where(counted, inter_loss, 0.0))
    tl.store(stats_ptr + 2 * n + i, tl.where(counted, tl.where(poison, nan, cos_target), 0.0))
    tl.store(stats_ptr + 3 * n + i, tl.where(counted, tl.where(poison, nan, cos_sum), 0.0))
    tl.store(stats_ptr + 4 * n + i, tl.where(counted, tl.where(poison, nan, hardest), 0.0))
    tl.store(stats_ptr + 5 * n + i, tl.where(counted, tl.where(poison, nan, s * dropped), 0.0))
    tl.store(hardest_class_ptr + i, hardest_class.to(tl.int64))
    tl.store(active_ptr + i, tl.where(counted & ~poison, active, 0))
    tl.store(target_weight_ptr + i, -p)
    tl.store(cos_target_ptr + i, cos_target)
    if NEED_GRAD:
        grad -= (p * inv) * w
        # below NORM_EPS normalize divides by a constant, so nothing is projected away
        along = tl.where(norm < NORM_EPS, 0.0, tl.sum(grad * x_unit, 0))
        grad = (grad - along * x_unit) * (s / tl.maximum(norm, NORM_EPS))  # (7)
        grad = tl.where(row_nan, nan, grad)
        tl.store(row_grad_x_ptr + i * d + k, tl.where(counted, grad, 0.0), mask=in_row)
