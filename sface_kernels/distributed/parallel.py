"""The loss of a batch and a weight that are both spread over a group: gather rows → this process's classes → sum.

Two gathers and one sum of a few numbers forward, one reduce-scatter of ∂x backward; ∂w stays where it is.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import validation
from ..dispatch import select
from ..ops import prepare_labels
from ..types import IGNORED, Request, SFaceRowStats, SFaceStats
from .collectives import (
    GatherRows,
    Group,
    SumOverShards,
    check_agreement,
    gather,
    group_rank,
    maximum_over_shards,
)
from .evaluation import class_parallel_rows
from .sampling import Sampling, draw, sampled_rows, split_classes
from .shard import ShardRows, check_shard_tensors, checks_labels, shard_rows

REDUCTIONS = ("mean", "sum")


class Options(NamedTuple):
    """What `sface_loss` takes by keyword, checked."""

    s: float
    k: float
    a: float
    b: float
    k_inter: float | None
    reduction: str
    ignore_index: int
    filter_eps: float | None
    backend: str

    def check(self, features: int) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"reduction: expected one of {REDUCTIONS} (row losses live on every process), got {self.reduction!r}"
            )
        validation.integer("ignore_index", self.ignore_index)
        self.hyperparameters(torch.float32, features)

    def hyperparameters(self, dtype: torch.dtype, features: int) -> Any:
        return validation.make_hyperparameters(
            self.s, self.k, self.a, self.b, self.k_inter, self.filter_eps, dtype, features
        )


class Shard(NamedTuple):
    """The part of the weight that this process holds."""

    weight: Tensor  # [len, D]
    first: int
    num_classes: int  # of all processes together
    group: Group

    def settings(self, options: Options) -> dict[str, Any]:
        """What every process of the group must agree on."""
        shared = options._asdict()
        del shared["backend"]  # each device may have its own
        return {
            "in_features": self.weight.shape[1],
            "num_classes": self.num_classes,
            "weight dtype": self.weight.dtype,
            **shared,
        }


def class_parallel_loss(
    embeddings: Tensor,
    labels: Tensor,
    shard: Shard,
    options: Options,
    *,
    exchange_sizes: bool,
    return_stats: bool | str,
    sampling: Sampling | None = None,
) -> Tensor | tuple[Tensor, SFaceStats | SFaceRowStats]:
    """The loss of all processes' rows against all processes' classes, the same on every process.

    Args:
        embeddings: this process's rows `[n, D]`.
        labels: their class numbers `[n]` or `[n, 1]` in [0, num_classes), wherever these classes are held.
        exchange_sizes: processes may have different `n`, and an error in one of them is raised by all. Without it
            nothing is read back from the device, and different `n` are not noticed before the gather.
        sampling: the part of the classes to compare with; all of them if None.
    """
    if exchange_sizes:
        count, need_x = _exchange_sizes(embeddings, labels, shard, options, return_stats)
    else:
        check_shard_tensors(embeddings, shard.weight, labels)
        count, need_x = len(embeddings), embeddings.requires_grad
    if need_x and torch.is_grad_enabled() and not embeddings.requires_grad:
        embeddings = embeddings.detach().requires_grad_()  # the backward's collective needs every process
    own_rows = slice(group_rank(shard.group) * count, group_rank(shard.group) * count + len(embeddings))
    padding, labels = count - len(embeddings), labels.reshape(-1).to(torch.int64)
    labels = gather(F.pad(labels, (0, padding), value=options.ignore_index), shard.group)  # [N]
    x = GatherRows.apply(F.pad(embeddings, (0, 0, 0, padding)), shard.group)  # [N, D]

    target = prepare_labels(
        labels, shard.num_classes, options.ignore_index, checks_labels(x), shard.first, len(shard.weight)
    )  # [N]
    hp = options.hyperparameters(x.dtype, x.shape[1])
    if sampling is None:
        rows = shard_rows(x, shard.weight, target, hp, options.backend, shard.first)
    else:
        near, others = split_classes(target, len(shard.weight))
        drawn = draw(others, sampling, shard.first)
        rows = sampled_rows(x, shard.weight, target, hp, options.backend, near, drawn, shard.first)
    counted = (target != IGNORED).sum().clamp_min(1)  # the same everywhere: all labels are here
    loss = rows.loss.sum()
    if options.reduction == "mean":
        loss = loss / counted
    sums = _sums(rows) if return_stats and return_stats != "rows" else loss.new_empty(0)
    loss, sums = SumOverShards.apply(loss, sums, shard.group)
    if return_stats == "rows":
        return loss, class_parallel_rows(rows, target, own_rows, shard.group)
    if not return_stats:
        return loss
    return loss, _statistics(sums.to(loss.dtype), sums, _correct(rows, target, shard.group), counted, shard.num_classes)


def _exchange_sizes(
    embeddings: Tensor, labels: Tensor, shard: Shard, options: Options, return_stats: bool | str
) -> tuple[int, bool]:
    """(rows to pad to, whether any process wants ∂x); raises on every process what is wrong on one of them."""
    error: Exception | None = None
    try:
        check_shard_tensors(embeddings, shard.weight, labels)
        prepare_labels(labels, shard.num_classes, options.ignore_index, checks_labels(embeddings))
        request = Request(embeddings.device, embeddings.dtype, shard.weight.dtype, embeddings.shape[1])
        select(options.backend, request)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    if shard.group is None:
        if error is not None:
            raise error
        return len(embeddings), embeddings.requires_grad
    settings = {**shard.settings(options), "return_stats": return_stats}
    if error is None:
        dtype = validation.FLOAT_DTYPES.index(embeddings.dtype)
        mine = [0, len(embeddings), embeddings.requires_grad, dtype, zlib.crc32(repr(settings).encode())]
    else:
        mine = [1, 0, 0, 0, 0]
    everyone = gather(torch.tensor([mine], device=shard.weight.device), shard.group).tolist()  # [P, 5]
    if error is not None:
        raise error
    failed = [rank for rank, (code, *_) in enumerate(everyone) if code]
    if failed:
        raise RuntimeError(f"class-parallel SFace: rank {failed[0]} raised an error, which it reports itself")
    if any(theirs[3:] != everyone[0][3:] for theirs in everyone):
        check_agreement(settings | {"embeddings dtype": embeddings.dtype}, shard.group)
    # collectives of nothing differ between communication backends, and one ignored row changes nothing
    return max(1, *(theirs[1] for theirs in everyone)), any(theirs[2] for theirs in everyone)


def _sums(rows: ShardRows) -> Tensor:
    """`[7]` float64, what adds up over shards; pairs are counted exactly up to 2⁵³."""
    s = rows.stats
    over_rows = torch.stack([s.intra, s.inter, s.cos_target, s.cos_other_sum, s.dropped]).double().sum(1)  # [5]
    return torch.cat([over_rows, rows.counts.double()])


def _correct(rows: ShardRows, target: Tensor, group: Group) -> Tensor:
    """How many rows' own centre is strictly nearer than every other shard's and this one's others."""
    own = torch.where(target >= 0, rows.stats.cos_target, -torch.inf)
    own, hardest = maximum_over_shards(torch.stack([own, rows.stats.hardest]), group)  # [N], [N]
    return ((own > hardest) & (target != IGNORED)).sum()


def _statistics(means: Tensor, sums: Tensor, correct: Tensor, counted: Tensor, num_classes: int) -> SFaceStats:
    intra, inter, cos_target, cos_other, dropped = (means[:5] / counted).unbind(0)
    active_pairs, dense_pairs = sums[5:].unbind(0)
    return SFaceStats(
        intra=intra,
        inter=inter,
        cos_target=cos_target,
        cos_other=cos_other / num_classes,
        accuracy=correct.to(means.dtype) / counted,
        active_pairs=active_pairs.round().to(torch.int64),
        dropped=dropped,
        dense_share=(dense_pairs / (counted * num_classes)).to(means.dtype),
    )
