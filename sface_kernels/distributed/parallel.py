"""The loss of a batch and a weight that are both spread over a group: gather rows → this process's classes → sum.

The forward starts every exchange, in the order in which results are needed: labels, embeddings, the loss, ∂x. Labels
become targets while the embeddings travel, and ∂x travels while the backward computes ∂w, which stays where it is.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import validation
from ..dispatch import select
from ..ops import compute_dtype, prepare_labels
from ..pending import PendingGradient
from ..types import IGNORED, Request, SFaceRowStats, SFaceStats
from .collectives import (
    AttachRows,
    GradientOfRows,
    Group,
    SumOverShards,
    check_agreement,
    group_rank,
    start_gather,
    start_maximum,
    start_reduce,
)
from .evaluation import class_parallel_rows
from .sampling import Sampling, sample_classes, sampled_rows
from .shard import ShardRows, check_shard_tensors, shard_rows

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
    pending: PendingGradient | None = None  # where ∂w waits, if not in `pending_of(weight)`

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
        validation.check_return_stats(return_stats)
        check_shard_tensors(embeddings, shard.weight, labels)
        count, need_x = len(embeddings), _wants_gradient(embeddings)
    group, padding = shard.group, count - len(embeddings)
    arriving, attached = GradientOfRows(), None
    if need_x and torch.is_grad_enabled():
        # a process whose own rows want no gradient has a loss to differentiate all the same, as the others have
        own_rows = embeddings if embeddings.requires_grad else embeddings.detach().requires_grad_()
        attached = AttachRows.apply(own_rows, arriving, compute_dtype(embeddings, shard.weight))
    labels = F.pad(labels.reshape(-1).to(torch.int64), (0, padding), value=options.ignore_index)
    rows_to_send = F.pad(embeddings.detach(), (0, 0, 0, padding)) if padding else embeddings.detach()
    gathering_labels = start_gather(labels, group)
    gathering_rows = start_gather(rows_to_send, group)

    labels, check = gathering_labels.wait(), validation.checks_labels(embeddings.device)  # [N]
    first, held = shard.first, len(shard.weight)
    target = prepare_labels(labels, shard.num_classes, options.ignore_index, check, first, held)  # [N]
    counted = (target != IGNORED).sum().clamp_min(1)  # the same everywhere: all labels are here
    classes = None if sampling is None else sample_classes(shard.weight, target, sampling, first)
    mine = slice(group_rank(group) * count, group_rank(group) * count + len(embeddings))
    x = gathering_rows.wait()  # [N, D]
    del gathering_rows, rows_to_send
    hp = options.hyperparameters(x.dtype, x.shape[1])
    if classes is None:
        rows = shard_rows(x, shard.weight, target, hp, options.backend, first, need_x, shard.pending)
    else:
        rows = sampled_rows(x, classes, hp, options.backend, need_x)

    loss = rows.loss.sum()
    if options.reduction == "mean":
        loss = loss / counted
    sums = _sums(rows) if return_stats is True else loss.new_empty(0, dtype=torch.float64)
    summing = start_reduce(torch.cat([loss.detach().double().reshape(1), sums]), group)
    cosines = None
    if return_stats is True:
        cosines = start_maximum(_target_and_hardest(rows, target), group)
    if rows.grad_x is not None:
        divisor = counted if options.reduction == "mean" else torch.ones_like(counted)
        arriving.send(rows.grad_x, divisor, target[mine] == IGNORED, group)
    rows = rows._replace(grad_x=None)  # ∂x `[N, D]` is held until it has left, no longer
    row_stats = class_parallel_rows(rows, target, mine, group) if return_stats == "rows" else None

    total = summing.wait()
    loss = SumOverShards.apply(loss, attached, total[0])
    if row_stats is not None:
        return loss, row_stats
    if cosines is None:
        return loss
    own, hardest = cosines.wait()  # [N], [N]
    correct = ((own > hardest) & (own < torch.inf) & (target != IGNORED)).sum()
    return loss, _statistics(total[1:], correct, counted, shard.num_classes, loss.dtype)


def _wants_gradient(embeddings: Tensor) -> bool:
    return torch.is_grad_enabled() and embeddings.requires_grad


def _exchange_sizes(
    embeddings: Tensor, labels: Tensor, shard: Shard, options: Options, return_stats: bool | str
) -> tuple[int, bool]:
    """(rows to pad to, whether any process wants ∂x); raises on every process what is wrong on one of them."""
    error: Exception | None = None
    try:
        validation.check_return_stats(return_stats)
        check_shard_tensors(embeddings, shard.weight, labels)
        check = validation.checks_labels(embeddings.device)
        prepare_labels(labels, shard.num_classes, options.ignore_index, check)
        request = Request(embeddings.device, embeddings.dtype, shard.weight.dtype, embeddings.shape[1])
        select(options.backend, request)
    except (TypeError, ValueError, RuntimeError) as raised:
        error = raised
    if shard.group is None:
        if error is not None:
            raise error
        return len(embeddings), _wants_gradient(embeddings)
    settings = {**shard.settings(options), "return_stats": return_stats}
    if error is None:
        dtype = validation.FLOAT_DTYPES.index(embeddings.dtype)
        mine = [0, len(embeddings), _wants_gradient(embeddings), dtype, zlib.crc32(repr(settings).encode())]
    else:
        mine = [1, 0, 0, 0, 0]
    everyone = start_gather(torch.tensor([mine], device=shard.weight.device), shard.group).wait().tolist()  # [P, 5]
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


def _target_and_hardest(rows: ShardRows, target: Tensor) -> Tensor:
    """`[2, N]`, of which the maximum over shards says whether a row's own centre is strictly the nearest."""
    own = torch.where(target >= 0, rows.stats.cos_target, -torch.inf)
    return torch.stack([own, rows.stats.hardest])


def _statistics(sums: Tensor, correct: Tensor, counted: Tensor, num_classes: int, dtype: torch.dtype) -> SFaceStats:
    intra, inter, cos_target, cos_other, dropped = (sums[:5].to(dtype) / counted).unbind(0)
    active_pairs, dense_pairs = sums[5:].unbind(0)
    return SFaceStats(
        intra=intra,
        inter=inter,
        cos_target=cos_target,
        cos_other=cos_other / num_classes,
        accuracy=correct.to(dtype) / counted,
        active_pairs=active_pairs.round().to(torch.int64),
        dropped=dropped,
        dense_share=(dense_pairs / (counted * num_classes)).to(dtype),
    )
