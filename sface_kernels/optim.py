"""Optimizers of a head's weight that need no ∂w `[C, D]`: they take the lists of active pairs that say what it is.

    head = SFaceLoss(512, 85_742)
    optimizer = HeadSGD(head, lr=0.1, momentum=0.9, weight_decay=5e-4)

From here on a backward through the head leaves its lists with the optimizer, and `head.weight.grad` None. `step()` goes
through the classes once, block by block: it adds up a block's gradient and moves the block's rows and their state. The
update is torch.optim's on the dense gradient up to rounding, and so are arguments, `param_groups` and `state_dict()`:
load one's state into the other to change over at any step (`release()` before the change back).

- Several backwards before a step add up, each keeping its embeddings and lists until then. A step takes them all;
  nothing waits after it. `zero_grad()` of this optimizer drops what waits, `zero_grad()` of a module cannot.
- Clip by `max_norm`, or by `grad_norm()` and `scale_grad()` where the norm has to count other parameters too.
  `torch.nn.utils.clip_grad_norm_` sees no gradient; a weight that is a plain parameter warns it.
- `GradScaler.step` works. `GradScaler.unscale_` has nothing to divide, and the step after it raises: leave it out.
- Under torch.compile, with class sampling, or where the weight has other losses too, gradients come as `.grad`, dense;
  the step counts them.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .loss import SFaceLoss
from .pending import PendingGradient, WeightGradient, class_ranges, gradient_of, let_wait, pending_of

__all__ = ["HeadAdamW", "HeadSGD"]

Bounds = tuple[int, int]


def _local(t: Tensor) -> Tensor:
    """The rows that this process holds."""
    return t.to_local() if hasattr(t, "to_local") else t


def _weight_of(head: nn.Module) -> nn.Parameter:
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise TypeError(f"head: expected a module with a Parameter weight [C, D], got {type(head).__name__}")
    placements = getattr(weight, "placements", None)
    if placements is not None and not (len(placements) == 1 and placements[0].is_shard(0)):
        raise ValueError(f"head: expected a weight that is sharded by rows over one mesh dimension, got {placements}")
    if isinstance(head, SFaceLoss) and placements is None and dist.is_available() and dist.is_initialized():
        if dist.get_world_size() > 1:
            warnings.warn(
                f"head: an SFaceLoss in {dist.get_world_size()} processes: nothing averages the gradients that wait "
                "for this optimizer, DistributedDataParallel neither; take distributed.ClassParallelSFaceLoss",
                stacklevel=4,
            )
    return weight


def _native_arguments(gradients: list[WeightGradient]) -> tuple[list[Tensor], list[float]]:
    """`saved` and `hyper` of the native operators."""
    saved = [(g.x.float().contiguous(), g.target, g.grad_row.float().contiguous(), *g.saved) for g in gradients]
    return list(itertools.chain(*saved)), list(itertools.chain(*(g.hp for g in gradients)))


class _HeadOptimizer(torch.optim.Optimizer):
    """What both have in common. The torch.optim class beside it checks the arguments and keeps the state."""

    head: nn.Module
    max_norm: float | None

    def _attach(self, head: nn.Module, max_norm: float | None) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: expected None or a number > 0, got {max_norm!r}")
        self.head, self.max_norm = head, max_norm
        self._stand_in: Tensor | None = None
        self._pending = PendingGradient()
        let_wait(_weight_of(head), self._pending)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "head": self.head, "max_norm": self.max_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "head" in state:  # a copy; load_state_dict comes here too
            self._attach(state["head"], state["max_norm"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError("param_group: expected none beside the head's weight; give it an optimizer of its own")
        super().add_param_group(param_group)

    @property
    def _weight(self) -> nn.Parameter:
        weight = self.param_groups[0]["params"][0]
        if self.head.weight is not weight:
            raise RuntimeError(
                "head.weight: expected the Parameter that the optimizer holds, got another one; "
                "give add_classes() the optimizer, or make a new optimizer"
            )
        if pending_of(weight) is not self._pending:
            raise RuntimeError("head.weight: its gradient does not wait for this optimizer: released, or succeeded")
        return weight

    @property
    def _rows(self) -> Tensor:
        return _local(self._weight.detach())

    @property
    def _dense(self) -> Tensor | None:
        """The gradient that did not wait, of this process's rows."""
        grad = gradient_of(self._weight)
        return None if grad is None or grad is self._stand_in else _local(grad)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler.step asks this just before it looks for infinities in `.grad`, and GradScaler.update raises where
        no optimizer had one. A sparse stand-in of one row, until `step` begins, shows it what it looks for."""
        weight = self._weight
        if self._pending:
            with torch.no_grad():
                finite = torch.stack([rows.isfinite().all() for _, rows in self._ranges()]).all()
            if self._dense is not None:
                self._dense[:1].masked_fill_(~finite, torch.inf)
            else:
                row = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
                row.masked_fill_(~finite, torch.inf)
                place = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
                self._stand_in = torch.sparse_coo_tensor(place, row, weight.shape, is_coalesced=True)
                weight.grad = self._stand_in
        return True

    def _remove_stand_in(self) -> None:
        if self._stand_in is not None:
            self._stand_in = self.param_groups[0]["params"][0].grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradient that waits, and `.grad` as `torch.optim.Optimizer.zero_grad` does."""
        self._pending.clear()
        self._remove_stand_in()
        super().zero_grad(set_to_none)

    def release(self) -> None:
        """Give the head back: from now on its backward makes a dense `head.weight.grad`, for any optimizer.

        Raises:
            RuntimeError: a gradient waits.
        """
        weight = self._weight
        if self._pending:
            raise RuntimeError("release: a gradient waits; step() or zero_grad() first")
        let_wait(weight, None)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of the gradient that waits, and of `.grad` with it, 0-d; costs about one backward.

        Of a sharded weight that of all processes, each of which must call it.
        """
        rows = self._rows
        parts = [torch.linalg.vector_norm(gradient) for _, gradient in self._ranges()]
        norm = torch.linalg.vector_norm(torch.stack(parts)) if parts else rows.new_zeros(())
        mesh = getattr(self._weight, "device_mesh", None)
        if mesh is None:
            return norm
        square = norm.double() ** 2
        dist.all_reduce(square, group=mesh.get_group())
        return square.sqrt().to(norm.dtype)

    @torch.no_grad()
    def scale_grad(self, factor: float | Tensor) -> None:
        """Multiply the gradient that waits, and `.grad`, by a number or a 0-d tensor."""
        self._pending.scale(factor)
        if self._dense is not None:
            self._dense.mul_(factor)

    def _ranges(self) -> Iterator[tuple[Bounds, Tensor]]:
        """The whole gradient, a range of classes at a time, in the dtype of the weight."""
        rows, dense, waiting = self._rows, self._dense, self._pending.gradients()
        dtype = torch.promote_types(rows.dtype, torch.float32)
        block = max((one.class_block for one in waiting), default=1)
        for first, end in class_ranges(*rows.shape, block):
            parts = [one.rows(first, end).to(dtype) for one in waiting]
            if dense is not None:
                parts.append(dense[first:end].to(dtype))
            yield (first, end), functools.reduce(torch.add, parts).to(rows.dtype)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the weight by the gradients that came since the last step; without any nothing moves.

        Raises:
            ValueError: `closure` is given.
            RuntimeError: the weight was changed, exchanged or released meanwhile, or GradScaler.unscale_ was called.
        """
        if closure is not None:
            raise ValueError("closure: expected None, got one; the gradient of several backwards adds up anyway")
        self._remove_stand_in()
        weight = self._weight
        scaled, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._pending and found_inf is not None and scaled is None:
            raise RuntimeError(
                "GradScaler.unscale_: it divides .grad, and this gradient waits elsewhere; leave unscale_ out for this "
                "optimizer, whose step divides by the scale, and clip by max_norm"
            )
        idle = not self._pending and self._dense is None and len(self._rows) > 0
        if not idle and not (found_inf is not None and bool(found_inf)):
            if scaled is not None:
                self.scale_grad(scaled.double().reciprocal())
            if self.max_norm is not None:
                self.scale_grad((self.max_norm / (self.grad_norm() + 1e-6)).clamp_max(1))
            self._move(self.param_groups[0], self._pending.gradients())
            if hasattr(weight, "to_local"):  # what moved is inside of it
                torch.autograd.graph.increment_version(weight)
        self._pending.clear()

    def _goes_native(self, gradients: list[WeightGradient], *moved: Tensor) -> bool:
        """Whether the C++ operators take these gradients and move these tensors, the weight and its state."""
        return (
            len(gradients) > 0
            and self._dense is None
            and all(one.backend == "native" for one in gradients)
            and all(t.dtype == torch.float32 and t.is_contiguous() for t in moved)
        )

    def _move(self, group: dict[str, Any], gradients: list[WeightGradient]) -> None:
        raise NotImplementedError


class HeadSGD(_HeadOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` for a head's weight, without ∂w.

    Args:
        head: an `SFaceLoss`, a `distributed.ClassParallelSFaceLoss`, or a head of `compat`. Making the optimizer is the
            switch: from now on the head's gradient waits here.
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
        super().__init__(
            [_weight_of(head)], lr, momentum, dampening, weight_decay, nesterov, maximize=maximize
        )
        self._attach(head, max_norm)

    def _move(self, group: dict[str, Any], gradients: list[WeightGradient]) -> None:
        weight, rows, buffer, dampening = self._weight, self._rows, None, group["dampening"]
        if group["momentum"] != 0:
            state = self.state[weight]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(weight)
                dampening = 0  # the first gradient becomes the buffer
            buffer = _local(state["momentum_buffer"])
        rule = {
            "lr": float(group["lr"]),
            "momentum": float(group["momentum"]),
            "dampening": float(dampening),
            "weight_decay": float(group["weight_decay"]),
            "nesterov": group["nesterov"],
            "maximize": group["maximize"],
        }
        moved = [rows] if buffer is None else [rows, buffer]
        if self._goes_native(gradients, *moved):
            torch.ops.sface.native_sgd_step(rows, buffer, *_native_arguments(gradients), **rule)
            torch.autograd.graph.increment_version(moved)
            return
        for (first, end), gradient in self._ranges():
            part = None if buffer is None else buffer[first:end]
            sgd([rows[first:end]], [gradient], [part], foreach=False, **rule)


class HeadAdamW(_HeadOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` for a head's weight, without ∂w. Give the head `filter_eps=0`, as for any Adam.

    Args:
        head: as in `HeadSGD`.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`; there is no amsgrad.
        max_norm: as in `HeadSGD`.

    Raises:
        TypeError, ValueError: an argument is off, or a loaded state has amsgrad.
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
        super().__init__([_weight_of(head)], lr, betas, eps, weight_decay, maximize=maximize)
        self._attach(head, max_norm)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("state_dict: expected one without amsgrad, which HeadAdamW does not have")
        super().load_state_dict(state_dict)

    def _move(self, group: dict[str, Any], gradients: list[WeightGradient]) -> None:
        weight, rows, state = self._weight, self._rows, self.state[self._weight]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        mean, square = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        rule = {
            "lr": float(group["lr"]),
            "beta1": float(group["betas"][0]),
            "beta2": float(group["betas"][1]),
            "eps": float(group["eps"]),
            "weight_decay": float(group["weight_decay"]),
            "maximize": group["maximize"],
        }
        if self._goes_native(gradients, rows, mean, square):
            arguments = _native_arguments(gradients)
            torch.ops.sface.native_adamw_step(rows, mean, square, *arguments, step=float(state["step"]) + 1, **rule)
            torch.autograd.graph.increment_version([rows, mean, square])
        else:
            for (first, end), gradient in self._ranges():
                parts = [[t[first:end]] for t in (mean, square)]
                adamw(
                    [rows[first:end]], [gradient], *parts, [], [state["step"].clone()],
                    foreach=False, amsgrad=False, **rule,
                )
        state["step"] += 1
