"""The one autograd Function behind every backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import BACKENDS
from .types import IGNORED, HyperParameters


class _RaiseOnSecondBackward(torch.autograd.Function):
    """Identity whose backward raises; once_differentiable does not where the upstream gradient is a constant."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError("sface_loss: differentiable once, its gradient was differentiated again")


def _raise_if_differentiated(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else _RaiseOnSecondBackward.apply(grad.requires_grad_())


class SFaceRowLoss(torch.autograd.Function):
    """Row losses `[N]` of equation (5), differentiable in the embeddings and the weight; beside them row statistics
    `[6, N]` (`types.RowStats`) and counts `[2]` (`types.Forward`).

    A backend's forward leaves ∂l_i/∂x_i complete, as the coefficients of (6) are constants; the upstream gradient
    u_i enters only in the backward, per row, so any reduction and any number of backward calls are right.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        target: Tensor,
        backend: str,
        hp: HyperParameters,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # needs_input_grad does not know of no_grad, and inside forward grad mode is always off
        need_x, need_w = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        # the products below choose their own precision
        with torch.autocast(embeddings.device.type, enabled=False):
            result = BACKENDS[backend].forward(embeddings, weight, target, hp, need_x, need_w)
        ctx.backend, ctx.hp, ctx.x_dtype = backend, hp, embeddings.dtype
        row_grad_x = result.row_grad_x if need_x else None
        for_weight = (embeddings, weight, *result.saved) if need_w else (None, None)
        ctx.save_for_backward(target, row_grad_x, *for_weight)
        ctx.mark_non_differentiable(result.row_stats, result.counts)
        ctx.set_materialize_grads(False)
        return result.row_loss, result.row_stats, result.counts

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grad_x, grad_w = SFaceRowLoss._gradients(ctx, grad_row)
        if torch.is_grad_enabled():  # create_graph=True
            grad_x, grad_w = _raise_if_differentiated(grad_x), _raise_if_differentiated(grad_w)
        return grad_x, grad_w, None, None, None, None

    @staticmethod
    def _gradients(ctx: Any, grad_row: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        need_x, need_w = ctx.needs_input_grad[:2]
        if grad_row is None:
            return None, None
        target, row_grad_x, embeddings, weight, *saved = ctx.saved_tensors
        # 0 · NaN is NaN: an ignored row's upstream gradient must not be multiplied by its zeros
        grad_row = torch.where(target == IGNORED, 0, grad_row)
        grad_x = grad_w = None
        with torch.autocast(grad_row.device.type, enabled=False):
            if need_x:
                grad_x = (row_grad_x * grad_row.unsqueeze(1)).to(ctx.x_dtype)  # [N, D], (7)
            if need_w:
                grad_w = BACKENDS[ctx.backend].grad_weight(
                    embeddings, weight, target, ctx.hp, grad_row, tuple(saved)
                )  # [C, D], (8)
                grad_w = grad_w.to(weight.dtype)
        return grad_x, grad_w
