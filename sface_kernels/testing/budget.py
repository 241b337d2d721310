"""What the errors of a backend may be: the rule of the tests, on the mean loss and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..loss import sface_loss
from .published import reference as published_loss
from .truth import Errors, Truth, measure_errors

# Backends whose loss takes the cosines of dropped pairs from a 16-bit screen: 6 % of those terms (docs/math.md, 3).
SCREENED = {"native": 0.06, "triton": 0.06}
MULTIPLIES_IN_HALF = ("triton",)  # backends that multiply half embeddings as they are
HALF = (torch.float16, torch.bfloat16)


def package_errors(truth: Truth, x: Tensor, w: Tensor, y: Tensor, backend: str, filter_eps: float) -> Errors:
    """Of the mean loss and its gradients, rows with a negative class ignored."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = sface_loss(x, w, y, ignore_index=-1, filter_eps=filter_eps, backend=backend)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    return measure_errors(truth, loss.detach(), x.grad, w.grad)


def has_reference(backend: str, dtype: torch.dtype) -> bool:
    """The reference cannot be judged by its own error; in float64 the truth rounds like what it judges."""
    return backend != "reference" and dtype != torch.float64


def limits(truth: Truth, reference: Errors | None, x: Tensor, w: Tensor, y: Tensor, backend: str) -> Errors:
    """What a backend's errors may be: twice the reference's in the same dtype and one rounding of each cosine,
    angle and term, and the share of the loss that a screen may move. Without a reference, what `truth.rounding` counts
    and one rounding of ∂x as it is stored.

    Where a backend multiplies half embeddings as they are, it may also err as the published arithmetic under autocast,
    which is what such a training has now, with the roundings of the half dtype.
    """
    if reference is None:
        return truth.rounding._replace(grad_x=truth.rounding.grad_x + torch.finfo(x.dtype).eps / 2)
    allowed = Errors(*[2 * (own + rounding) for own, rounding in zip(reference, truth.rounding, strict=True)])
    allowed = allowed._replace(loss=allowed.loss + SCREENED.get(backend, 0.0) * truth.dropped_loss)
    if x.dtype in HALF and backend in MULTIPLIES_IN_HALF:
        allowed = Errors(*map(max, allowed, _half_budget(truth, x, w, y)))
    return allowed


def _half_budget(truth: Truth, x: Tensor, w: Tensor, y: Tensor) -> Errors:
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
    return Errors(*[2 * (e + coarser * r) if e == e else r for e, r in zip(errors, truth.rounding, strict=True)])
