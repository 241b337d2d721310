"""The loss of every row over one range of classes: what one process of a class-parallel head computes by itself.

SFace has no normaliser, so the results of shards that cover all classes add up to the result of the whole.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from .. import validation
from ..autograd import row_losses
from ..dispatch import select
from ..ops import prepare_labels
from ..types import DEFAULTS, HyperParameters, Request, RowStats


class ShardRows(NamedTuple):
    """Results of one shard. Over all shards `loss`, the statistics and the counts add up, and `hardest` is a maximum.

    Only `loss` is differentiable.
    """

    loss: Tensor  # [N], this shard's part of l_i
    stats: RowStats  # six [N]
    counts: Tensor  # [2] int64: pairs with a gradient; pairs computed by dense products


def sface_shard_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    first: int,
    num_classes: int,
    s: float = DEFAULTS.s,
    k: float = DEFAULTS.k,
    a: float = DEFAULTS.a,
    b: float = DEFAULTS.b,
    k_inter: float | None = None,
    ignore_index: int = -100,
    filter_eps: float | None = None,
    backend: str = "auto",
) -> ShardRows:
    """Row losses of `sface_loss` over the classes [first, first + len(weight)) only; nothing is communicated.

    Equivalent PyTorch for two shards::

        whole = sface_loss(x, w, labels, reduction="none")
        left = sface_shard_loss(x, w[:5], labels, first=0, num_classes=len(w))
        right = sface_shard_loss(x, w[5:], labels, first=5, num_classes=len(w))
        assert_close(left.loss + right.loss, whole)
        hardest_other_cosine = torch.maximum(left.stats.hardest, right.stats.hardest)

    A row whose class lies elsewhere has no target here: only the inter-class term, and `cos_target` 0.

    Args:
        embeddings: `[N, D]`, as in `sface_loss`.
        weight: `[len, D]`, the rows of this shard; `len` may be 0.
        labels: `[N]` or `[N, 1]`, class numbers in [0, num_classes) (not counted from `first`) or `ignore_index`.
        first: number of the class whose centre is `weight[0]`.
        num_classes: C, number of classes of all shards together.
        s, k, a, b, k_inter, ignore_index, filter_eps, backend: as in `sface_loss`.

    Raises:
        TypeError, ValueError, RuntimeError: as `sface_loss`; ValueError if the range is not within [0, num_classes).
    """
    check_shard_tensors(embeddings, weight, labels)
    ignore_index = validation.integer("ignore_index", ignore_index)
    if not 0 <= first <= num_classes - len(weight):
        raise ValueError(
            f"first: expected a range of classes within [0, {num_classes}), got [{first}, {first + len(weight)})"
        )
    hp = validation.make_hyperparameters(s, k, a, b, k_inter, filter_eps, embeddings.dtype, embeddings.shape[1])
    target = prepare_labels(labels, num_classes, ignore_index, checks_labels(embeddings), first, len(weight))
    return shard_rows(embeddings, weight, target, hp, backend)


def check_shard_tensors(embeddings: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The checks of `sface_loss`, but for a shard that may be empty."""
    has_rows = not isinstance(weight, Tensor) or weight.dim() != 2 or len(weight) > 0
    validation.check_tensors(embeddings, weight if has_rows else weight.new_empty(1, weight.shape[1]), labels)


def checks_labels(embeddings: Tensor) -> bool:
    """Whether labels out of range raise: on a GPU that synchronises, and is left to the environment."""
    return embeddings.device.type == "cpu" or os.environ.get("SFACE_CHECK_LABELS") == "1"


def shard_rows(embeddings: Tensor, weight: Tensor, target: Tensor, hp: HyperParameters, backend: str) -> ShardRows:
    """`sface_shard_loss` after its checks, with the targets of `ops.prepare_labels`."""
    chosen = select(backend, Request(embeddings.device, embeddings.dtype, weight.dtype, embeddings.shape[1]))
    if len(weight) == 0:
        return _no_classes(embeddings, weight)
    row_loss, row_stats, counts = row_losses(embeddings, weight, target, chosen, hp, backend != "auto")
    return ShardRows(row_loss, RowStats(*row_stats.unbind(0)), counts)


def _no_classes(embeddings: Tensor, weight: Tensor) -> ShardRows:
    """Zeros that both gradients can be asked of: a process without classes takes part in every collective."""
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    # sums over nothing, as 0·x would be NaN where x is
    loss = embeddings[:, :0].to(dtype).sum(1) + weight.to(dtype).sum()  # [N]
    zeros = torch.zeros_like(loss, requires_grad=False)
    stats = RowStats(zeros, zeros, zeros, zeros, torch.full_like(zeros, -torch.inf), zeros)
    return ShardRows(loss, stats, torch.zeros(2, dtype=torch.int64, device=loss.device))
