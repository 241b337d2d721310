"""One program per sample: all its results, from the sums over pairs, its candidates and its own class.

Writes l_i, the statistics and ∂l_i/∂x_i complete. What the candidates add it computes itself or takes from `rescore`; a
sample that has no list has *overflowed*: they are all classes. In a dense call `coefficients` has summed everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import IGNORED, INVALID, NO_COSINE, NORM_EPS, arccos, is_finite, sigmoid_of_angle
from .rescore import cosine, harder, over_candidates, parts_added, screened, unit_row


@triton.jit(do_not_specialize=["n", "stripes", "splits", "list_parts", "slots"])
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
    part_ptr,  # of rescore, with IN_PARTS
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
    list_parts,
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
    IN_PARTS: tl.constexpr,  # `rescore` has taken the candidates
    NEED_GRAD: tl.constexpr,
    LINKS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    in_row = k < d  # where a row may be missing, its length is 0: Triton 3.9's interpreter has no tensor & scalar
    code = tl.load(target_ptr + i)
    counted = code != IGNORED
    norm = tl.load(norm_ptr + i)
    x_unit = unit_row(x_ptr, norm, i, k, tl.where(counted, d, 0), x_stride_n, x_stride_d)  # [BLOCK_D]

    inter, dropped, cos_sum, hardest, hardest_class, active = screened(
        sums_ptr, best_class_ptr, count_ptr, i, padded_n, stripes, BLOCK_PARTS
    )
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
        nearest = hardest_class.to(tl.int64)
        w = tl.load(w_ptr + nearest * w_stride_c + k * w_stride_d, mask=k < tl.where(nearest >= 0, d, 0), other=0.0)
        inv = tl.load(inv_norm_ptr + nearest, mask=nearest >= 0, other=0.0)
        nearest_cos = tl.where(nearest >= 0, cosine(w.to(tl.float32), x_unit, inv), NO_COSINE)
        total = tl.where(overflowed, c, active)
        if IN_PARTS:
            more_inter, more_dropped, active, hardest, hardest_class, seen, grad = parts_added(
                part_ptr, i, total, n, d, padded_n, list_parts, k, BLOCK_E, NEED_GRAD
            )
        else:
            more_inter, more_dropped, active, hardest, hardest_class, seen, grad = over_candidates(
                i, 0, 1, code, total, own_list, overflowed, nearest, x_unit, w_ptr, inv_norm_ptr, links_ptr,
                list_sample_ptr, list_cos_ptr, head_ptr, k, in_row, w_stride_c, w_stride_d, k_inter, b, filter_eps,
                BLOCK_D, BLOCK_E, NEED_GRAD, LINKS,
            )  # fmt: skip
        inter = tl.where(overflowed, 0.0, inter) + more_inter
        dropped = tl.where(overflowed, 0.0, tl.maximum(dropped, 0.0)) + more_dropped

        # as a candidate it has been counted, with a cosine that may be summed in another order
        nearest_cos = tl.where(seen == 0, nearest_cos, NO_COSINE)
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
