"""Unit rows: the samples' once a call, the classes' in chunks that stay in the L2 cache.

Reads x and w once. Writes fp16 unit rows, padded with zeros to whole tiles so that the products need no masks, and the
norms. fp16 holds a unit row eight times closer than bf16 at the same speed of the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import IGNORED, NORM_EPS, is_finite, row_norm


@triton.jit(do_not_specialize=["n", "all_exact"])
def prepare_samples(
    # pointers
    x_ptr,
    target_ptr,
    unit_ptr,  # [padded N, PADDED_D], fp16 or for dense products fp32
    norm_ptr,  # [padded N], NaN where a counted row is not finite
    overflowed_ptr,  # [padded N] int32, set to all_exact
    flags_ptr,  # [FLAGS] int32, set to 0 and all_exact
    # sizes, strides
    n,
    d,
    x_stride_n,
    x_stride_d,
    all_exact,  # 0: no list has overflowed yet; 1: there are no lists
    # compile time
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PADDED_D: tl.constexpr,
    FLAGS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    i = pid * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    k = tl.arange(0, BLOCK_D).to(tl.int64)  # [BLOCK_D]
    counted = (i < n) & (tl.load(target_ptr + i, mask=i < n, other=IGNORED) != IGNORED)
    # an ignored row as zeros: whatever it holds, NaN included, must change nothing
    x = tl.load(
        x_ptr + i[:, None] * x_stride_n + k[None, :] * x_stride_d, mask=counted[:, None] & (k < d)[None, :], other=0.0
    ).to(tl.float32)
    norm = row_norm(x)
    unit = tl.where(is_finite(norm)[:, None], x / tl.maximum(norm, NORM_EPS)[:, None], 0.0)
    tl.store(
        unit_ptr + i[:, None] * PADDED_D + k[None, :], unit.to(unit_ptr.dtype.element_ty), mask=(k < PADDED_D)[None, :]
    )
    tl.store(norm_ptr + i, norm)
    tl.store(overflowed_ptr + i, tl.zeros([BLOCK_N], tl.int32) + all_exact)
    if pid == 0:
        tl.store(flags_ptr + tl.arange(0, FLAGS), tl.arange(0, FLAGS) * all_exact)


@triton.jit
def prepare_classes(
    # pointers
    w_ptr,
    unit_ptr,  # [padded chunk, PADDED_D], fp16 or for dense products fp32
    inv_norm_ptr,  # [C], NaN where the row is not finite
    flags_ptr,  # [0] set to 1 where a row is not finite
    # sizes, strides
    c,
    d,
    w_stride_c,
    w_stride_d,
    first_class,
    # compile time
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PADDED_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C] in the chunk
    j = first_class + row
    k = tl.arange(0, BLOCK_D).to(tl.int64)
    exists = j < c
    w = tl.load(
        w_ptr + j[:, None] * w_stride_c + k[None, :] * w_stride_d, mask=exists[:, None] & (k < d)[None, :], other=0.0
    ).to(tl.float32)
    norm = row_norm(w)
    finite = is_finite(norm)
    inv_norm = 1.0 / tl.maximum(norm, NORM_EPS)
    # maximum() may have dropped a NaN
    tl.store(inv_norm_ptr + j, tl.where(finite, inv_norm, float("nan")), mask=exists)
    tl.store(flags_ptr + tl.zeros_like(row), tl.full([BLOCK_C], 1, tl.int32), mask=~finite)
    # divided, not multiplied by inv_norm, which is 0 for a norm beyond 2¹²⁷
    unit = tl.where(finite[:, None], w / tl.maximum(norm, NORM_EPS)[:, None], 0.0)
    tl.store(
        unit_ptr + row[:, None] * PADDED_D + k[None, :],
        unit.to(unit_ptr.dtype.element_ty),
        mask=(k < PADDED_D)[None, :],
    )
