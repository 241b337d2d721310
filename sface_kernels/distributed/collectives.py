"""What the processes of a class-parallel head exchange. A group of None is this process by itself: nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup | None
# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_without_reduce_scatter: set[str] = set()  # names of communication backends


def group_size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def uses_nccl(group: Group) -> bool:
    """Whether tensors on a GPU travel by NCCL, by itself or beside gloo for tensors on the CPU."""
    return group is not None and "nccl" in dist.get_backend_config(group) and torch.cuda.is_available()


def current_gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def gather(rows: Tensor, group: Group) -> Tensor:
    """`[P·n, …]` from every process's `[n, …]`, in the order of ranks."""
    if group is None:
        return rows
    result = rows.new_empty(group_size(group) * rows.shape[0], *rows.shape[1:])
    _all_gather(result, rows.contiguous(), group=group)
    return result


def sum_and_scatter(rows: Tensor, group: Group) -> Tensor:
    """`[n, …]`: this process's part of the sum of every process's `[P·n, …]`."""
    if group is None:
        return rows
    rows = rows.contiguous()
    count, backend = rows.shape[0] // group_size(group), str(dist.get_backend(group))
    if backend not in _without_reduce_scatter:
        result = rows.new_empty(count, *rows.shape[1:])
        try:
            _reduce_scatter(result, rows, group=group)
            return result
        except RuntimeError as error:  # gloo before torch 2.6 refuses before anything is sent, on every process alike
            if "support" not in str(error).lower():
                raise
            _without_reduce_scatter.add(backend)
    rows = rows.clone()
    dist.all_reduce(rows, group=group)
    return rows[group_rank(group) * count :][:count]


class GatherRows(torch.autograd.Function):
    """`gather` of embeddings. Backward: each process gets the gradient of its own rows, summed over the processes
    and multiplied by their number, as DistributedDataParallel and FSDP2 divide the backbone's gradients by it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return rows.view_as(rows) if group is None else gather(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # half precision would round at every addition
        total = sum_and_scatter(grad.to(torch.promote_types(grad.dtype, torch.float32)), ctx.group)
        return (total * group_size(ctx.group)).to(grad.dtype), None


class SumOverShards(torch.autograd.Function):
    """The sum over the processes of a 0-d loss, and of a vector of statistics beside it, as one message.

    Backward: the gradient as it comes, as every process differentiates the same sum.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, statistics: Tensor, group: Group) -> tuple[Tensor, Tensor]:
        packed = torch.cat([loss.double().reshape(1), statistics.double()])
        if group is not None:
            dist.all_reduce(packed, group=group)
        total = packed[1:].clone()
        ctx.mark_non_differentiable(total)
        return packed[0].to(loss.dtype), total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
        return grad, None, None


def maximum_over_shards(values: Tensor, group: Group) -> Tensor:
    if group is not None:
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


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
