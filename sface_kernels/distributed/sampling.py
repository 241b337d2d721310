"""Part of the classes a step: all classes of the batch and a random share of the others, so weighted that the expected
loss and gradient are those of all classes. It trades variance for time."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import NO_TARGET, HyperParameters, RowStats
from .layout import derived_seed
from .shard import ShardRows, harder_class, shard_rows


class Sampling(NamedTuple):
    """Which sample a step takes: the same numbers give the same classes."""

    rate: float  # share of the classes outside the batch, in (0, 1)
    seed: int
    step: int


def check_sample_rate(rate: float) -> None:
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise TypeError(f"sample_rate: expected a number, got {rate!r}")
    if not 0 < rate <= 1:
        raise ValueError(f"sample_rate: expected a number in (0, 1], got {rate!r}")


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


def sampled_rows(
    embeddings: Tensor,
    weight: Tensor,
    target: Tensor,
    hp: HyperParameters,
    backend: str,
    near: Tensor,
    drawn: Tensor,
    first: int = 0,
) -> ShardRows:
    """`shard_rows` over the classes `near` of the batch and those `drawn` of the others, whose terms are divided by the
    probability that a class is drawn. Copies these rows of the weight; the other rows' gradients are exact zeros.

    `inter`, `cos_other_sum` and `dropped` are estimates likewise; `hardest` is the maximum over these classes only.
    """
    others = len(weight) - len(near)
    place = torch.full((len(weight),), NO_TARGET, dtype=torch.int64, device=target.device)
    place[near] = torch.arange(len(near), device=target.device)
    has_target = target >= 0
    place_in_near = torch.where(has_target, place[target.clamp_min(0)] if len(weight) else NO_TARGET, target)
    close = shard_rows(embeddings, weight.index_select(0, near), place_in_near, hp, backend)
    far_target = torch.where(has_target, NO_TARGET, target)
    far = shard_rows(embeddings, weight.index_select(0, drawn), far_target, hp, backend)
    scale = others / max(len(drawn), 1)
    cosines = torch.stack([close.stats.hardest, far.stats.hardest])  # [2, N]
    classes = torch.stack([_numbers(close.hardest_class, near, first), _numbers(far.hardest_class, drawn, first)])
    hardest, hardest_class = harder_class(cosines, classes)
    stats = RowStats(
        intra=close.stats.intra + far.stats.intra,
        inter=close.stats.inter + scale * far.stats.inter,
        cos_target=close.stats.cos_target,
        cos_other_sum=close.stats.cos_other_sum + scale * far.stats.cos_other_sum,
        hardest=hardest,
        dropped=close.stats.dropped + scale * far.stats.dropped,
    )
    return ShardRows(close.loss + scale * far.loss, stats, hardest_class, close.counts + far.counts)


def _numbers(place: Tensor, classes: Tensor, first: int) -> Tensor:
    """Of places `[N]` in `classes`, −1 for none, the numbers of these classes."""
    if len(classes) == 0:
        return place
    return torch.where(place < 0, -1, classes[place.clamp_min(0)] + first)
