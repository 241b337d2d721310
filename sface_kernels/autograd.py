"""The one autograd Function behind every backend, and the function that calls it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from . import verify
from .types import IGNORED, HyperParameters


class _RaiseOnSecondBackward(torch.autograd.Function):
    """Identity on a gradient, whose own backward raises. What the gradient was computed from comes along, so that there
    is a graph to walk where the upstream gradient is a constant too; once_differentiable has none there."""

    @staticmethod
    def forward(grad: Tensor, *computed_from: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError("sface_loss: differentiable once, its gradient was differentiated again")


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The products of a backend choose their own precision. Devices such as meta have no autocast to turn off."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class _RowLoss(torch.autograd.Function):
    """A backend's `types.Forward` as a flat tuple, of which the row losses are differentiable.

    A backend's forward leaves ∂l_i/∂x_i complete, as the coefficients of (6) are constants; the upstream gradient
    u_i enters only in the backward, per row, so any reduction and any number of backward calls are right.
    """

    @staticmethod
    def forward(
        embeddings: Tensor,
        weight: Tensor,
        target: Tensor,
        backend: str,
        hp: HyperParameters,
        need_x: bool,
        need_w: bool,
        strict: bool,
    ) -> tuple[Tensor, ...]:
        with _without_autocast(embeddings.device):
            *results, saved = verify.forward(backend, embeddings, weight, target, hp, need_x, need_w)
        return (*results, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        embeddings, weight, target, ctx.backend, ctx.hp, ctx.need_x, ctx.need_w, ctx.strict = inputs
        _, _, _, row_grad_x, *saved = output
        for_weight = (weight, *saved) if ctx.need_w else (None,)
        ctx.save_for_backward(target, embeddings, row_grad_x if ctx.need_x else None, *for_weight)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = _RowLoss._gradients(ctx, grad_row)
        if torch.is_grad_enabled():  # create_graph=True
            _, embeddings, _, weight, *_ = ctx.saved_tensors
            grads = tuple(
                g if g is None else _RaiseOnSecondBackward.apply(g, embeddings, weight, grad_row) for g in grads
            )
        return *grads, None, None, None, None, None, None

    @staticmethod
    def _gradients(ctx: Any, grad_row: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_row is None:
            return None, None
        target, embeddings, row_grad_x, weight, *saved = ctx.saved_tensors
        # 0 · NaN is NaN: an ignored row's upstream gradient must not be multiplied by its zeros
        grad_row = torch.where(target == IGNORED, 0, grad_row)
        grad_x = grad_w = None
        with _without_autocast(grad_row.device):
            if ctx.need_x and ctx.needs_input_grad[0]:
                grad_x = (row_grad_x * grad_row.unsqueeze(1)).to(embeddings.dtype)  # [N, D], (7)
            if ctx.need_w and ctx.needs_input_grad[1]:
                grad_w = verify.grad_weight(
                    ctx.backend, embeddings, weight, target, ctx.hp, grad_row, tuple(saved), ctx.strict
                )  # [C, D], (8)
                grad_w = grad_w.to(weight.dtype)
        return grad_x, grad_w

    @staticmethod
    def vmap(info: Any, in_dims: Any, *_: Any) -> Any:
        raise RuntimeError(
            "sface_loss: torch.func.vmap cannot batch it; the rows of one call are independent, so give it all of them "
            'as embeddings [N, D] with reduction="none"'
        )


def row_losses(
    embeddings: Tensor, weight: Tensor, target: Tensor, backend: str, hp: HyperParameters, strict: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses `[N]` of equation (5), differentiable in the embeddings `[N, D]` and the weight `[C, D]`; beside them
    row statistics `[6, N]` (`types.RowStats`) and counts `[2]` (`types.Forward`).

    `target` `[N]` is what `ops.prepare_labels` makes of labels. Where `verify` finds the backend wrong, `strict`
    raises, and otherwise `chunked` takes over.
    """
    need_x, need_w = (torch.is_grad_enabled() and t.requires_grad for t in (embeddings, weight))
    others = hp, need_x, need_w, strict
    try:
        row_loss, row_stats, counts, *_ = _RowLoss.apply(embeddings, weight, target, backend, *others)
    except verify.WrongResult as error:
        if strict:
            raise
        verify.distrust(backend, error)
        row_loss, row_stats, counts, *_ = _RowLoss.apply(embeddings, weight, target, "chunked", *others)
    return row_loss, row_stats, counts
