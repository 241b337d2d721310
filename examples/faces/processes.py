"""Training in several processes started by torchrun: each takes its rows of every batch and its classes of the head."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[int]:
    """Joins the group that torchrun started, and leaves it at the end. Gives this process's number."""
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def own_rows() -> slice:
    """The rows of a batch that are this process's; all of them without a group."""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def fewest_rows() -> int:
    """Of a batch, with two for each process: batch normalisation has no variance in one."""
    return 2 * (dist.get_world_size() if dist.is_initialized() else 1)


def averaged(backbone: nn.Module) -> nn.Module:
    """The backbone with gradients averaged over the processes; the head's times their number makes up for it."""
    return DistributedDataParallel(backbone) if dist.is_initialized() else backbone


def whole(tree: Any) -> Any:
    """A state dict with every sharded tensor gathered, so that any number of processes can load it. All must call it."""
    if isinstance(tree, dict):
        return {name: whole(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [whole(part) for part in tree]
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def shard_like(parameter: Tensor, state: dict[str, Any]) -> None:
    """Cuts what an optimizer holds for a sharded parameter as that is cut."""
    if isinstance(parameter, DTensor):
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
