"""The samples whose list of candidates overflowed, inside a call that uses lists.

Tiles of cosines from the rows of x and w themselves, coefficients in registers, products with those; a program without
such a sample returns at once. One launch each way, so that the call stays one fixed sequence; slower than `dense`,
which takes whole calls. Never N×C in memory. Reads w once for every block of samples with an overflow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    IGNORED,
    NO_COSINE,
    arccos,
    inter_weight,
    inverse_norm,
    nearer_class,
    operand,
    product,
    sigmoid_of_angle,
)


@triton.jit
def load_rows(ptr, row, column, scale, row_mask, d, stride_row, stride_column, PRECISION: tl.constexpr):
    """Rows of x or w times `scale` (1/norm) as an operand `[rows, columns]`; zeros where masked."""
    values = tl.load(
        ptr + row[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column,
        mask=row_mask[:, None] & (column < d)[None, :],
        other=0.0,
    ).to(tl.float32)
    return operand(values * scale[:, None], PRECISION)


@triton.jit(do_not_specialize=["n", "row_blocks", "splits"])
def overflow_samples(
    # pointers
    x_ptr,
    w_ptr,
    target_ptr,
    norm_ptr,  # [padded N]
    inv_norm_ptr,  # [C]
    overflowed_ptr,  # [padded N] int32
    sums_ptr,  # [4, splits, padded N]: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine
    best_class_ptr,  # [splits, padded N] int32
    active_ptr,  # [splits, padded N] int32
    grad_ptr,  # [splits, padded N, D]: Σ weight·ŵ over kept pairs
    # sizes, strides, floats
    n,
    c,
    d,
    padded_n,
    row_blocks,
    x_stride_n,
    x_stride_d,
    w_stride_c,
    w_stride_d,
    splits,
    k_inter,
    b,
    filter_eps,
    # compile time
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    pid = tl.program_id(0)
    split = (pid // row_blocks).to(tl.int64)
    i = (pid % row_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    if tl.max(tl.load(overflowed_ptr + i), 0) > 0:
        target = tl.load(target_ptr + i, mask=i < n, other=IGNORED)
        counted = target != IGNORED
        inv_x = inverse_norm(tl.load(norm_ptr + i))
        column = tl.arange(0, BLOCK_C).to(tl.int64)
        feature = tl.arange(0, BLOCK_K)
        out = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D] of ∂x
        inter = tl.zeros([BLOCK_N], tl.float32)
        dropped = tl.zeros([BLOCK_N], tl.float32)
        cos_sum = tl.zeros([BLOCK_N], tl.float32)
        best = tl.full([BLOCK_N], NO_COSINE, tl.float32)
        best_class = tl.full([BLOCK_N], -1, tl.int32)
        active = tl.zeros([BLOCK_N], tl.int32)
        grad = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(split * BLOCK_C, c, splits * BLOCK_C):
            j = first + column
            exists = j < c
            inv_w = tl.load(inv_norm_ptr + j, mask=exists, other=0.0)
            cos = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
            for k in range(0, d, BLOCK_K):
                x = load_rows(x_ptr, i, k + feature, inv_x, counted, d, x_stride_n, x_stride_d, PRECISION)
                w = load_rows(w_ptr, j, k + feature, inv_w, exists, d, w_stride_c, w_stride_d, PRECISION)
                cos = product(x, tl.trans(w), cos, PRECISION, UPCAST)
            cos_sum += tl.sum(cos, 1)
            cos = tl.minimum(tl.maximum(cos, -1.0), 1.0)
            other = exists[None, :] & (j[None, :] != target[:, None])
            weight = tl.where(other, inter_weight(cos, k_inter, b), 0.0)
            kept = other & (weight >= filter_eps)
            g = tl.where(kept, weight, 0.0)  # (6) without s
            inter += tl.sum(weight * cos, 1)
            dropped += tl.sum(weight - g, 1)
            nearness = tl.where(other, cos, NO_COSINE)
            best, best_class = nearer_class(best, best_class, nearness, first, column, BLOCK_C)
            active += tl.sum(kept.to(tl.int32), 1)
            if NEED_GRAD:
                w = load_rows(w_ptr, j, out, inv_w, exists, d, w_stride_c, w_stride_d, PRECISION)
                grad = product(operand(g, PRECISION), w, grad, PRECISION, UPCAST)

        at = split * padded_n + i
        plane = padded_n.to(tl.int64) * splits
        if tl.program_id(1) == 0:
            tl.store(sums_ptr + at, inter)
            tl.store(sums_ptr + plane + at, dropped)
            tl.store(sums_ptr + 2 * plane + at, cos_sum)
            tl.store(sums_ptr + 3 * plane + at, best)
            tl.store(best_class_ptr + at, best_class)
            tl.store(active_ptr + at, active)
        if NEED_GRAD:
            tl.store(grad_ptr + at[:, None] * d + out[None, :], grad, mask=(out < d)[None, :])


@triton.jit
def add_overflow_rows(
    raw,  # [BLOCK_C, BLOCK_D]: Σ u g x̂
    along,  # [BLOCK_C]: Σ u g cosine
    j,  # [BLOCK_C] classes
    out,  # [BLOCK_D] features
    x_ptr,
    w_ptr,
    target_ptr,
    norm_ptr,
    inv_w,  # [BLOCK_C]
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
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The sums of (8) over the samples with an overflow, own classes included; u is times `upstream_scale`."""
    feature = tl.arange(0, BLOCK_K)
    exists = j < c
    for first in range(0, padded_n, BLOCK_N):
        i = first + tl.arange(0, BLOCK_N).to(tl.int64)  # [BLOCK_N]
        target = tl.load(target_ptr + i, mask=i < n, other=IGNORED)
        taken = target != IGNORED
        taken = taken & (tl.load(overflowed_ptr + i) > 0)
        if tl.max(taken.to(tl.int32), 0) > 0:
            inv_x = inverse_norm(tl.load(norm_ptr + i))
            u = tl.load(grad_row_ptr + i, mask=taken, other=0.0) * upstream_scale
            cos = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
            for k in range(0, d, BLOCK_K):
                w = load_rows(w_ptr, j, k + feature, inv_w, exists, d, w_stride_c, w_stride_d, PRECISION)
                x = load_rows(x_ptr, i, k + feature, inv_x, taken, d, x_stride_n, x_stride_d, PRECISION)
                cos = product(w, tl.trans(x), cos, PRECISION, UPCAST)
            cos = tl.minimum(tl.maximum(cos, -1.0), 1.0)
            theta = arccos(cos)
            own = j[:, None] == target[None, :]
            weight = sigmoid_of_angle(theta, k_inter, b)
            g = tl.where(weight >= filter_eps, weight, 0.0)
            g = tl.where(own, -sigmoid_of_angle(theta, -k_intra, a), g) * u[None, :]
            g = tl.where(taken[None, :] & exists[:, None], g, 0.0)
            along += tl.sum(g * cos, 1)
            x = load_rows(x_ptr, i, out, inv_x, taken, d, x_stride_n, x_stride_d, PRECISION)
            raw = product(operand(g, PRECISION), x, raw, PRECISION, UPCAST)
    return raw, along
