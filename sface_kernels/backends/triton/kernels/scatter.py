"""∂w, equation (8), from the lists: each class adds up its links, and the samples whose list overflowed.

Reads x for the listed pairs only and writes each row of ∂w once, zeros included. The order in which the links come is
not determined, so the sums are fixed-point int64, whose order cannot matter: the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import (
    arccos,
    class_gradient_of,
    exponent_of,
    inverse_norm,
    is_finite,
    power_of_two,
    sigmoid_of_angle,
    store_class_gradient,
    tangent_only,
)

FIXED: tl.constexpr = tl.constexpr(2.0**39)  # one unit of the largest coefficient: room for 2²³ summands in 63 bits


@triton.jit
def entries(
    link, live, grad_row_ptr, grad_row_step, list_sample_ptr, list_cos_ptr, slots, k_intra, k_inter, a, b
):  # fmt: skip
    """Sample, cosine and u g / s, each `[BLOCK_C]`, of the entries at `link`, own classes' from `slots` on."""
    i = tl.load(list_sample_ptr + link, mask=live, other=0).to(tl.int64)
    cos = tl.load(list_cos_ptr + link, mask=live, other=0.0)
    own = link >= slots
    weight = sigmoid_of_angle(arccos(cos), tl.where(own, -k_intra, k_inter), tl.where(own, a, b))
    u = tl.load(grad_row_ptr + i * grad_row_step, mask=live, other=0.0)
    return i, cos, u * tl.where(own, -weight, weight)


@triton.jit
def sum_of_links(
    head, out, x_ptr, norm_ptr, grad_row_ptr, grad_row_step, links_ptr, list_sample_ptr, list_cos_ptr, d, x_stride_n,
    x_stride_d, slots, k_intra, k_inter, a, b,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Σ u g x̂ / s `[BLOCK_C, BLOCK_D]` and Σ u g cosine / s `[BLOCK_C]` of the links from `head` `[BLOCK_C]` on."""
    largest = tl.zeros([BLOCK_C], tl.float32)
    link = head
    while tl.max(link, 0) >= 0:
        live = link >= 0
        _, _, g = entries(
            link, live, grad_row_ptr, grad_row_step, list_sample_ptr, list_cos_ptr, slots, k_intra, k_inter, a, b
        )
        largest = tl.maximum(largest, tl.abs(g))
        link = tl.load(links_ptr + link, mask=live, other=-1)

    exponent = exponent_of(largest)
    to_unit, from_unit = power_of_two(-exponent), power_of_two(exponent)  # [BLOCK_C]
    raw = tl.zeros([BLOCK_C, BLOCK_D], tl.int64)
    along = tl.zeros([BLOCK_C], tl.int64)
    link, live = head, head >= 0
    later = tl.load(links_ptr + link, mask=live, other=-1)
    i, cos, g = entries(
        link, live, grad_row_ptr, grad_row_step, list_sample_ptr, list_cos_ptr, slots, k_intra, k_inter, a, b
    )
    while tl.max(link, 0) >= 0:
        live = link >= 0
        # all three loads of a turn are under way together: this link's row, the next one's entry, the one after that
        after = tl.load(links_ptr + later, mask=later >= 0, other=-1)
        later_i, later_cos, later_g = entries(
            later, later >= 0, grad_row_ptr, grad_row_step, list_sample_ptr, list_cos_ptr, slots, k_intra, k_inter, a, b
        )
        x = tl.load(
            x_ptr + i[:, None] * x_stride_n + out[None, :] * x_stride_d,
            mask=live[:, None] & (out < d)[None, :],
            other=0.0,
        ).to(tl.float32)
        unit = x * inverse_norm(tl.load(norm_ptr + i, mask=live, other=1.0))[:, None]
        scaled = tl.where(live, g * to_unit, 0.0) * FIXED
        raw += (scaled[:, None] * unit).to(tl.int64)
        along += (scaled * cos).to(tl.int64)
        link, i, cos, g = later, later_i, later_cos, later_g
        later = after
    # both factors may leave fp32's range together, not one after the other
    return raw.to(tl.float32) * (1.0 / FIXED) * from_unit[:, None], along.to(tl.float32) * (1.0 / FIXED) * from_unit


@triton.jit
def move(
    grad, at, mask, w_ptr, first_ptr, second_ptr, lr, weight_decay, keep, take, keep_second, take_second, eps,
    correction, RULE: tl.constexpr,
):  # fmt: skip
    """Moves a block of the weight and of an optimizer's state by its ∂w, `grad`; `sequence.Move` says what by.

    `at` is where the block stands in a contiguous `[C, D]`.
    """
    w = tl.load(w_ptr + at, mask=mask, other=0.0)
    if RULE == "adamw":
        first = tl.load(first_ptr + at, mask=mask, other=0.0)
        second = tl.load(second_ptr + at, mask=mask, other=0.0)
        w -= weight_decay * w
        first += take * (grad - first)
        second = keep_second * second + take_second * grad * grad
        tl.store(first_ptr + at, first, mask=mask)
        tl.store(second_ptr + at, second, mask=mask)
        step = first / (tl.sqrt(second) * correction + eps)
    else:
        step = grad + weight_decay * w
        if RULE != "sgd":
            first = keep * tl.load(first_ptr + at, mask=mask, other=0.0) + take * step
            tl.store(first_ptr + at, first, mask=mask)
            if RULE == "nesterov":
                step += keep * first
            else:
                step = first
    tl.store(w_ptr + at, w - lr * step, mask=mask)


@triton.jit(do_not_specialize=["n", "grad_row_step", "slots", "rounds"])
def scatter_classes(
    # pointers
    x_ptr,
    w_ptr,
    target_ptr,
    norm_ptr,
    inv_norm_ptr,  # [C]
    grad_row_ptr,  # [N], u, grad_row_step apart: 0 where all are the same
    largest_ptr,  # [1], max |u|, whose sign does not count
    flags_ptr,  # [2]: some samples overflowed, some are not finite
    overflowed_ptr,  # [N]
    head_ptr,  # [C], of finish_samples, which says what these hold
    links_ptr,  # [slots + N]
    list_sample_ptr,  # [slots + N]
    list_cos_ptr,  # [slots + N]
    grad_w_ptr,  # [C, D] out, without a RULE
    first_ptr,  # [C, D] state of an optimizer, as w it is moved: the momentum, or the mean of gradients
    second_ptr,  # [C, D] the mean of their squares
    # sizes, strides, floats
    n,
    c,
    d,
    x_stride_n,
    x_stride_d,
    w_stride_c,
    w_stride_d,
    grad_row_step,
    slots,
    rounds,
    s,
    k_intra,
    k_inter,
    a,
    b,
    filter_eps,
    lr,  # these by the RULE, as in sequence.Move
    weight_decay,
    keep,
    take,
    keep_second,
    take_second,
    eps,
    correction,
    # compile time
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RULE: tl.constexpr,  # "", or by which the gradient moves the weight, which is contiguous, instead of being stored
):
    """A program takes `rounds` blocks of classes, one after the other."""
    first = tl.program_id(0).to(tl.int64) * rounds * BLOCK_C
    j = first + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    feature = tl.arange(0, BLOCK_D).to(tl.int64)
    out = tl.program_id(1).to(tl.int64) * BLOCK_D + feature  # [BLOCK_D]
    any_overflow = tl.load(flags_ptr) > 0
    poison = (tl.load(flags_ptr + 1) > 0) | ~is_finite(tl.load(largest_ptr))
    scale = tl.where(poison, float("nan"), s)
    inv_w = tl.load(inv_norm_ptr + j, mask=j < c, other=0.0)
    head = tl.load(head_ptr + j, mask=j < c, other=-1)
    for _ in range(rounds):
        exists = j < c
        at, mask = j[:, None] * d + out[None, :], exists[:, None] & (out < d)[None, :]
        # the next block's are under way while this one is written
        later = j + BLOCK_C
        later_inv_w = tl.load(inv_norm_ptr + later, mask=later < c, other=0.0)
        later_head = tl.load(head_ptr + later, mask=later < c, other=-1)
        if (tl.max(head, 0) >= 0) | any_overflow:
            raw, along = sum_of_links(
                head, out, x_ptr, norm_ptr, grad_row_ptr, grad_row_step, links_ptr, list_sample_ptr, list_cos_ptr, d,
                x_stride_n, x_stride_d, slots, k_intra, k_inter, a, b, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            for i in range(0, tl.where(any_overflow, n, 0)):
                if tl.load(overflowed_ptr + i) > 0:
                    x_row = x_ptr + (tl.zeros_like(feature) + i) * x_stride_n  # [BLOCK_D]
                    inv_x = inverse_norm(tl.load(norm_ptr + i))
                    cos = tl.zeros([BLOCK_C], tl.float32)
                    for begin in range(0, d, BLOCK_D):
                        k = begin + feature
                        x = tl.load(x_row + k * x_stride_d, mask=k < d, other=0.0).to(tl.float32)
                        w = tl.load(
                            w_ptr + j[:, None] * w_stride_c + k[None, :] * w_stride_d,
                            mask=exists[:, None] & (k < d)[None, :],
                            other=0.0,
                        ).to(tl.float32)
                        cos += tl.sum(w * (x * inv_x)[None, :], 1)
                    cos = tl.minimum(tl.maximum(cos * inv_w, -1.0), 1.0)
                    theta = arccos(cos)
                    weight = sigmoid_of_angle(theta, k_inter, b)
                    g = tl.where(weight >= filter_eps, weight, 0.0)
                    g = tl.where(j == tl.load(target_ptr + i), -sigmoid_of_angle(theta, -k_intra, a), g)
                    g *= tl.load(grad_row_ptr + i * grad_row_step)
                    x = tl.load(x_row + out * x_stride_d, mask=out < d, other=0.0).to(tl.float32)
                    along += g * cos
                    raw += g[:, None] * (x * inv_x)[None, :]
            if RULE == "":
                store_class_gradient(grad_w_ptr, raw, along, j, out, w_ptr, inv_w, scale, c, d, w_stride_c, w_stride_d)
            else:
                w = tl.load(w_ptr + at, mask=mask, other=0.0)
                grad = class_gradient_of(raw, tangent_only(along, inv_w), w, inv_w, scale)
        else:
            # 0, or NaN where the row or a sample is not finite
            grad = tl.zeros([BLOCK_C, BLOCK_D], tl.float32) + (inv_w * 0.0 * scale)[:, None]
            if RULE == "":
                tl.store(grad_w_ptr + at, grad.to(grad_w_ptr.dtype.element_ty), mask=mask)
        if RULE != "":
            move(
                grad, at, mask, w_ptr, first_ptr, second_ptr, lr, weight_decay, keep, take,
                keep_second, take_second, eps, correction, RULE,
            )  # fmt: skip
        j, inv_w, head = later, later_inv_w, later_head
