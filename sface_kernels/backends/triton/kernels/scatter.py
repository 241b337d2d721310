"""∂w, equation (8), from the lists: active pairs are linked into one list per class, and each class adds up its own.

Reads x for the listed pairs only and writes each row of ∂w once, zeros included. The order in which the links come is
not determined, so the sums are fixed-point int64, whose order cannot matter: the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .finish import locate
from .math import inverse_norm, is_finite, store_class_gradient
from .overflow import add_overflow_rows

FIXED: tl.constexpr = tl.constexpr(2.0**39)  # one unit of the largest coefficient: room for 2²³ summands in 63 bits


@triton.jit
def power_of_two(exponent):
    """2^exponent for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value):
    """floor(log2(value)) of positive normal numbers, -126 below them, 126 at most."""
    return tl.minimum(tl.maximum((value.to(tl.int32, bitcast=True) >> 23) - 127, -126), 126)


@triton.jit(do_not_specialize=["n"])
def prepare_upstream(
    # pointers
    grad_row_ptr,  # [N]
    norm_ptr,  # [padded N]
    upstream_ptr,  # [2] out: the power of two that brings the largest |u| to [1, 2), and 1 where anything is not finite
    # sizes
    n,
    # compile time
    BLOCK_N: tl.constexpr,
):
    largest = tl.zeros([BLOCK_N], tl.float32)
    bad = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, n, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N).to(tl.int64)
        u = tl.load(grad_row_ptr + i, mask=i < n, other=0.0)
        norm = tl.load(norm_ptr + i, mask=i < n, other=0.0)
        largest = tl.maximum(largest, tl.abs(u))
        bad |= (~(is_finite(u) & is_finite(norm))).to(tl.int32)
    tl.store(upstream_ptr, power_of_two(-exponent_of(tl.max(largest, 0))))
    tl.store(upstream_ptr + 1, tl.max(bad, 0).to(tl.float32))


@triton.jit(do_not_specialize=["stripes", "capacity"])
def link_pairs(
    # pointers
    target_ptr,
    overflowed_ptr,
    count_ptr,  # [stripes, padded N]
    list_ptr,  # [padded N, stripes, capacity] classes
    list_weight_ptr,  # the same shape, 0 where the entry is not active
    head_ptr,  # [C] int32, −1 on entry: the last link of each class
    next_ptr,  # [slots + N] int32: the link before, −1 at the end
    # sizes
    padded_n,
    stripes,
    capacity,
    slots,
    # compile time
    BLOCK_E: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    if tl.load(overflowed_ptr + i) == 0:
        stripe = tl.arange(0, BLOCK_PARTS)
        counts = tl.load(count_ptr + stripe.to(tl.int64) * padded_n + i, mask=stripe < stripes, other=0)
        total = tl.sum(counts, 0)
        for first in range(0, total, BLOCK_E):
            rank = first + tl.arange(0, BLOCK_E)
            slot = i * stripes * capacity + locate(rank, counts, stripe, capacity)  # [BLOCK_E]
            active = tl.load(list_weight_ptr + slot, mask=rank < total, other=0.0) > 0
            j = tl.load(list_ptr + slot, mask=active, other=0)
            before = tl.atomic_xchg(head_ptr + j, slot.to(tl.int32), mask=active)
            tl.store(next_ptr + slot, before, mask=active)
        code = tl.load(target_ptr + i)
        if code >= 0:
            own = (slots + i).to(tl.int32)
            before = tl.atomic_xchg(head_ptr + code, own)
            tl.store(next_ptr + own, before)


@triton.jit
def load_link(link, list_weight_ptr, list_cos_ptr, target_weight_ptr, cos_target_ptr, grad_row_ptr, per_sample, slots):
    """Sample, u·g/s and cosine of each link `[BLOCK_C]`; where it is −1 the coefficient is 0."""
    live = link >= 0
    is_own = link >= slots
    listed = live & ~is_own
    i = tl.where(is_own, link - slots, tl.where(live, link // per_sample, 0)).to(tl.int64)
    weight = tl.load(list_weight_ptr + link, mask=listed, other=0.0)
    weight += tl.load(target_weight_ptr + i, mask=is_own, other=0.0)
    cos = tl.load(list_cos_ptr + link, mask=listed, other=0.0) + tl.load(cos_target_ptr + i, mask=is_own, other=0.0)
    return i, weight * tl.load(grad_row_ptr + i, mask=live, other=0.0), cos


@triton.jit(do_not_specialize=["n", "per_sample"])
def scatter_classes(
    # pointers
    x_ptr,
    w_ptr,
    target_ptr,
    norm_ptr,
    inv_norm_ptr,  # [C]
    grad_row_ptr,  # [N], u
    upstream_ptr,  # [2], of prepare_upstream
    flags_ptr,  # [1]: some samples overflowed
    overflowed_ptr,
    list_weight_ptr,  # [padded N, stripes, capacity]
    list_cos_ptr,
    target_weight_ptr,  # [N]
    cos_target_ptr,  # [N]
    head_ptr,  # [C]
    next_ptr,  # [slots + N]
    grad_w_ptr,  # [C, D] out
    # sizes, strides, floats
    n,
    c,
    d,
    padded_n,
    x_stride_n,
    x_stride_d,
    w_stride_c,
    w_stride_d,
    per_sample,
    slots,
    s,
    k_intra,
    k_inter,
    a,
    b,
    filter_eps,
    # compile time
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    out = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    inv_w = tl.load(inv_norm_ptr + j, mask=j < c, other=0.0)
    upstream_scale = tl.load(upstream_ptr)
    head = tl.load(head_ptr + j, mask=j < c, other=-1)

    largest = tl.zeros([BLOCK_C], tl.float32)
    link = head
    while tl.max(link, 0) >= 0:
        _, g, _ = load_link(
            link, list_weight_ptr, list_cos_ptr, target_weight_ptr, cos_target_ptr, grad_row_ptr, per_sample, slots
        )
        largest = tl.maximum(largest, tl.abs(g))
        link = tl.load(next_ptr + link, mask=link >= 0, other=-1)

    exponent = exponent_of(largest)
    to_unit, from_unit = power_of_two(-exponent), power_of_two(exponent)  # [BLOCK_C]
    raw_fixed = tl.zeros([BLOCK_C, BLOCK_D], tl.int64)
    along_fixed = tl.zeros([BLOCK_C], tl.int64)
    link = head
    while tl.max(link, 0) >= 0:
        i, g, cos = load_link(
            link, list_weight_ptr, list_cos_ptr, target_weight_ptr, cos_target_ptr, grad_row_ptr, per_sample, slots
        )
        live = link >= 0
        x = tl.load(
            x_ptr + i[:, None] * x_stride_n + out[None, :] * x_stride_d,
            mask=live[:, None] & (out < d)[None, :],
            other=0.0,
        ).to(tl.float32)
        unit = x * inverse_norm(tl.load(norm_ptr + i, mask=live, other=1.0))[:, None]
        scaled = tl.where(live, g * to_unit, 0.0) * FIXED
        raw_fixed += (scaled[:, None] * unit).to(tl.int64)
        along_fixed += (scaled * cos).to(tl.int64)
        link = tl.load(next_ptr + link, mask=live, other=-1)
    # both factors may leave fp32's range together, not one after the other
    raw = raw_fixed.to(tl.float32) * (1.0 / FIXED) * from_unit[:, None]
    along = along_fixed.to(tl.float32) * (1.0 / FIXED) * from_unit

    if tl.load(flags_ptr + 1) > 0:
        raw, along = add_overflow_rows(
            raw * upstream_scale,
            along * upstream_scale,
            j,
            out,
            x_ptr,
            w_ptr,
            target_ptr,
            norm_ptr,
            inv_w,
            overflowed_ptr,
            grad_row_ptr,
            upstream_scale,
            n,
            c,
            d,
            padded_n,
            x_stride_n,
            x_stride_d,
            w_stride_c,
            w_stride_d,
            k_intra,
            k_inter,
            a,
            b,
            filter_eps,
            BLOCK_N,
            BLOCK_C,
            BLOCK_K,
            PRECISION,
            UPCAST,
        )
        raw, along = raw / upstream_scale, along / upstream_scale
    poison = tl.load(upstream_ptr + 1)
    store_class_gradient(grad_w_ptr, raw, along, j, out, w_ptr, inv_w, poison, s, 1.0, c, d, w_stride_c, w_stride_d)
