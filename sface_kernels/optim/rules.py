"""The two rules: `torch.optim`'s arguments and state; the update in C++, in Triton or by `torch.optim`'s functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ..pages import in_huge_pages
from ..pending import WeightGradient
from .base import HeadOptimizer, native_arguments, weight_of


def _zeros_like(weight: Tensor) -> Tensor:
    return in_huge_pages(torch.empty_like(weight)).zero_()


class HeadSGD(HeadOptimizer, torch.optim.SGD):  # type: ignore[override]
    """`torch.optim.SGD` for a head's weight, without ∂w.

    Args:
        head: an `SFaceLoss`, a `distributed.ClassParallelSFaceLoss`, or the head of `compat.official` or
            `compat.partial_fc`. Making the optimizer is the switch: from now on the head's gradient waits here.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
        max_norm: clip the gradient to this 2-norm before each step (one more pass over the lists), as
            `torch.nn.utils.clip_grad_norm_` on the head alone does. No part of `state_dict()`.

    Raises:
        TypeError, ValueError: an argument is off.
    """

    def __init__(
        self,
        head: nn.Module,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__([weight_of(head)], lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._attach(head, max_norm)

    def _move(self, group: dict[str, Any], gradients: list[WeightGradient]) -> None:
        weight, rows, buffer, dampening = self._weight, self._rows, None, group["dampening"]
        if group["momentum"] != 0:
            state = self.state[weight]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = _zeros_like(weight)
                dampening = 0  # the first gradient becomes the buffer
            buffer = self._state_rows("momentum_buffer")
        rule: dict[str, Any] = {
            "lr": float(group["lr"]),
            "momentum": float(group["momentum"]),
            "dampening": float(dampening),
            "weight_decay": float(group["weight_decay"]),
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
        }
        moved = [rows] if buffer is None else [rows, buffer]
        if self._goes_native(gradients, *moved):
            torch.ops.sface.native_sgd_step(rows, buffer, *native_arguments(gradients), **rule)
            torch.autograd.graph.increment_version(moved)
            return
        if self._goes_triton(gradients, *moved):
            name = "sgd" if buffer is None else "nesterov" if rule["nesterov"] else "momentum"
            numbers = {
                "keep": rule["momentum"],
                "take": 1 - rule["dampening"],
                "sign": -1.0 if rule["maximize"] else 1.0,
            }
            gradients[0].move(name, lr=rule["lr"], weight_decay=rule["weight_decay"], first=buffer, **numbers)
            torch.autograd.graph.increment_version(moved)
            return
        for (first, end), gradient in self._ranges():
            part = None if buffer is None else buffer[first:end]
            sgd([rows[first:end]], [gradient], [part], foreach=False, **rule)


class HeadAdamW(HeadOptimizer, torch.optim.AdamW):  # type: ignore[override]
    """`torch.optim.AdamW` for a head's weight, without ∂w. Give the head `filter_eps=0`, as for any Adam.

    Args:
        head: as in `HeadSGD`.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`; there is no amsgrad.
        max_norm: as in `HeadSGD`.

    Raises:
        TypeError, ValueError: an argument is off, or a loaded state has amsgrad.
        RuntimeError: a step is captured in a CUDA graph.
    """

    def __init__(
        self,
        head: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
    ) -> None:
        super().__init__([weight_of(head)], lr, betas, eps, weight_decay, maximize=maximize)
        self._attach(head, max_norm)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("state_dict: expected one without amsgrad, which HeadAdamW does not have")
        super().load_state_dict(state_dict)

    def _move(self, group: dict[str, Any], gradients: list[WeightGradient]) -> None:
        weight, rows, state = self._weight, self._rows, self.state[self._weight]
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():  # torch.optim.AdamW refuses it too
            raise RuntimeError("HeadAdamW: a CUDA graph would repeat the bias corrections of the step that it captures")
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = _zeros_like(weight), _zeros_like(weight)
        mean, square = self._state_rows("exp_avg"), self._state_rows("exp_avg_sq")
        rule: dict[str, Any] = {
            "lr": float(group["lr"]),
            "beta1": float(group["betas"][0]),
            "beta2": float(group["betas"][1]),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": group["maximize"],
        }
        if self._goes_native(gradients, rows, mean, square):
            arguments = native_arguments(gradients)
            torch.ops.sface.native_adamw_step(rows, mean, square, *arguments, step=float(state["step"]) + 1, **rule)
            torch.autograd.graph.increment_version([rows, mean, square])
        elif self._goes_triton(gradients, rows, mean, square):
            beta1, beta2, count = rule["beta1"], rule["beta2"], float(state["step"]) + 1
            gradients[0].move(
                "adamw",
                lr=rule["lr"] / (1 - beta1**count),
                weight_decay=rule["lr"] * rule["weight_decay"],
                first=mean,
                second=square,
                take=1 - beta1,
                keep_second=beta2,
                take_second=1 - beta2,
                eps=rule["eps"],
                correction=(1 - beta2**count) ** -0.5,
                sign=-1.0 if rule["maximize"] else 1.0,
            )
            torch.autograd.graph.increment_version([rows, mean, square])
        else:
            for (first, end), gradient in self._ranges():
                w, m, v = ([t[first:end]] for t in (rows, mean, square))
                step = [state["step"].clone()]  # which counts the ranges too
                adamw(w, [gradient], m, v, [], step, foreach=False, amsgrad=False, **rule)
        state["step"] += 1
