"""What the optimizers have in common: where gradients wait, and when, how scaled and in which pieces they are taken."""

from __future__ import annotations

import abc
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import validation
from ..loss import SFaceLoss
from ..pending import PendingGradient, WeightGradient, class_ranges, gradient_of, pending_of, wait_no_longer

Bounds = tuple[int, int]


def local_rows(t: Tensor) -> Tensor:
    """The rows that this process holds."""
    return t.to_local() if hasattr(t, "to_local") else t


def weight_of(head: nn.Module) -> nn.Parameter:
    weight: Any = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or not isinstance(weight, nn.Parameter) or weight.dim() != 2:
        raise TypeError(f"head: expected a module with a Parameter weight [C, D], got {type(head).__name__}")
    placements = getattr(weight, "placements", None)
    if placements is not None and not (len(placements) == 1 and placements[0].is_shard(0)):
        raise ValueError(f"head: expected a weight that is sharded by rows over one mesh dimension, got {placements}")
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if processes > 1 and placements is None and isinstance(head, SFaceLoss):
        warnings.warn(
            f"head: an SFaceLoss in {processes} processes: nothing averages the gradients that wait for this "
            "optimizer, DistributedDataParallel neither; take distributed.ClassParallelSFaceLoss",
            stacklevel=3,
        )
    return weight


def native_arguments(gradients: list[WeightGradient]) -> tuple[list[Tensor], list[float]]:
    """`saved` and `hyper` of the native operators. They take 1/‖w_j‖ from the first backward: one without rows, whose
    forward has computed none, is left out."""
    gradients = [g for g in gradients if len(g.x) > 0]
    saved = [(g.x.float().contiguous(), g.target, g.grad_row.float().contiguous(), *g.saved) for g in gradients]
    return list(itertools.chain(*saved)), list(itertools.chain(*(g.hp for g in gradients)))


class HeadOptimizer(torch.optim.Optimizer, abc.ABC):
    """What both have in common. The torch.optim class beside it checks the arguments and keeps the state."""

    head: nn.Module
    max_norm: float | None

    def _attach(self, head: nn.Module, max_norm: float | None) -> None:
        if max_norm is not None and max_norm != math.inf:
            max_norm = validation.positive("max_norm", max_norm)
        self.head, self.max_norm = head, max_norm
        self._stand_in: Tensor | None = None
        self._pending = PendingGradient(self.param_groups[0]["params"][0])

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
        held: Any = self.head.weight
        weight = self.param_groups[0]["params"][0]
        if weight is not held:
            raise RuntimeError(
                "head.weight: expected the Parameter that the optimizer holds, got another one; "
                "give add_classes() the optimizer, or make a new optimizer"
            )
        if pending_of(weight) is not self._pending:
            raise RuntimeError("head.weight: its gradient does not wait for this optimizer: released, or succeeded")
        return weight

    @property
    def _rows(self) -> Tensor:
        return local_rows(self._weight).detach()

    def _state_rows(self, name: str) -> Tensor:
        """This process's rows of a state tensor; torch.optim's `load_state_dict` takes any."""
        rows, expected = local_rows(self.state[self._weight][name]), self._rows.shape
        if rows.shape != expected:
            raise ValueError(
                f"state_dict: expected {name} {list(expected)}, the rows that this process holds, got "
                f"{list(rows.shape)}; load the state of other numbers of processes by torch.distributed.checkpoint"
            )
        return rows

    @property
    def _mesh(self) -> Any:
        """The processes that the weight is spread over; None for a plain one."""
        return getattr(self._weight, "device_mesh", None)

    @property
    def _dense(self) -> Tensor | None:
        """The gradient that did not wait, of this process's rows."""
        weight: Any = self._weight
        grad: Any = gradient_of(weight)
        if grad is None or grad is self._stand_in:
            return None
        placements = getattr(weight, "placements", None)
        if getattr(grad, "placements", None) != placements:  # replicated, as that of weight[3].sum() is
            grad = weight.grad = grad.redistribute(placements=placements)
        if grad.is_sparse:  # of a compiled call with sparse_grad=True
            grad = weight.grad = grad.to_dense()
        return local_rows(grad)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler.step asks this just before it looks for infinities in `.grad`, and GradScaler.update raises where
        no optimizer had one. A sparse stand-in of one row, until `step` begins, shows it what it looks for."""
        weight, mesh = self._weight, self._mesh
        if not self._pending and mesh is None:
            return True
        with torch.no_grad():
            infinite = self._rows.new_zeros((), dtype=torch.float32)
            for _, rows in self._ranges():
                infinite += ~rows.isfinite().all()
            if mesh is not None:
                dist.all_reduce(infinite, group=mesh.get_group())
            if self._dense is not None:
                self._dense[:1].masked_fill_(infinite > 0, torch.inf)
                return True
            row = self._rows.new_zeros(1, weight.shape[1]).masked_fill_(infinite > 0, torch.inf)
            place = torch.zeros(1, 1, dtype=torch.int64, device=row.device)
            self._stand_in = torch.sparse_coo_tensor(
                place, row, weight.shape, is_coalesced=True, check_invariants=False
            )
            weight.grad = self._stand_in
        return True

    def _remove_stand_in(self) -> None:
        if self._stand_in is not None:
            self._stand_in = self.param_groups[0]["params"][0].grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradient that waits, and `.grad` as `torch.optim.Optimizer.zero_grad` does.

        A `step` without a backward in between then moves nothing, with `set_to_none=False` too, where torch's would
        decay the weight and go on with its momentum.
        """
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
        wait_no_longer(weight)

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """The 2-norm of the gradient that waits, and of `.grad` with it, 0-d; costs about one backward.

        Of a sharded weight that of all processes, each of which must call it.
        """
        dtype = torch.promote_types(self._rows.dtype, torch.float32)
        parts = [torch.linalg.vector_norm(gradient, dtype=dtype) for _, gradient in self._ranges()]
        norm = torch.linalg.vector_norm(torch.stack(parts)) if parts else self._rows.new_zeros((), dtype=dtype)
        if self._mesh is None:
            return norm
        square = norm.double() ** 2
        dist.all_reduce(square, group=self._mesh.get_group())
        return square.sqrt().to(dtype)

    @torch.no_grad()
    def scale_grad(self, factor: float | Tensor) -> None:
        """Multiply the gradient that waits, and `.grad`, by a number or a 0-d tensor."""
        self._pending.scale(factor)
        if self._dense is not None:
            self._dense.mul_(factor)

    def _ranges(self) -> Iterator[tuple[Bounds, Tensor]]:
        """The whole gradient, a range of classes at a time, in the dtype of the weight."""
        rows, dense, waiting = self._rows, self._dense, self._pending.gradients()
        if not waiting and dense is None:
            return
        dtype = torch.promote_types(rows.dtype, torch.float32)
        block = max((one.class_block for one in waiting), default=1)
        for first, end in class_ranges(rows, block):
            parts = [one.rows(first, end).to(dtype) for one in waiting]
            if dense is not None:
                parts.append(dense[first:end].to(dtype))
            yield (first, end), functools.reduce(torch.add, parts).to(rows.dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weight by the gradients that came since the last step; without any nothing moves.

        Args:
            closure: called first, once, to compute the loss and its gradient.

        Returns:
            What `closure` returns.

        Raises:
            RuntimeError: the weight was changed, exchanged or released meanwhile, or GradScaler.unscale_ was called.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._remove_stand_in()
        scaled, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._pending and found_inf is not None and scaled is None:
            raise RuntimeError(
                "GradScaler.unscale_: it divides .grad, and this gradient waits elsewhere; leave unscale_ out for this "
                "optimizer, whose step divides by the scale, and clip by max_norm"
            )
        if found_inf is None or not bool(found_inf):
            if scaled is not None:
                self.scale_grad(scaled.reciprocal())
            if self.max_norm is not None:  # every process of a mesh takes part, with a gradient or without
                self.scale_grad((self.max_norm / (self.grad_norm() + 1e-6)).clamp_max(1))
            if self._pending or self._dense is not None:
                self._move(self.param_groups[0], self._pending.gradients())
                if self._mesh is not None:  # what moved is inside of it
                    torch.autograd.graph.increment_version(self._weight)
        self._pending.clear()
        return loss

    def _goes_native(self, gradients: list[WeightGradient], *moved: Tensor) -> bool:
        """Whether the C++ operators take these gradients and move these tensors, the weight and its state. The
        gradients must be of these very rows, as they are made of them: `weight.data = …` may have exchanged them."""
        return len(gradients) > 0 and self._can_move("native", gradients, moved)

    def _goes_triton(self, gradients: list[WeightGradient], *moved: Tensor) -> bool:
        """Whether the Triton kernels that would make ∂w move these tensors instead: by one gradient, not by several."""
        return len(gradients) == 1 and gradients[0].can_move and self._can_move("triton", gradients, moved)

    def _can_move(self, backend: str, gradients: list[WeightGradient], moved: tuple[Tensor, ...]) -> bool:
        return (
            self._dense is None
            and moved[0].numel() > 0
            and all(one.backend == backend and one.w.data_ptr() == moved[0].data_ptr() for one in gradients)
            and all(t.dtype == torch.float32 and t.is_contiguous() for t in moved)
        )

    @abc.abstractmethod
    def _move(self, group: dict[str, Any], gradients: list[WeightGradient]) -> None:
        """Move weight and state by the optimizer's own rule."""
