"""One program per sample: its candidates in fp32 from the original rows, its own class, and all its results.

Reads the rows of w that the sample's list names, and its target's; writes l_i, the statistics, ∂l_i/∂x_i complete, and
for the backward the sample and cosine of each list entry, and links those of a class to each other. A sample that has
no list has *overflowed*: it goes over all classes instead. In a dense call `coefficients` has summed everything.
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
    is_finite,
    sigmoid_of_angle,
)
from .regroup import COUNT


@triton.jit
def cosines(w, x_unit, inv_norm):
    """(1) of rows `[E, D]` with one unit row `[D]`."""
    return tl.minimum(tl.maximum(tl.sum(w * x_unit[None, :], 1) * inv_norm, -1.0), 1.0)


@triton.jit
def cosine(w, x_unit, inv_norm):
    """(1) of two rows `[D]`."""
    return tl.minimum(tl.maximum(tl.sum(w * x_unit, 0) * inv_norm, -1.0), 1.0)


@triton.jit
def harder(cos, cls, other_cos, other_cls):
    """The larger of two cosines and its class, the lower one of equals."""
    wins = (other_cos > cos) | ((other_cos == cos) & (other_cls < cls))
    return tl.maximum(cos, other_cos), tl.where(wins, other_cls, cls)


@triton.jit(do_not_specialize=["n", "stripes", "splits", "slots"])
def finish_samples(
    # pointers
    x_ptr,
    w_ptr,
    target_ptr,
    norm_ptr,  # [padded N]
    inv_norm_ptr,  # [C]
    sums_ptr,  # of screen or coefficients, [4, stripes, padded N]
    best_class_ptr,  # of the same, [stripes, padded N]
    count_ptr,  # [stripes, padded N] int32: candidates as `regroup` takes them, in a dense call active pairs
    begin_ptr,  # [stripes, padded N] int32, of `regroup`: in the first row where a sample's list begins, −1 without one
    grad_ptr,  # of a dense call, [splits, padded N, D]: Σ weight·ŵ
    links_ptr,  # [slots + N] out: the link after this one, −1 at the end; own classes' come after all others
    list_sample_ptr,  # the same shape: classes of `regroup`, out: i
    list_cos_ptr,  # the same shape: out
    head_ptr,  # [C] int32, −1 on entry: the first link of each class
    row_loss_ptr,  # [N] out
    row_stats_ptr,  # [6, N] out, as types.RowStats
    hardest_class_ptr,  # [N] int64 out
    counts_ptr,  # [2] int64, 0 on entry: active pairs, pairs of samples without a list
    row_grad_x_ptr,  # [N, D] out
    overflowed_ptr,  # [N] int32 out, 1 for counted samples without a list
    flags_ptr,  # [2] int32, 0 on entry: whether there is such a sample, whether there is one that is not finite
    # sizes, strides, floats
    n,
    c,
    d,
    padded_n,
    x_stride_n,
    x_stride_d,
    w_stride_c,
    w_stride_d,
    stripes,
    splits,
    slots,
    s,
    k_intra,
    k_inter,
    a,
    b,
    filter_eps,
    # compile time
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,  # entries at a time
    BLOCK_PARTS: tl.constexpr,  # at least `stripes`
    DENSE: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    LINKS: tl.constexpr,
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
    is_part = part < stripes
    at = part.to(tl.int64) * padded_n + i
    plane = padded_n.to(tl.int64) * stripes
    inter = tl.sum(tl.load(sums_ptr + at, mask=is_part, other=0.0), 0)
    dropped = tl.sum(tl.load(sums_ptr + plane + at, mask=is_part, other=0.0), 0)
    cos_sum = tl.sum(tl.load(sums_ptr + 2 * plane + at, mask=is_part, other=0.0), 0)
    best = tl.load(sums_ptr + 3 * plane + at, mask=is_part, other=NO_COSINE)
    counts = tl.load(count_ptr + at, mask=is_part, other=0)
    best_class = tl.load(best_class_ptr + at, mask=is_part, other=NO_CLASS)
    hardest = tl.max(best, 0)
    hardest_class = tl.min(tl.where(best == hardest, best_class, NO_CLASS), 0)  # the lowest of equals
    total = tl.sum(counts & COUNT, 0)
    active = total
    poison = ~is_finite(cos_sum)  # the sample, or a class
    grad = tl.zeros([BLOCK_D], tl.float32)
    if DENSE:
        overflowed = counted
        if NEED_GRAD:
            for grad_part in range(0, splits):
                row = grad_part * padded_n.to(tl.int64) + i
                grad += tl.load(grad_ptr + row * d + k, mask=in_row, other=0.0)
    else:
        own_list = tl.load(begin_ptr + i)
        overflowed = counted & (own_list < 0)
        # the nearest class by the screened cosine, again in fp32
        nearest = tl.where(hardest > NO_COSINE, hardest_class, -1).to(tl.int64)
        w = tl.load(w_ptr + nearest * w_stride_c + k * w_stride_d, mask=k < tl.where(nearest >= 0, d, 0), other=0.0)
        inv = tl.load(inv_norm_ptr + nearest, mask=nearest >= 0, other=0.0)
        nearest_cos = tl.where(nearest >= 0, cosine(w.to(tl.float32), x_unit, inv), NO_COSINE)
        hardest = tl.zeros_like(nearest_cos) + NO_COSINE
        nearest_seen = 0

        inter = tl.where(overflowed, 0.0, inter)
        dropped = tl.where(overflowed, 0.0, tl.maximum(dropped, 0.0))
        total = tl.where(overflowed, c, total)
        active = tl.zeros_like(total)
        # what a turn of the loop waits for is asked for in the one before: classes, and what the heads were
        entry = tl.arange(0, BLOCK_E)
        listed = entry < tl.where(overflowed, 0, total)
        later_j = tl.load(list_sample_ptr + own_list + entry, mask=listed, other=0)
        linked = entry < 0
        slot, before = own_list + entry, tl.zeros([BLOCK_E], tl.int32)
        for first in range(0, total, BLOCK_E):
            rank = first + entry  # [BLOCK_E]
            exists = rank < total
            j = tl.where(overflowed & exists, rank, later_j).to(tl.int64)
            other = exists & (j != code)
            rows = tl.load(
                w_ptr + j[:, None] * w_stride_c + k[None, :] * w_stride_d,
                mask=other[:, None] & in_row[None, :],
                other=0.0,
            ).to(tl.float32)
            scale = tl.load(inv_norm_ptr + j, mask=other, other=0.0)
            listed = rank + BLOCK_E < tl.where(overflowed, 0, total)
            later_j = tl.load(list_sample_ptr + own_list + rank + BLOCK_E, mask=listed, other=0)
            if LINKS:
                tl.store(links_ptr + slot, before, mask=linked)
            cos = cosines(rows, x_unit, scale)
            weight = tl.where(other, sigmoid_of_angle(arccos(cos), k_inter, b), 0.0)
            kept = other & (weight >= filter_eps)
            g = tl.where(kept, weight, 0.0)
            inter += tl.sum(weight * cos, 0)
            dropped += tl.sum(weight - g, 0)
            active += tl.sum(kept.to(tl.int32), 0)
            nearness = tl.where(other, cos, NO_COSINE)
            top = tl.max(nearness, 0)
            top_class = tl.min(tl.where(nearness == top, j, NO_CLASS), 0).to(tl.int32)
            hardest, hardest_class = harder(hardest, hardest_class, top, top_class)
            nearest_seen = tl.maximum(nearest_seen, tl.max((other & (j == nearest)).to(tl.int32), 0))
            if NEED_GRAD:
                grad += tl.sum((g * scale)[:, None] * rows, 0)
            if LINKS:
                slot = own_list + rank
                linked = kept & (rank < tl.where(overflowed, 0, total))
                before = tl.atomic_xchg(head_ptr + j, slot, mask=linked)
                tl.store(list_cos_ptr + slot, cos, mask=linked)
                tl.debug_barrier()  # every warp has read its classes
                tl.store(list_sample_ptr + slot, tl.zeros_like(slot) + i.to(tl.int32), mask=linked)
        if LINKS:
            tl.store(links_ptr + slot, before, mask=linked)

        # as a candidate it has been counted, with a cosine that may be summed in another order
        nearest_cos = tl.where(nearest_seen == 0, nearest_cos, NO_COSINE)
        hardest, hardest_class = harder(hardest, hardest_class, nearest_cos, nearest.to(tl.int32))

    has_target = code >= 0
    own = tl.maximum(code, 0)
    w = tl.load(w_ptr + own * w_stride_c + k * w_stride_d, mask=k < tl.where(has_target, d, 0), other=0.0)
    w = w.to(tl.float32)
    inv = tl.load(inv_norm_ptr + own, mask=has_target, other=0.0)
    cos_target = cosine(w, x_unit, inv)
    p = tl.where(has_target, sigmoid_of_angle(arccos(cos_target), -k_intra, a), 0.0)  # (3) without s
    cos_target = tl.where(has_target, cos_target, 0.0)
    cos_sum -= cos_target
    if LINKS:  # noqa: SIM102, `and` takes no tensor
        if has_target & ~overflowed:
            own_slot = slots + i
            tl.store(list_sample_ptr + own_slot, i.to(tl.int32))
            tl.store(list_cos_ptr + own_slot, cos_target)
            tl.store(links_ptr + own_slot, tl.atomic_xchg(head_ptr + own, own_slot.to(tl.int32)))

    nan = float("nan")
    row_nan = poison | (code == INVALID)
    intra_loss = tl.where(row_nan, nan, -s * p * cos_target)
    inter_loss = tl.where(poison, nan, s * inter)
    hardest_class = tl.where((hardest < -1.5) | poison | ~counted, -1, hardest_class)
    hardest = tl.where(hardest < -1.5, float("-inf"), hardest)
    tl.store(row_loss_ptr + i, tl.where(counted, intra_loss + inter_loss, 0.0))
    tl.store(row_stats_ptr + i, tl.where(counted, intra_loss, 0.0))
    tl.store(row_stats_ptr + n + i, tl.where(counted, inter_loss, 0.0))
    tl.store(row_stats_ptr + 2 * n + i, tl.where(counted, tl.where(poison, nan, cos_target), 0.0))
    tl.store(row_stats_ptr + 3 * n + i, tl.where(counted, tl.where(poison, nan, cos_sum), 0.0))
    tl.store(row_stats_ptr + 4 * n + i, tl.where(counted, tl.where(poison, nan, hardest), 0.0))
    tl.store(row_stats_ptr + 5 * n + i, tl.where(counted, tl.where(poison, nan, s * dropped), 0.0))
    tl.store(hardest_class_ptr + i, hardest_class.to(tl.int64))
    tl.store(overflowed_ptr + i, overflowed.to(tl.int32))
    if counted & ~poison:
        tl.atomic_add(counts_ptr, active.to(tl.int64))
    if overflowed:
        tl.atomic_add(counts_ptr + 1, overflowed.to(tl.int64) * c)  # c = 1 is no tensor
        tl.store(flags_ptr, 1)
    if counted & ~is_finite(norm):
        tl.store(flags_ptr + 1, 1)
    if NEED_GRAD:
        grad -= (p * inv) * w
        # below NORM_EPS normalize divides by a constant, so nothing is projected away
        along = tl.where(norm < NORM_EPS, 0.0, tl.sum(grad * x_unit, 0))
        grad = (grad - along * x_unit) * (s / tl.maximum(norm, NORM_EPS))  # (7)
        grad = tl.where(row_nan, nan, grad)
        tl.store(row_grad_x_ptr + i * d + k, tl.where(counted, grad, 0.0), mask=in_row)
