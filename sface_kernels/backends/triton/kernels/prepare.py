"""Unit rows: the samples' and, in chunks that stay in the L2 cache, the classes'. One launch makes both.

Reads x and w once. Writes fp16 unit rows, padded with zeros to whole tiles so that the products need no masks, and the
norms. fp16 holds a unit row eight times closer than bf16 at the same speed of the tensor cores. A row with NaN or
infinity becomes one of NaN, which every sum of its cosines then is: that is how the other kernels learn of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import IGNORED, NORM_EPS, SPLIT_SCALE, exponent_of, is_finite, power_of_two, store_operand


@triton.jit
def store_unit_rows(
    ptr, row, taken, stride_row, stride_column, unit_ptr, unit_row, d, BLOCK_D: tl.constexpr, PADDED_D: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Unit rows of `row` `[R]` into `unit_row`, zeros where not taken. Returns norms, and 1/max(norm, 1e-12) or NaN.

    Scaled by a power of two near the largest entry, so that no square leaves fp32's range, and then by one reciprocal.
    """
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    at = ptr + row[:, None] * stride_row + k[None, :] * stride_column
    rows = tl.load(at, mask=taken[:, None] & (k < d)[None, :], other=0.0).to(tl.float32)
    exponent = exponent_of(tl.max(tl.abs(rows), 1))  # [R]
    to_unit = power_of_two(-exponent)
    scaled = rows * to_unit[:, None]
    length = tl.sqrt(tl.sum(scaled * scaled, 1))
    norm = length * power_of_two(exponent)
    # maximum() may drop a NaN; 1/norm itself is 0 for a norm beyond 2¹²⁷
    inverse = tl.where(is_finite(norm), 1.0 / tl.maximum(length, to_unit * NORM_EPS), float("nan"))
    stored = inverse
    if PARTS == 2:
        stored *= SPLIT_SCALE
    unit_at = unit_ptr + unit_row[:, None] * (PARTS * PADDED_D) + k[None, :]
    store_operand(unit_at, PADDED_D, scaled * stored[:, None], (k < PADDED_D)[None, :], PARTS == 2)
    return norm, inverse * to_unit


@triton.jit(do_not_specialize=["n", "sample_blocks"])
def prepare(
    # pointers
    x_ptr,
    target_ptr,
    unit_x_ptr,  # [padded N, PARTS, PADDED_D], fp16, or fp32 where products are of that
    norm_ptr,  # [padded N], NaN or infinite where a counted row is not finite
    counts_ptr,  # [2] int64, set to 0
    flags_ptr,  # [2] int32, set to 0
    w_ptr,
    unit_w_ptr,  # [padded chunk, PARTS, PADDED_D]
    inv_norm_ptr,  # [C], NaN where the row is not finite
    head_ptr,  # [C] int32, set to −1: no class has a link; without LINKS only its one element
    # sizes, strides
    n,
    c,
    d,
    padded_n,
    x_stride_n,
    x_stride_d,
    w_stride_c,
    w_stride_d,
    sample_blocks,  # programs that take samples: 0 in all chunks but the first
    first_class,
    # compile time
    BLOCK: tl.constexpr,  # rows
    BLOCK_D: tl.constexpr,
    PADDED_D: tl.constexpr,
    PARTS: tl.constexpr,  # 2 for dense products of split unit rows
    LINKS: tl.constexpr,
):
    pid = tl.program_id(0)
    row = tl.arange(0, BLOCK).to(tl.int64)
    if pid < sample_blocks:
        i = pid.to(tl.int64) * BLOCK + row
        # an ignored row as zeros: whatever it holds, NaN included, must change nothing
        counted = (i < n) & (tl.load(target_ptr + i, mask=i < n, other=IGNORED) != IGNORED)
        norm, _ = store_unit_rows(x_ptr, i, counted, x_stride_n, x_stride_d, unit_x_ptr, i, d, BLOCK_D, PADDED_D, PARTS)
        tl.store(norm_ptr + i, norm, mask=i < padded_n)
        if pid == 0:
            two = tl.arange(0, 2)
            tl.store(counts_ptr + two, tl.zeros([2], tl.int64))
            tl.store(flags_ptr + two, tl.zeros([2], tl.int32))
            if not LINKS:
                tl.store(head_ptr, -1)
    else:
        row += (pid - sample_blocks).to(tl.int64) * BLOCK  # in the chunk
        j = first_class + row
        _, inv_norm = store_unit_rows(
            w_ptr, j, j < c, w_stride_c, w_stride_d, unit_w_ptr, row, d, BLOCK_D, PADDED_D, PARTS
        )
        tl.store(inv_norm_ptr + j, inv_norm, mask=j < c)
        if LINKS:
            tl.store(head_ptr + j, tl.full([BLOCK], -1, tl.int32), mask=j < c)
