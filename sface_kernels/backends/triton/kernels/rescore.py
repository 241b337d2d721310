"""The candidates of the samples again, in fp32 from the original rows: what each adds to its sample's results.

Reads the rows of w that a sample's list names, or all where it has *overflowed* and has no list. For the backward
writes the sample and cosine of each entry that is active, and links those of a class to each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import IGNORED, NO_CLASS, NO_COSINE, NORM_EPS, arccos, is_finite, load_sums, sigmoid_of_angle
from .regroup import COUNT

# What a program of `rescore` leaves for `finish_samples` beside its part of ∂x, each [parts, padded N]:
# Σ weight·cosine, Σ dropped weight, the largest cosine; int32 in its bits: active pairs, the class of the largest,
# whether the nearest class of the screen was among them.
PART_PLANES: tl.constexpr = tl.constexpr(6)
MOST_LIST_PARTS: tl.constexpr = tl.constexpr(8)


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


@triton.jit
def unit_row(x_ptr, norm, i, k, d, x_stride_n, x_stride_d):
    """x̂ `[BLOCK_D]` of sample i, of whose features `d` are read: 0 where its norm is not finite."""
    x = tl.load(x_ptr + i * x_stride_n + k * x_stride_d, mask=k < d, other=0.0).to(tl.float32)
    return tl.where(is_finite(norm), x / tl.maximum(norm, NORM_EPS), 0.0)


@triton.jit
def screened(sums_ptr, best_class_ptr, count_ptr, i, padded_n, stripes, BLOCK_PARTS: tl.constexpr):
    """Of sample i over all stripes: the sums, the largest cosine and its class, how many candidates or active pairs."""
    part = tl.arange(0, BLOCK_PARTS)
    is_part = part < stripes
    at = part.to(tl.int64) * padded_n + i
    plane = padded_n.to(tl.int64) * stripes
    inter, dropped, cos_sum, best, best_class = load_sums(sums_ptr, best_class_ptr, at, plane, is_part)
    count = tl.sum(tl.load(count_ptr + at, mask=is_part, other=0) & COUNT, 0)
    hardest = tl.max(best, 0)
    hardest_class = tl.min(tl.where(best == hardest, best_class, NO_CLASS), 0)  # the lowest of equals
    hardest_class = tl.where(hardest > NO_COSINE, hardest_class, -1)
    return tl.sum(inter, 0), tl.sum(dropped, 0), tl.sum(cos_sum, 0), hardest, hardest_class, count


@triton.jit
def over_candidates(
    i, part, parts, code, total, own_list, overflowed, nearest, x_unit, w_ptr, inv_norm_ptr, links_ptr,
    list_sample_ptr, list_cos_ptr, head_ptr, k, in_row, w_stride_c, w_stride_d, k_inter, b, filter_eps,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, NEED_GRAD: tl.constexpr, LINKS: tl.constexpr,
):  # fmt: skip
    """Every `parts`-th turn of BLOCK_E of the sample's `total` candidates, from the `part`-th on.

    Returns what they add: the planes of PART_PLANES in their order, but the active ones third, and Σ weight·ŵ.
    """
    active = tl.zeros_like(total)
    inter = active.to(tl.float32)
    dropped, hardest, hardest_class, seen = inter, inter + NO_COSINE, active + NO_CLASS, active
    grad = tl.zeros([BLOCK_D], tl.float32)
    # what a turn waits for is asked for in the one before: classes, and what the heads were
    in_list, turn = tl.where(overflowed, 0, total), parts * BLOCK_E
    listed = list_sample_ptr + own_list  # classes
    place = tl.arange(0, BLOCK_E)
    rank = part * BLOCK_E + place
    later_j = tl.load(listed + rank, mask=rank < in_list, other=0)
    linked = place < 0
    slot, before = own_list + rank, tl.zeros([BLOCK_E], tl.int32)
    for first in range(part * BLOCK_E, total, turn):
        rank = first + place
        j = tl.where(overflowed, rank, later_j).to(tl.int64)
        other = (rank < total) & (j != code)
        rows = tl.load(
            w_ptr + j[:, None] * w_stride_c + k[None, :] * w_stride_d,
            mask=other[:, None] & in_row[None, :],
            other=0.0,
        ).to(tl.float32)
        scale = tl.load(inv_norm_ptr + j, mask=other, other=0.0)
        later_j = tl.load(listed + rank + turn, mask=rank + turn < in_list, other=0)
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
        seen = tl.maximum(seen, tl.max((other & (j == nearest)).to(tl.int32), 0))
        if NEED_GRAD:
            grad += tl.sum((g * scale)[:, None] * rows, 0)
        if LINKS:
            slot = own_list + rank
            linked = kept & (rank < in_list)
            before = tl.atomic_xchg(head_ptr + j, slot, mask=linked)
            tl.store(list_cos_ptr + slot, cos, mask=linked)
            tl.debug_barrier()  # every warp has read its classes
            tl.store(list_sample_ptr + slot, tl.zeros_like(slot) + i.to(tl.int32), mask=linked)
    if LINKS:
        tl.store(links_ptr + slot, before, mask=linked)
    return inter, dropped, active, hardest, hardest_class, seen, grad


@triton.jit(do_not_specialize=["n", "stripes", "list_parts"])
def rescore(
    # pointers
    x_ptr,
    w_ptr,
    target_ptr,
    norm_ptr,  # [padded N]
    inv_norm_ptr,  # [C]
    sums_ptr,  # of screen, [4, stripes, padded N]
    best_class_ptr,  # of screen, [stripes, padded N]
    count_ptr,  # of screen, [stripes, padded N] int32
    begin_ptr,  # the rest as finish_samples has it
    links_ptr,
    list_sample_ptr,
    list_cos_ptr,
    head_ptr,
    part_ptr,  # [parts, N, D] out: Σ weight·ŵ of each part; after these PART_PLANES
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
    list_parts,
    k_inter,
    b,
    filter_eps,
    # compile time
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,  # entries at a time
    BLOCK_PARTS: tl.constexpr,  # at least `stripes`
    NEED_GRAD: tl.constexpr,
    LINKS: tl.constexpr,
):
    """Where there are many classes: a part of a sample's candidates, as some samples have ten times as many as most."""
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    code = tl.load(target_ptr + i)
    _, _, _, _, nearest, total = screened(sums_ptr, best_class_ptr, count_ptr, i, padded_n, stripes, BLOCK_PARTS)
    own_list = tl.load(begin_ptr + i)
    overflowed = (code != IGNORED) & (own_list < 0)
    total = tl.where(overflowed, c, total)
    if part * BLOCK_E < total:
        x_unit = unit_row(x_ptr, tl.load(norm_ptr + i), i, k, d, x_stride_n, x_stride_d)
        inter, dropped, active, hardest, hardest_class, seen, grad = over_candidates(
            i, part, list_parts, code, total, own_list, overflowed, nearest, x_unit, w_ptr, inv_norm_ptr, links_ptr,
            list_sample_ptr, list_cos_ptr, head_ptr, k, k < d, w_stride_c, w_stride_d, k_inter, b, filter_eps,
            BLOCK_D, BLOCK_E, NEED_GRAD, LINKS,
        )  # fmt: skip
        row = part * n.to(tl.int64) + i
        if NEED_GRAD:
            tl.store(part_ptr + row * d + k, grad, mask=k < d)
        at = part_planes(part_ptr, n, d, list_parts) + part * padded_n + i
        plane = list_parts * padded_n
        tl.store(at, inter)
        tl.store(at + plane, dropped)
        tl.store(at + 2 * plane, hardest)
        tl.store(at + 3 * plane, active.to(tl.float32, bitcast=True))
        tl.store(at + 4 * plane, hardest_class.to(tl.float32, bitcast=True))
        tl.store(at + 5 * plane, seen.to(tl.float32, bitcast=True))


@triton.jit
def part_planes(part_ptr, n, d, list_parts):
    """Where PART_PLANES begin, behind the parts of ∂x."""
    return part_ptr + list_parts * n.to(tl.int64) * d


@triton.jit
def parts_added(part_ptr, i, total, n, d, padded_n, list_parts, k, BLOCK_E: tl.constexpr, NEED_GRAD: tl.constexpr):
    """What `over_candidates` returns, of all parts together."""
    used = tl.minimum(list_parts, (total + BLOCK_E - 1) // BLOCK_E)
    part = tl.arange(0, MOST_LIST_PARTS)
    exists = part < used
    at = part_planes(part_ptr, n, d, list_parts) + part * padded_n + i
    plane = list_parts * padded_n
    inter = tl.sum(tl.load(at, mask=exists, other=0.0), 0)
    dropped = tl.sum(tl.load(at + plane, mask=exists, other=0.0), 0)
    largest = tl.load(at + 2 * plane, mask=exists, other=NO_COSINE)
    active = tl.load(at + 3 * plane, mask=exists, other=0.0).to(tl.int32, bitcast=True)
    classes = tl.load(at + 4 * plane, mask=exists, other=0.0).to(tl.int32, bitcast=True)
    seen = tl.load(at + 5 * plane, mask=exists, other=0.0).to(tl.int32, bitcast=True)
    hardest = tl.max(largest, 0)
    hardest_class = tl.min(tl.where(exists & (largest == hardest), classes, NO_CLASS), 0)
    grad = tl.zeros_like(k).to(tl.float32)
    if NEED_GRAD:
        for one in range(0, used):
            grad += tl.load(part_ptr + (one * n.to(tl.int64) + i) * d + k, mask=k < d, other=0.0)
    return inter, dropped, tl.sum(active, 0), hardest, hardest_class, tl.max(seen, 0), grad
