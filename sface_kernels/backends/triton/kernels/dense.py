"""Whole calls by dense products: `filter_eps=0`, and steps in which many pairs are active.

Chunk by chunk of classes: unit rows, then coefficients (6) `[padded N, chunk]`, then their products with unit rows. A
chunk of coefficients is written and read while it is in the L2 cache; N×C is never in memory. Three products of 2·N·C·D
operations in all, the cosines, ∂x and ∂w, where the forward makes ∂w too: it is linear in the upstream gradient, which
a mean or a sum gives to all samples alike. Else four, as the backward computes the coefficients again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    SPLIT_EXPONENT,
    exponent_of,
    finite_or_nan,
    load_operand,
    power_of_two,
    product,
    store_class_gradient,
)


@triton.jit
def without_shift(shift, SPLIT: tl.constexpr):
    """What takes a shift off a sum of coefficients times unit rows."""
    return power_of_two(-shift - SPLIT_EXPONENT) if SPLIT else power_of_two(-shift)


@triton.jit(do_not_specialize=["row_blocks", "steps", "splits", "begun"])
def row_gradient(
    # pointers
    row_coefficient_ptr,  # [padded N, parts, padded chunk], of `coefficients`
    unit_w_ptr,  # [padded chunk, parts, PADDED_D]
    row_shift_ptr,  # split: of `coefficients`
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
        g_tile = row_coefficient_ptr + i[:, None] * (PARTS * padded_chunk) + j[None, :]
        w_tile = unit_w_ptr + j[:, None] * (PARTS * PADDED_D) + out[None, :]
        g, g_rest = load_operand(g_tile, padded_chunk, None, SPLIT)
        w, w_rest = load_operand(w_tile, PADDED_D, (out < PADDED_D)[None, :], SPLIT)
        if PARTS == 2:
            shift = tl.load(row_shift_ptr + step * BLOCK_K // COLUMNS * padded_n + i)
            added = product(g, g_rest, w, w_rest, tl.zeros_like(grad), SPLIT)
            grad += added * without_shift(shift, SPLIT)[:, None]
        else:
            grad = product(g, g_rest, w, w_rest, grad, SPLIT)
    tl.store(at, grad, mask=inside)


@triton.jit(do_not_specialize=["n"])
def class_gradient(
    # pointers
    class_coefficient_ptr,  # [padded N, parts, padded chunk], of `coefficients`
    unit_x_ptr,  # [padded N, parts, PADDED_D]
    along_ptr,  # of `coefficients`
    class_shift_ptr,  # of `coefficients`
    w_ptr,
    inv_norm_ptr,  # [C]
    largest_ptr,  # BACKWARD, [1], max |u|, or the u of all samples
    counted_ptr,  # MEAN, [] int64, what the sum over samples is divided by
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
    BACKWARD: tl.constexpr,
    OWN_U: tl.constexpr,
    MEAN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(8) for the chunk's classes."""
    PARTS: tl.constexpr = 2 if SPLIT else 1
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.arange(0, BLOCK_K).to(tl.int64)
    raw = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    along = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, n, BLOCK_K):
        i = first + sample
        # rows past the last sample were not written
        g_tile = class_coefficient_ptr + i[None, :] * (PARTS * padded_chunk) + row[:, None]
        x_tile = unit_x_ptr + i[:, None] * (PARTS * PADDED_D) + out[None, :]
        g, g_rest = load_operand(g_tile, padded_chunk, (i < n)[None, :], SPLIT)
        x, x_rest = load_operand(x_tile, PADDED_D, (out < PADDED_D)[None, :], SPLIT)
        in_block = first // ROWS * padded_chunk + row  # [BLOCK_C]
        shift = tl.load(class_shift_ptr + in_block)
        along += tl.load(along_ptr + in_block, mask=row < tl.where(first % ROWS == 0, padded_chunk, 0), other=0.0)
        added = product(g, g_rest, x, x_rest, tl.zeros_like(raw), SPLIT)
        raw += added * without_shift(shift, SPLIT)[:, None]
    j = first_class + row
    inv_w = tl.load(inv_norm_ptr + j, mask=j < c, other=0.0)
    scale = s
    if OWN_U:
        scale *= power_of_two(exponent_of(tl.load(largest_ptr)))
    elif BACKWARD:
        scale *= finite_or_nan(tl.load(largest_ptr))
    if MEAN:
        scale /= tl.load(counted_ptr).to(tl.float32)
    store_class_gradient(grad_w_ptr, raw, along, j, out, w_ptr, inv_w, scale, c, d, w_stride_c, w_stride_d)


@triton.jit
def scale(
    # pointers
    grad_w_ptr,  # [C, D]
    factor_ptr,  # [1]
    # sizes
    size,  # C·D
    # compile time
    BLOCK: tl.constexpr,
):
    """Multiplies ∂w by an upstream gradient, and does nothing where that is 1, as it mostly is."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        factor = finite_or_nan(factor)
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            at = first + tl.arange(0, BLOCK)
            grad = tl.load(grad_w_ptr + at, mask=at < size, other=0.0)
            tl.store(grad_w_ptr + at, grad * factor, mask=at < size)
