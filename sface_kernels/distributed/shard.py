"""The loss of every row over one range of classes: what one process of a class-parallel head computes by itself.

SFace has no normaliser, so the results of shards that cover all classes add up to the result of the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import validation
from ..autograd import row_losses, row_losses_and_grad_x, weight_without_rows
from ..dispatch import select
from ..ops import prepare_labels
from ..pending import PendingGradient
from ..types import DEFAULTS, HyperParameters, Request, RowStats


class ShardRows(NamedTuple):
    """Results of one shard. Over all shards `loss`, the statistics and the counts add up, but for `hardest`, which is a
    maximum, and its class, the lowest `hardest_class` of the shards that have it.

    Only `loss` is differentiable.
    """

    loss: Tensor  # [N], this shard's part of l_i
    stats: RowStats  # six [N]
    hardest_class: Tensor  # [N] int64, the class of `stats.hardest` among all `num_classes`; −1 where there is none
    counts: Tensor  # [2] int64: pairs with a gradient; pairs computed by dense products
    grad_x: Tensor | None = None  # [N, D], ∂loss_i/∂x_i, where the class-parallel head wants it before the backward


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
        # of its classes the lowest: left.hardest_class where left.stats.hardest ≥ right.stats.hardest

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
    first, num_classes = validation.integer("first", first), validation.integer("num_classes", num_classes)
    if not 0 <= first <= num_classes - len(weight):
        raise ValueError(
            f"first: expected a range of classes within [0, {num_classes}), got [{first}, {first + len(weight)})"
        )
    hp = validation.make_hyperparameters(s, k, a, b, k_inter, filter_eps, embeddings.dtype, embeddings.shape[1])
    check = validation.checks_labels(embeddings.device)
    target = prepare_labels(labels, num_classes, ignore_index, check, first, len(weight))
    return shard_rows(embeddings, weight, target, hp, backend, first)


def harder_class(cosines: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the hardest cosines `[P, N]` of parts of the classes and its class `[N]`, the lowest of equals; −1
    where the cosine is not finite."""
    hardest = cosines.amax(0)  # [N]
    none = torch.iinfo(torch.int64).max
    lowest = torch.where(cosines == hardest, classes, none).amin(0)
    return hardest, torch.where(hardest.isfinite() & (lowest < none), lowest, -1)


def check_shard_pair(embeddings: Tensor, weight: Tensor) -> None:
    """`validation.check_pair`, but for a shard that may be empty."""
    has_rows = not isinstance(weight, Tensor) or weight.dim() != 2 or len(weight) > 0
    validation.check_pair(embeddings, weight if has_rows else weight.new_empty(1, weight.shape[1]))


def check_shard_tensors(embeddings: Tensor, weight: Tensor, labels: Tensor) -> None:
    """The checks of `sface_loss`, but for a shard that may be empty."""
    check_shard_pair(embeddings, weight)
    validation.check_classes(labels, embeddings, "labels", one_a_row=True)


def shard_rows(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    hp: HyperParameters,
    backend: str,
    first: int = 0,
    with_grad_x: bool = False,
    pending: PendingGradient | None = None,
) -> ShardRows:
    """`sface_shard_loss` after its checks, with the targets of `ops.prepare_labels`.

    With `with_grad_x` there is `grad_x`, and the loss is differentiable in the weight alone, whose gradient waits in
    `pending` where that is given.
    """
    chosen = select(backend, Request(embeddings.device, embeddings.dtype, weight.dtype, embeddings.shape[1]))
    if len(weight) == 0:
        rows = _no_classes(embeddings, weight_without_rows(embeddings, weight, target, chosen, hp, pending))
        return rows._replace(grad_x=rows.loss.new_zeros(embeddings.shape)) if with_grad_x else rows
    losses = row_losses_and_grad_x if with_grad_x else row_losses
    row_loss, row_stats, hardest_class, counts, *grad_x = losses(
        embeddings, weight, target, chosen, hp, backend != "auto", pending
    )
    hardest_class = torch.where(hardest_class < 0, -1, hardest_class + first)
    return ShardRows(row_loss, RowStats(*row_stats.unbind(0)), hardest_class, counts, *grad_x)


def _no_classes(embeddings: Tensor, weight: Tensor) -> ShardRows:
    """Zeros that both gradients can be asked of: a process without classes takes part in every collective."""
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    # sums over nothing, as 0·x would be NaN where x is
    loss = embeddings[:, :0].to(dtype).sum(1) + weight.to(dtype).sum()  # [N]
    zeros = torch.zeros_like(loss, requires_grad=False)
    stats = RowStats(zeros, zeros, zeros, zeros, torch.full_like(zeros, -torch.inf), zeros)
    no_class = torch.full_like(zeros, -1, dtype=torch.int64)
    return ShardRows(loss, stats, no_class, torch.zeros(2, dtype=torch.int64, device=loss.device))
