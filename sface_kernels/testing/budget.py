"""What the errors of a backend may be: the rule of the tests, on the mean loss and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss import sface_loss
from .published import reference as published_loss
from .truth import Errors, Truth, measure_errors

# Backends whose loss takes the cosines of dropped pairs from a 16-bit screen: 6 % of those terms (docs/math.md, 3).
SCREENED = {"native": 0.06, "triton": 0.06}
HALF_PRODUCTS = ("triton",)  # backends that multiply half embeddings as they are
HALF = (torch.float16, torch.bfloat16)


def budget(truth: Truth, reference: Errors, backend: str) -> Errors:
    """What a backend's errors may be: twice the reference's in the same dtype and one rounding of each cosine,
    angle and term, and the share of the loss that a screen may move."""
    doubled = [2 * (own + rounding) for own, rounding in zip(reference, truth.rounding, strict=True)]
    return Errors(doubled[0] + SCREENED.get(backend, 0.0) * truth.dropped_loss, doubled[1], doubled[2])


def package_errors(truth: Truth, x: Tensor, w: Tensor, y: Tensor, backend: str, filter_eps: float) -> Errors:
    """Of the mean loss and its gradients, rows with a negative class ignored."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = sface_loss(x, w, y, ignore_index=-1, filter_eps=filter_eps, backend=backend)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    return measure_errors(truth, loss.detach(), x.grad, w.grad)


def half_budget(truth: Truth, x: Tensor, w: Tensor, y: Tensor) -> Errors:
    """`budget` for products of half embeddings as they are: the reference is then the published arithmetic under
    autocast, which is what such a training has now, and the roundings are those of the half dtype."""
    counted = y >= 0
    if not bool(counted.any()):
        return truth.rounding
    rows, w = x[counted].detach().requires_grad_(), w.detach().requires_grad_()
    with torch.autocast(x.device.type, x.dtype):
        loss = published_loss(rows, w, y[counted]).loss
    loss.backward()
    assert rows.grad is not None and w.grad is not None
    grad_x = torch.zeros_like(x)
    grad_x[counted] = rows.grad
    errors = measure_errors(truth, loss.detach(), grad_x, w.grad)
    coarser = torch.finfo(x.dtype).eps / torch.finfo(torch.float32).eps
    # the published arithmetic has no clamp: where it gives no number it sets no limit
    return Errors(
        *[2 * (own + coarser * r) if own == own else r for own, r in zip(errors, truth.rounding, strict=True)]
    )
