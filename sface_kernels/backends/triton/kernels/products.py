"""What the kernels that multiply share: operands and products in a precision, and the end of ∂w.

PRECISION is that of the products: "half" rounds unit rows and coefficients to fp16; the others are `tl.dot`'s, of
unrounded fp32. Sums, arccos and sigmoid are fp32 always.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import NORM_EPS, is_finite


@triton.jit
def operand(values, PRECISION: tl.constexpr):
    return values.to(tl.float16) if PRECISION == "half" else values


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a·b. UPCAST multiplies in fp32 what is stored in fp16: the interpreter."""
    if PRECISION != "half":
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    elif UPCAST:
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def inverse_norm(norm):
    """1/max(‖x‖, 1e-12), 0 where the row is not finite: what it touches becomes NaN elsewhere."""
    return tl.where(is_finite(norm), 1.0 / tl.maximum(norm, NORM_EPS), 0.0)


@triton.jit
def store_class_gradient(
    grad_w_ptr, raw, along, j, out, w_ptr, inv_w, poison, s, upstream_scale, c, d, w_stride_c, w_stride_d
):
    """(8) from its two sums: the tangent part of `raw`, divided by the norm, in the dtype of the weight."""
    mask = (j < c)[:, None] & (out < d)[None, :]
    # below NORM_EPS normalize divides by a constant, so nothing is projected away
    along = tl.where(inv_w * NORM_EPS >= 1.0, 0.0, along)
    # most classes have no pair, and nothing to project: their rows of w are not read
    w = tl.load(
        w_ptr + j[:, None] * w_stride_c + out[None, :] * w_stride_d, mask=mask & (along != 0)[:, None], other=0.0
    ).to(tl.float32)
    grad = (raw - along[:, None] * (w * inv_w[:, None])) * (inv_w * (s / upstream_scale))[:, None]
    grad = tl.where(poison > 0, float("nan"), grad)
    tl.store(grad_w_ptr + j[:, None] * d + out[None, :], grad.to(grad_w_ptr.dtype.element_ty), mask=mask)
