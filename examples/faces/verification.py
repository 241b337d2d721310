"""Verification: are two faces the same person? Scores of pairs, ROC, and the figures read off it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import FaceSet, to_input

MAX_IMAGES = 1000  # ≈ 500 000 pairs: a FAR of 1e-3 rests on 500 impostor pairs
FARS = (1e-1, 1e-2, 1e-3)


class Verification(NamedTuple):
    """How well one threshold on the cosine tells people apart. Shares, 0 … 1."""

    auc: float
    accuracy: float  # mean over folds, threshold of the other folds
    tar: dict[str, float]  # true accept rate at each false accept rate, keyed "1e-03"
    genuine_pairs: int
    impostor_pairs: int
    roc: tuple[Tensor, Tensor]  # false and true accept rates [P], both ascending


@torch.no_grad()
def embed(backbone: nn.Module, images: Tensor, device: torch.device, batch_size: int = 256) -> Tensor:
    """Flip-sum embeddings, L2-normalised: `[M, H, W]` uint8 → `[M, D]` on the CPU. Leaves the training mode as it was."""
    was_training = backbone.training
    backbone.eval()
    parts = []
    for part in images.split(batch_size):
        x = to_input(part, device)
        parts.append(F.normalize(backbone(x) + backbone(x.flip(3))).cpu())
    backbone.train(was_training)
    return torch.cat(parts)


def verify(backbone: nn.Module, faces: FaceSet, device: torch.device) -> Verification:
    """All pairs of (at most MAX_IMAGES of) the faces, with the cosine of their flip-sum embeddings as the score."""
    rows = _evenly(faces.labels, MAX_IMAGES)
    embeddings = embed(backbone, faces.images[rows], device)
    scores, same = all_pairs(embeddings, faces.labels[rows])
    far, tar = roc(scores, same)
    return Verification(
        auc=area(far, tar),
        accuracy=fold_accuracy(scores, same),
        tar={f"{limit:.0e}": tar_at_far(far, tar, limit) for limit in FARS},
        genuine_pairs=int(same.sum()),
        impostor_pairs=int((~same).sum()),
        roc=(far, tar),
    )


def _evenly(labels: Tensor, limit: int) -> Tensor:
    """Rows of at most `limit` images: everyone's first, everyone's second, … as far as they go.

    Of more than limit / 4 people, those with the most images take part, so that there are genuine pairs.
    """
    people = labels.bincount().argsort(descending=True, stable=True)[: max(2, limit // 4)]
    rows = torch.isin(labels, people).nonzero().squeeze(1)
    rows = rows[labels[rows].argsort(stable=True)]  # person by person
    first = torch.searchsorted(labels[rows], labels[rows])  # where each person's run starts
    turn = torch.arange(len(rows)) - first  # 0, 1, 2, … within a person
    return rows[turn.argsort(stable=True)[:limit]].sort().values


def all_pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of the M(M−1)/2 pairs of unit rows `[M, D]`, and whether both images show the same person (bool)."""
    i, j = torch.triu_indices(len(labels), len(labels), 1)
    return (embeddings @ embeddings.t())[i, j], labels[i] == labels[j]


def roc(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """False and true accept rates `[P]` at every threshold that tells pairs apart, from (0, 0) to (1, 1), float64.

    Args:
        scores: `[pairs]`, higher is more alike. Equal scores are accepted together.
        same: `[pairs]` bool, with both values present.
    """
    ordered, by_score = scores.sort(descending=True)
    genuine = same[by_score].double().cumsum(0)  # accepted, with the threshold just below each score
    impostor = (~same[by_score]).double().cumsum(0)
    last = torch.cat((ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)))  # of a run of equal scores
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat((zero, impostor[last] / impostor[-1])), torch.cat((zero, genuine[last] / genuine[-1]))


def area(far: Tensor, tar: Tensor) -> float:
    """Area under the ROC: the share of (genuine, impostor) pairs of pairs in the right order, ties half."""
    return float(torch.trapezoid(tar, far))


def tar_at_far(far: Tensor, tar: Tensor, limit: float) -> float:
    """The highest true accept rate whose false accept rate does not exceed `limit`."""
    return float(tar[far <= limit].max())


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """The threshold (accept where score > threshold) with the most right decisions, midway between two scores."""
    ordered, by_score = scores.sort(descending=True)
    gain = torch.where(same[by_score], 1, -1).cumsum(0)  # right decisions gained by accepting down to each score
    gain[:-1][ordered[1:] == ordered[:-1]] = -len(gain) - 1  # no threshold cuts between equal scores
    at = int(gain.argmax())
    if gain[at] <= 0:
        return float(ordered[0]) + 1  # accepting nothing is best
    if at + 1 == len(ordered):
        return float(ordered[-1]) - 1
    return float(ordered[at].double() + ordered[at + 1].double()) / 2


def fold_accuracy(scores: Tensor, same: Tensor, folds: int = 10) -> float:
    """Accuracy with the threshold that is best on the other folds, mean over folds.

    As many impostor as genuine pairs take part (the rarer kind decides, the others are drawn at random, always the
    same), and each fold holds both in equal numbers, so that chance is 0.5. With fewer pairs than folds there are
    fewer folds; with one pair of a kind the threshold is chosen on the pairs it is tried on.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = [kind.nonzero().squeeze(1) for kind in (same, ~same)]
    count = min(len(kind) for kind in kinds)
    folds = min(folds, count)
    drawn = torch.stack([kind[torch.randperm(len(kind), generator=generator)[:count]] for kind in kinds])  # [2, count]
    fold = torch.arange(count).remainder(folds).expand(2, -1)
    right = []
    for held_out in range(folds):
        test = drawn[fold == held_out]
        others = drawn[fold != held_out] if folds > 1 else test
        threshold = best_threshold(scores[others], same[others])
        right.append(((scores[test].double() > threshold) == same[test]).double().mean())
    return float(torch.stack(right).mean())
