"""Part of the classes a step: all classes of the batch and a random share of the others, so weighted that the expected
loss and gradient are those of all classes. It trades variance for time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import validation
from ..types import NO_TARGET, HyperParameters, RowStats
from .layout import derived_seed
from .shard import ShardRows, harder_class, shard_rows


class Sampling(NamedTuple):
    """Which sample a step takes: the same numbers give the same classes."""

    rate: float  # share of the classes outside the batch, in (0, 1)
    seed: int
    step: int


def check_sample_rate(rate: float) -> float:
    number = validation.finite("sample_rate", rate)
    if not 0 < number <= 1:
        raise ValueError(f"sample_rate: expected a number in (0, 1], got {rate!r}")
    return number


def split_classes(target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """This shard's classes that are in the batch, and the others, both ascending. Waits for the device."""
    in_batch = torch.zeros(count, dtype=torch.bool, device=target.device)
    in_batch[target[target >= 0]] = True
    return in_batch.nonzero().squeeze(1), in_batch.logical_not().nonzero().squeeze(1)


def draw(others: Tensor, sampling: Sampling, first: int) -> Tensor:
    """⌈rate · len⌉ of `others`, every subset of that size equally likely, ascending."""
    generator = torch.Generator(others.device).manual_seed(derived_seed(sampling.seed, sampling.step, first))
    size = math.ceil(sampling.rate * len(others))
    return others[torch.randperm(len(others), generator=generator, device=others.device)[:size].sort().values]


class SampledClasses(NamedTuple):
    """What a step compares with, copied out of the shard: the classes of the batch, and those drawn of the others."""

    near: Tensor  # [near, D]
    near_target: Tensor  # [N], places in `near`, or the codes of `ops.prepare_labels`
    near_class: Tensor  # [near], their numbers among all classes
    far: Tensor  # [drawn, D]
    far_target: Tensor  # [N], codes only
    far_class: Tensor  # [drawn]
    scale: float  # 1 / the probability that one of the others is drawn


def take_classes(weight: Tensor, target: Tensor, near: Tensor, drawn: Tensor, first: int = 0) -> SampledClasses:
    """Copies rows of the weight, and needs no embeddings for it. Rows not taken get exact zeros as gradients."""
    place = torch.full((len(weight),), NO_TARGET, dtype=torch.int64, device=target.device)
    place[near] = torch.arange(len(near), device=target.device)
    has_target = target >= 0
    return SampledClasses(
        near=weight.index_select(0, near),
        near_target=torch.where(has_target, place[target.clamp_min(0)] if len(weight) else NO_TARGET, target),
        near_class=near + first,
        far=weight.index_select(0, drawn),
        far_target=torch.where(has_target, NO_TARGET, target),
        far_class=drawn + first,
        scale=(len(weight) - len(near)) / max(len(drawn), 1),
    )


def sample_classes(weight: Tensor, target: Tensor, sampling: Sampling, first: int) -> SampledClasses:
    """What this shard compares with in one step."""
    near, others = split_classes(target, len(weight))
    return take_classes(weight, target, near, draw(others, sampling, first), first)


def sampled_rows(
    embeddings: Tensor, classes: SampledClasses, hp: HyperParameters, backend: str, with_grad_x: bool = False
) -> ShardRows:
    """`shard_rows` over the classes of the batch and those drawn of the others, whose terms are multiplied by `scale`.

    `inter`, `cos_other_sum` and `dropped` are estimates likewise; `hardest` is the maximum over these classes only.
    """
    close = shard_rows(embeddings, classes.near, classes.near_target, hp, backend, with_grad_x=with_grad_x)
    far = shard_rows(embeddings, classes.far, classes.far_target, hp, backend, with_grad_x=with_grad_x)
    scale = classes.scale
    cosines = torch.stack([close.stats.hardest, far.stats.hardest])  # [2, N]
    numbers = [
        _numbers(rows.hardest_class, held) for rows, held in ((close, classes.near_class), (far, classes.far_class))
    ]
    hardest, hardest_class = harder_class(cosines, torch.stack(numbers))
    stats = RowStats(
        intra=close.stats.intra + far.stats.intra,
        inter=close.stats.inter + scale * far.stats.inter,
        cos_target=close.stats.cos_target,
        cos_other_sum=close.stats.cos_other_sum + scale * far.stats.cos_other_sum,
        hardest=hardest,
        dropped=close.stats.dropped + scale * far.stats.dropped,
    )
    grad_x = None
    if close.grad_x is not None and far.grad_x is not None:
        grad_x = close.grad_x.add(far.grad_x, alpha=scale)
    return ShardRows(close.loss + scale * far.loss, stats, hardest_class, close.counts + far.counts, grad_x)


def _numbers(place: Tensor, classes: Tensor) -> Tensor:
    """Of places `[N]` in `classes`, −1 for none, the numbers of these classes."""
    if len(classes) == 0:
        return place
    return torch.where(place < 0, -1, classes[place.clamp_min(0)])
