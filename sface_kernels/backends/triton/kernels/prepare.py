"""Unit rows: the samples' and, in chunks that stay in the L2 cache, the classes'. One launch makes both.

Reads x and w once. Writes fp16 unit rows, padded with zeros to whole tiles so that the products need no masks, and the
norms. fp16 holds a unit row eight times closer than bf16 at the same speed of the tensor cores. A row with NaN or
infinity becomes one of NaN, which every sum of its cosines then is: that is how the other kernels learn of it. For a
screen in int8 (`plan.screens_int8`) rows are whole numbers, and the step between two of them is NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    IGNORED,
    INVALID,
    NO_TARGET,
    NORM_EPS,
    SPLIT_SCALE,
    exponent_of,
    is_finite,
    power_of_two,
    store_operand,
)

LABELS: tl.constexpr = tl.constexpr(1024)  # that the count of samples takes at a time

# 1.5·2²³, whose last bit is worth 1: added to a number, the last byte of the sum is the number rounded, in int8.
TO_WHOLE: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def rounded_to_int8(rows, to_unit, largest):
    """Rows `[R, D]`, of length 1 times `to_unit` `[R]`, in steps of 1/127 of their entry `largest`: int8.

    Returns the steps `[R]` too, NaN where the row is not finite, and how far rounding moves a unit row at most.
    """
    # no entry of a row of length 1 and at most 4096 features is the largest below 1/64
    step = tl.maximum(largest * to_unit, 1.0 / 64) * (1.0 / 127)
    exact = rows * (to_unit / step)[:, None]
    whole = exact + TO_WHOLE
    lost = exact - (whole - TO_WHOLE)
    # upwards: fp32 may be off by D·2⁻²⁴ of it in the sum of squares, and by some 2⁻²² of the row in exact
    moved = tl.sqrt(tl.sum(lost * lost, 1)) * step * 1.001 + 2.0**-20
    finite = is_finite(to_unit)
    whole = whole.to(tl.int32, bitcast=True).to(tl.int8)  # its last byte
    return whole, tl.where(finite, step, float("nan")), tl.max(tl.where(finite, moved, 0.0), 0)


@triton.jit
def store_unit_rows(
    ptr, row, taken, stride_row, stride_column, unit_ptr, unit_row, step_ptr, moved_ptr, block, d,
    BLOCK_D: tl.constexpr, PADDED_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Unit rows of `row` `[R]` into `unit_row`, zeros where not taken. Returns norms, and 1/max(norm, 1e-12) or NaN.

    Scaled by a power of two near the largest entry, so that no square leaves fp32's range, and then by one reciprocal.
    """
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    at = ptr + row[:, None] * stride_row + k[None, :] * stride_column
    rows = tl.load(at, mask=taken[:, None] & (k < d)[None, :], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(rows), 1)  # [R]
    exponent = exponent_of(largest)
    to_unit = power_of_two(-exponent)
    scaled = rows * to_unit[:, None]
    length = tl.sqrt(tl.sum(scaled * scaled, 1))
    norm = length * power_of_two(exponent)
    # maximum() may drop a NaN; 1/norm itself is 0 for a norm beyond 2¹²⁷
    inverse = tl.where(is_finite(norm), 1.0 / tl.maximum(length, to_unit * NORM_EPS), float("nan"))
    stored = inverse
    if SPLIT:
        stored *= SPLIT_SCALE
    unit_at = unit_ptr + unit_row[:, None] * (2 * PADDED_D if SPLIT else PADDED_D) + k[None, :]
    in_row = (k < PADDED_D)[None, :]
    if unit_ptr.dtype.element_ty == tl.int8:
        unit, step, moved = rounded_to_int8(scaled, inverse, largest * to_unit)
        tl.store(step_ptr + unit_row, step)
        tl.store(moved_ptr + block, moved)
        tl.store(unit_at, unit, mask=in_row)
    else:
        store_operand(unit_at, PADDED_D, scaled * stored[:, None], in_row, SPLIT)
    return norm, inverse * to_unit


@triton.jit(do_not_specialize=["n", "sample_blocks", "ignore_index", "no_target"])
def prepare(
    # pointers
    x_ptr,
    label_ptr,  # [N] int64 or int32
    target_ptr,  # [N] int64: the label, or its code of types
    unit_x_ptr,  # [padded N, parts, PADDED_D], fp16 or int8: two parts with SPLIT, else one
    step_x_ptr,  # with int8 unit rows [padded N], the step of each
    moved_x_ptr,  # with int8 unit rows, how far rounding moves one of every BLOCK rows at most
    norm_ptr,  # [padded N], NaN or infinite where a counted row is not finite
    counts_ptr,  # [2] int64, set to 0
    counted_ptr,  # [] int64: samples that are not ignored, at least 1
    flags_ptr,  # [2] int32, set to 0
    w_ptr,
    unit_w_ptr,  # [padded chunk, parts, PADDED_D]
    step_w_ptr,  # [padded chunk], as of x
    moved_w_ptr,
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
    ignore_index,  # the label of ignored samples
    no_target,  # the label of samples whose class is elsewhere, unless it is ignore_index
    # compile time
    BLOCK: tl.constexpr,  # rows
    BLOCK_D: tl.constexpr,
    PADDED_D: tl.constexpr,
    SPLIT: tl.constexpr,  # unit rows are two parts
    LINKS: tl.constexpr,
):
    pid = tl.program_id(0)
    row = tl.arange(0, BLOCK).to(tl.int64)
    if pid < sample_blocks:
        i = pid.to(tl.int64) * BLOCK + row
        # an ignored row as zeros: whatever it holds, NaN included, must change nothing
        label = tl.load(label_ptr + i, mask=i < n, other=0).to(tl.int64)
        ignored = label == ignore_index
        code = tl.where((label >= 0) & (label < c), label, tl.where(label == no_target, NO_TARGET, INVALID))
        tl.store(target_ptr + i, tl.where(ignored, IGNORED, code), mask=i < n)
        counted = (i < n) & ~ignored
        norm, _ = store_unit_rows(
            x_ptr, i, counted, x_stride_n, x_stride_d,
            unit_x_ptr, i, step_x_ptr, moved_x_ptr, pid, d, BLOCK_D, PADDED_D, SPLIT,
        )  # fmt: skip
        tl.store(norm_ptr + i, norm, mask=i < padded_n)
        if pid == 0:
            two = tl.arange(0, 2)
            tl.store(counts_ptr + two, tl.zeros([2], tl.int64))
            tl.store(flags_ptr + two, tl.zeros([2], tl.int32))
            if not LINKS:
                tl.store(head_ptr, -1)
            found = tl.zeros([LABELS], tl.int64)
            for first in range(0, n, LABELS):
                at = first + tl.arange(0, LABELS).to(tl.int64)
                seen = tl.load(label_ptr + at, mask=at < n, other=0).to(tl.int64)
                found += ((at < n) & (seen != ignore_index)).to(tl.int64)
            tl.store(counted_ptr, tl.maximum(tl.sum(found, 0), 1))
    else:
        block = pid - sample_blocks
        row += block.to(tl.int64) * BLOCK  # in the chunk
        j = first_class + row
        _, inv_norm = store_unit_rows(
            w_ptr, j, j < c, w_stride_c, w_stride_d,
            unit_w_ptr, row, step_w_ptr, moved_w_ptr, block, d, BLOCK_D, PADDED_D, SPLIT,
        )  # fmt: skip
        tl.store(inv_norm_ptr + j, inv_norm, mask=j < c)
        if LINKS:
            tl.store(head_ptr + j, tl.full([BLOCK], -1, tl.int32), mask=j < c)
