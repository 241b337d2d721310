"""What the processes of a class-parallel head exchange. A group of None is this process by itself: nothing is sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..autograd import RaiseOnSecondBackward

Group = dist.ProcessGroup | None
# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# gloo's reduce-scatter is an all-reduce of a copy, of which it takes a part: the same traffic, and twice the memory
SCATTERS_A_COPY = {"gloo"}


def group_size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def uses_nccl(group: Group) -> bool:
    """Whether tensors on a GPU travel by NCCL, by itself or beside gloo for tensors on the CPU."""
    return group is not None and "nccl" in dist.get_backend_config(group) and torch.cuda.is_available()


def current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


class Pending(NamedTuple):
    """The result of an exchange that goes on beside the computing. Reading `result` before `wait()` is a race."""

    result: Tensor
    sent: Tensor  # kept alive until it has left
    work: dist.Work | None  # None: nothing was sent

    def wait(self) -> Tensor:
        """The result. With NCCL the current stream waits, not the process."""
        if self.work is not None:
            self.work.wait()
        return self.result


def start_gather(rows: Tensor, group: Group) -> Pending:
    """`[P·n, …]` from every process's `[n, …]`, in the order of ranks."""
    if group is None:
        return Pending(rows, rows, None)
    rows = rows.contiguous()
    result = rows.new_empty(group_size(group) * rows.shape[0], *rows.shape[1:])
    return Pending(result, rows, _all_gather(result, rows, group=group, async_op=True))


def start_sum_and_scatter(rows: Tensor, group: Group) -> Pending:
    """`[n, …]`: this process's part of the sum of every process's `[P·n, …]`, which it may overwrite."""
    if group is None:
        return Pending(rows, rows, None)
    rows, count = rows.contiguous(), rows.shape[0] // group_size(group)
    if dist.get_backend(group) in SCATTERS_A_COPY:
        part = rows[group_rank(group) * count :][:count]
        return Pending(part, rows, dist.all_reduce(rows, group=group, async_op=True))
    result = rows.new_empty(count, *rows.shape[1:])
    return Pending(result, rows, _reduce_scatter(result, rows, group=group, async_op=True))


def start_reduce(values: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Pending:
    """The sum, or another reduction, of every process's `values`, which it overwrites."""
    work = None if group is None else dist.all_reduce(values, op=op, group=group, async_op=True)
    return Pending(values, values, work)


def start_maximum(cosines: Tensor, group: Group) -> Pending:
    """The largest of every process's `cosines`, +inf where one is NaN: a library's own maximum may drop that."""
    return start_reduce(cosines.nan_to_num(torch.inf, torch.inf, -torch.inf), group, dist.ReduceOp.MAX)


class GradientOfRows:
    """The gradient of this process's embeddings, which arrives after the forward has ended.

    SFace's row gradients are complete in the forward, up to one number that the backward brings. So their sum over the
    shards travels from then on, while this process computes ∂w, and the backward of the head exchanges nothing.
    """

    def __init__(self) -> None:
        self._pending: Pending | None = None
        self._processes = 1
        self._divisor: Tensor
        self._ignored: Tensor

    def send(self, grad_x: Tensor, divisor: Tensor, ignored: Tensor, group: Group) -> None:
        """Start the sum of `[P·n, D]`, the gradients of row losses whose sum is divided by `divisor`, 0-d. `ignored`
        says which of this process's own rows, of which there may be fewer than n, count nowhere."""
        self._processes, self._divisor, self._ignored = group_size(group), divisor, ignored
        self._pending = start_sum_and_scatter(grad_x, group)

    def take(self, upstream: Tensor) -> Tensor:
        """Of this process's own rows `[len(ignored), D]`, multiplied by the number of processes, as
        DistributedDataParallel and FSDP2 divide the backbone's gradients by it."""
        assert self._pending is not None
        total = self._pending.wait()
        self._pending = Pending(total, total, None)  # a second backward finds the same
        factor = (upstream * self._processes / self._divisor).expand(len(self._ignored))
        # 0 · NaN is NaN: an ignored row's zeros must not be multiplied by an upstream gradient that is not finite
        return total[: len(factor)] * factor.masked_fill(self._ignored, 0).unsqueeze(1)


class AttachRows(torch.autograd.Function):
    """A 0-d zero beside the loss, whose gradient becomes that of this process's embeddings, by `GradientOfRows`.

    Applied before the shard's own pass: autograd takes the youngest node first, and so computes ∂w before it waits.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, arriving: GradientOfRows, dtype: torch.dtype) -> Tensor:
        ctx.arriving = arriving
        ctx.save_for_backward(rows)
        return torch.zeros((), dtype=dtype, device=rows.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        with torch.no_grad():
            grad_rows = ctx.arriving.take(grad).to(rows.dtype)
        if torch.is_grad_enabled():  # create_graph=True
            grad_rows = RaiseOnSecondBackward.apply(grad_rows, rows)
        return grad_rows, None, None


class SumOverShards(torch.autograd.Function):
    """The sum of every process's 0-d loss, once it has arrived. Backward: the gradient as it comes, as every process
    differentiates the same sum."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, rows: Tensor | None, total: Tensor) -> Tensor:
        return total.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return grad, grad if ctx.needs_input_grad[1] else None, None


def check_agreement(settings: dict[str, Any], group: Group) -> None:
    """Raise ValueError on every process if one of them has another value for one of `settings`."""
    if group is None:
        return
    everyone: list[Any] = [None] * group_size(group)
    dist.all_gather_object(everyone, settings, group=group)
    for name in settings:
        for rank, theirs in enumerate(everyone):
            if theirs[name] != everyone[0][name]:
                raise ValueError(
                    f"{name}: expected the same on every process, got {everyone[0][name]!r} on rank 0 and "
                    f"{theirs[name]!r} on rank {rank}"
                )
