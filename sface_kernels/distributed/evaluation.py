"""What evaluation and logging want of classes that are spread over a group: the nearest classes, and row statistics."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import cosines, validation
from ..summary import describe_rows
from ..types import RowStats, SFaceRowStats
from .collectives import Group, group_rank, group_size, start_gather, start_maximum, start_reduce
from .shard import ShardRows, check_shard_pair


@torch.no_grad()
def class_parallel_topk(
    embeddings: Tensor, weight: Tensor, first: int, num_classes: int, k: int, group: Group
) -> tuple[Tensor, Tensor]:
    """The k largest cosines to all classes of this process's rows `[n, D]` and those classes, both `[n, k]`.

    Every process compares everyone's rows with the classes [first, first + len(weight)) that it holds, and hands its k
    nearest to all: P·k numbers and classes a row.
    """
    count = _agreed_count(embeddings, weight, k, num_classes, group)
    x = start_gather(F.pad(embeddings.detach(), (0, 0, 0, count - len(embeddings))), group).wait()  # [P·count, D]
    values, classes = cosines.topk(x, weight, min(k, len(weight)))  # [P·count, ≤ k]
    missing = (0, k - values.shape[1])
    values, classes = F.pad(values, missing, value=-torch.inf), F.pad(classes + first, missing, value=-1)
    mine = slice(group_rank(group) * count, group_rank(group) * count + len(embeddings))
    gathered = [start_gather(t, group).wait() for t in (values, classes)]
    parts = [t.view(group_size(group), -1, k)[:, mine] for t in gathered]  # [P, n, k]
    values, classes = (part.transpose(0, 1).flatten(1) for part in parts)  # [n, P·k]
    values, order = values.topk(k, 1)
    return values.clamp_(-1, 1), classes.gather(1, order)


def _agreed_count(embeddings: Tensor, weight: Tensor, k: int, num_classes: int, group: Group) -> int:
    """The most rows that a process has, at least 1. What is wrong on one process raises on all of them."""
    error: Exception | None = None
    mine = [-1, -1, -1]
    try:
        check_shard_pair(embeddings, weight)
        mine = [len(embeddings), cosines.check_k(k, num_classes), validation.FLOAT_DTYPES.index(embeddings.dtype)]
    except (TypeError, ValueError) as raised:
        error = raised
    everyone = start_gather(torch.tensor([mine], device=weight.device), group).wait().tolist()  # [P, 3]
    if error is not None:
        raise error
    for rank, (rows, theirs, dtype) in enumerate(everyone):
        if rows < 0:
            raise RuntimeError(f"class-parallel SFace: rank {rank} raised an error, which it reports itself")
        if [theirs, dtype] != mine[1:]:
            raise ValueError(
                f"embeddings, k: expected the same dtype and k on every process, got {embeddings.dtype} and {k} here "
                f"and {validation.FLOAT_DTYPES[dtype]} and {theirs} on rank {rank}"
            )
    return max(1, *(rows for rows, _, _ in everyone))


def class_parallel_rows(rows: ShardRows, target: Tensor, mine: slice, group: Group) -> SFaceRowStats:
    """Statistics over all classes of this process's rows, `mine` of those that `rows` has results of one shard for.

    The hardest other class is the one with the greatest cosine of all shards, then the lowest number.
    """
    s = rows.stats
    sums = torch.stack([s.intra, s.inter, s.cos_target, s.cos_other_sum, s.dropped])  # [5, N]
    summing = start_reduce(sums, group)
    hardest = start_maximum(s.hardest, group).wait()  # [N]
    hardest = hardest.masked_fill(hardest == torch.inf, torch.nan)
    last = torch.iinfo(torch.int64).max
    here = (s.hardest == hardest) & (rows.hardest_class >= 0)
    lowest = start_reduce(torch.where(here, rows.hardest_class, last), group, dist.ReduceOp.MIN).wait()  # [N]
    hardest_class = torch.where(lowest == last, -1, lowest)
    intra, inter, cos_target, cos_other_sum, dropped = summing.wait()[:, mine].unbind(0)
    total = RowStats(intra, inter, cos_target, cos_other_sum, hardest[mine], dropped)
    return describe_rows(total, hardest_class[mine], target[mine])
