"""Equations (2)–(4) as Triton functions, all in fp32, and what the kernels that multiply share.

The same polynomials as `csrc/cpu/simd/generic/device_math.inl`. No libdevice call: the interpreter has none, and these
cost fewer instructions. Products round unit rows and coefficients to fp16, or with SPLIT make two fp16 numbers of each.
Sums, arccos and sigmoid are fp32 always.

A compiler may fuse any product and sum into one rounding, and a GPU's division is off by an ulp or two: nothing may
depend on v − v being 0, or on (1/v)·v being 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .... import types

PI: tl.constexpr = tl.constexpr(3.14159265358979323846)
LOG2E: tl.constexpr = tl.constexpr(1.44269504088896340736)
NORM_EPS: tl.constexpr = tl.constexpr(types.NORM_EPS)
NO_COSINE: tl.constexpr = tl.constexpr(-2.0)  # marks own classes and classes past the last; below every cosine
NO_CLASS: tl.constexpr = tl.constexpr(2**31 - 1)
IGNORED: tl.constexpr = tl.constexpr(types.IGNORED)
INVALID: tl.constexpr = tl.constexpr(types.INVALID)
NO_TARGET: tl.constexpr = tl.constexpr(types.NO_TARGET)
# Unit rows are multiplied with it before they are split, so that what fp16 leaves out is no subnormal number.
SPLIT_SCALE: tl.constexpr = tl.constexpr(2.0**8)
SPLIT_EXPONENT: tl.constexpr = tl.constexpr(8)


@triton.jit
def arccos(c):
    """(2) on [-1, 1], within 2 ulp of π. asin by a series where |c| ≤ 1/2, else through √((1 − |c|)/2)."""
    a = tl.abs(c)
    far = a > 0.5
    square = tl.where(far, (1.0 - a) * 0.5, c * c)
    root = tl.where(far, tl.sqrt(square), c)
    series = square * 4.2163199048e-2 + 2.4181311049e-2
    series = series * square + 4.5470025998e-2
    series = series * square + 7.4953002686e-2
    series = series * square + 1.6666752422e-1
    asin = root + root * (series * square)
    return tl.where(far, tl.where(c > 0, 2.0 * asin, PI - 2.0 * asin), PI * 0.5 - asin)


@triton.jit
def sigmoid_of_angle(theta, slope, centre):
    """sigmoid(slope·(centre − θ)): (4) without s, and (3) with a negative slope."""
    d = 1.0 + tl.exp2(tl.minimum((theta - centre) * (slope * LOG2E), 126.0))
    root = tl.rsqrt(d)
    about = root * root
    # where most pairs are active rsqrt's error is the same in every weight: one step of Newton's takes it away
    return about + about * (1.0 - d * about)


@triton.jit
def inter_weight_below(c, k_inter, b):
    """(4) without s where it is at most 2⁻¹⁰ and c at most 0.26; 0 at NO_COSINE.

    The exponent k(asin c + b − π/2) by a polynomial, c + c³·… + c⁵·… minimax on |c| ≤ 0.26, off by less than k·1.1e-7
    there, and 1/(1 + 1/e) by e − e². Where c is more negative than the polynomial is good for, the weight is below
    2⁻⁶⁰ (`plan.threshold_of` sees to it).
    """
    slope = k_inter * LOG2E
    square = c * c
    t = square * (slope * 7.97555126e-2) + slope * 1.66553201e-1
    t = t * square + slope
    e = tl.exp2(t * c + slope * (b - PI * 0.5))
    return e - e * e


@triton.jit
def load_sums(sums_ptr, best_class_ptr, at, plane, mask):
    """What samples summed over a stripe of classes, planes that stand `plane` apart; nothing outside the mask."""
    inter = tl.load(sums_ptr + at, mask=mask, other=0.0)
    dropped = tl.load(sums_ptr + plane + at, mask=mask, other=0.0)
    cos_sum = tl.load(sums_ptr + 2 * plane + at, mask=mask, other=0.0)
    best = tl.load(sums_ptr + 3 * plane + at, mask=mask, other=NO_COSINE)
    return inter, dropped, cos_sum, best, tl.load(best_class_ptr + at, mask=mask, other=-1)


@triton.jit
def nearer_class(best, best_class, cos, first, column, BLOCK_C: tl.constexpr):
    """The larger of `best` `[N]` and each row of `cos` `[N, BLOCK_C]`, and its class, the lowest of equals."""
    nearest = tl.max(cos, 1)
    place = tl.min(tl.where(cos == nearest[:, None], column[None, :], BLOCK_C), 1)
    best_class = tl.where(nearest > best, (first + place).to(tl.int32), best_class)
    return tl.maximum(best, nearest), best_class


@triton.jit
def is_finite(v):
    """False for NaN and infinities. Not v − v = 0: where v is a product a GPU fuses that into its rounding error."""
    return tl.abs(v) < float("inf")


@triton.jit
def finite_or_nan(u):
    """An upstream gradient as it is to be for all classes: 0·NaN is NaN, 0·∞ is not everywhere."""
    return tl.where(is_finite(u), u, float("nan"))


@triton.jit
def power_of_two(exponent):
    """2^exponent for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(value):
    """floor(log2(value)) of positive normal numbers, -126 below them, 126 at most."""
    return tl.minimum(tl.maximum((value.to(tl.int32, bitcast=True) >> 23) - 127, -126), 126)


@triton.jit
def sums_with_one_trip(row_max):
    """`row_max` `[R]` unchanged, through a loop that runs once.

    Reducing a reduced tensor-core accumulator again crashes Triton ≤ 3.7.1 on sm_100; behind a loop it compiles. Its
    bound must be unknown to the compiler: num_programs(1) is always 1 here and never made a constant.
    """
    result = row_max
    for _ in range(0, tl.num_programs(1)):
        result = tl.maximum(result, row_max)
    return result


@triton.jit
def store_operand(ptr, second, values, mask, SPLIT: tl.constexpr):
    """Stores a factor of products in its dtype; SPLIT: what fp16 leaves out of it too, `second` further on."""
    stored = values.to(ptr.dtype.element_ty)
    tl.store(ptr, stored, mask=mask)
    if SPLIT:
        tl.store(ptr + second, (values - stored.to(tl.float32)).to(tl.float16), mask=mask)


@triton.jit
def load_operand(ptr, second, mask, SPLIT: tl.constexpr):
    """What `store_operand` stored, zeros outside the mask: twice the same where it was not split."""
    other = None if mask is None else 0.0
    values = tl.load(ptr, mask=mask, other=other)
    rest = values
    if SPLIT:
        rest = tl.load(ptr + second, mask=mask, other=other)
    return values, rest


@triton.jit
def product(a, a_rest, b, b_rest, acc, SPLIT: tl.constexpr):
    """acc + a·b; of what is split without a_rest·b_rest, which is below 2⁻²² of it."""
    if SPLIT:
        acc = tl.dot(a_rest, b, acc)
        acc = tl.dot(a, b_rest, acc)
    return tl.dot(a, b, acc, out_dtype=acc.dtype)


@triton.jit
def cosine_tile(
    unit_x, unit_w, first_x, first_w, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PADDED_D: tl.constexpr, SPLIT: tl.constexpr, INT8: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(1) `[BLOCK_N, BLOCK_C]` from padded unit rows, not clamped; with INT8 its products of whole numbers."""
    PARTS: tl.constexpr = 2 if SPLIT else 1
    if not TMA:
        k = tl.arange(0, BLOCK_K)
        x_row = (first_x + tl.arange(0, BLOCK_N)).to(tl.int64)
        w_row = (first_w + tl.arange(0, BLOCK_C)).to(tl.int64)
        x_tile = unit_x + x_row[:, None] * (PARTS * PADDED_D) + k[None, :]
        w_tile = unit_w + w_row[None, :] * (PARTS * PADDED_D) + k[:, None]
    cos = tl.zeros([BLOCK_N, BLOCK_C], tl.int32 if INT8 else tl.float32)
    for first in range(0, PADDED_D, BLOCK_K):
        if TMA:
            x = unit_x.load([first_x, first])
            w = unit_w.load([first_w, first]).T
            x_rest, w_rest = x, w
            if SPLIT:
                x_rest = unit_x.load([first_x, first + PADDED_D])
                w_rest = unit_w.load([first_w, first + PADDED_D]).T
        else:
            x, x_rest = load_operand(x_tile + first, PADDED_D, None, SPLIT)
            w, w_rest = load_operand(w_tile + first, PADDED_D, None, SPLIT)
        if PARTS == 2:
            # a sum of its own for each step: a tensor core cuts off what it adds to a long one
            cos += product(x, x_rest, w, w_rest, tl.zeros_like(cos), SPLIT)
        else:
            cos = product(x, x_rest, w, w_rest, cos, SPLIT)
    return cos * (1.0 / (SPLIT_SCALE * SPLIT_SCALE)) if PARTS == 2 else cos


@triton.jit
def inverse_norm(norm):
    """1/max(‖x‖, 1e-12), 0 where the row is not finite: what it touches becomes NaN elsewhere."""
    return tl.where(is_finite(norm), 1.0 / tl.maximum(norm, NORM_EPS), 0.0)


@triton.jit
def class_gradient_of(raw, along, w, inv_w, scale):
    """(8) from its two sums, times `scale`: the tangent part of `raw`, divided by the norm."""
    return (raw - along[:, None] * (w * inv_w[:, None])) * (inv_w * scale)[:, None]


@triton.jit
def tangent_only(along, inv_w):
    """What is to be projected away: nothing where the norm is below NORM_EPS, as normalize divides by a constant there.
    1/NORM_EPS may be off by some ulps."""
    return tl.where(inv_w * NORM_EPS > 0.999999, 0.0, along)


@triton.jit
def store_class_gradient(grad_w_ptr, raw, along, j, out, w_ptr, inv_w, scale, c, d, w_stride_c, w_stride_d):
    """Stores (8) in the weight's dtype."""
    mask = (j < c)[:, None] & (out < d)[None, :]
    along = tangent_only(along, inv_w)
    # most classes have no pair, and nothing to project: their rows of w are not read
    w = tl.load(
        w_ptr + j[:, None] * w_stride_c + out[None, :] * w_stride_d, mask=mask & (along != 0)[:, None], other=0.0
    ).to(tl.float32)
    grad = class_gradient_of(raw, along, w, inv_w, scale)
    tl.store(grad_w_ptr + j[:, None] * d + out[None, :], grad.to(grad_w_ptr.dtype.element_ty), mask=mask)
