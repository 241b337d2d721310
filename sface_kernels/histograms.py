"""Histograms of the angles of eq. (2), counted on the device while a head trains. `angles` reads them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import compute_dtype
from .precision import without_autocast
from .types import IGNORED, INVALID, RowStats
from .validation import integer

BINS = 180  # of one degree each, over 0 … π
NOWHERE = (
    BINS  # an extra bin for what is not counted, so that nothing has to be filtered, which would wait for the device
)
FRACTION_BITS = 24  # of where a class is drawn within its part; classes · drawn · 2²⁴ stays below 2⁶³


class AngleHistograms(NamedTuple):
    """Numbers of pairs by their angle, each `[BINS]` float64: bin i holds the angles in [i, i+1)·π/BINS radians."""

    target: Tensor  # each row with its own class
    other: Tensor  # each row with every other class; where classes were drawn, an estimate of that
    hardest: Tensor  # each row with the nearest of its other classes


def bin_of(cos: Tensor, counted: Tensor) -> Tensor:
    """The bin of each cosine's angle, int64 of its shape; NOWHERE for NaN and where `counted` (bool) is False."""
    angle = cos.clamp(-1, 1).acos()
    place = (angle * (BINS / math.pi)).long().clamp(0, BINS - 1)  # π itself belongs to the last bin
    return torch.where(counted & (cos == cos), place, NOWHERE)


def add_to_bins(counts: Tensor, place: Tensor) -> None:
    """Add one to `counts` `[BINS + 1]` int64 for each element of `place`."""
    place = place.reshape(-1)
    counts.index_add_(0, place, torch.ones_like(place))  # bincount would wait for a GPU


class AngleCounter(nn.Module):
    """Counts the angles of every batch that passes through `sface_loss`, without an N×C tensor or a synchronisation.

    Exact: the angle of each row to its own class and to the nearest other class. Estimated: those to all other classes.
    For them each step compares the batch with `classes_per_step` classes, one drawn from each of as many equal parts of
    the weight, so that every class is as likely as any other; the counts are scaled to all pairs. With no more classes
    than that, everything is counted and nothing is estimated.

    Sampling error: a bin to which r drawn pairs fell is known to within a share of 1/√r of itself (one standard
    deviation), as long as pairs of one class do not crowd into it; if each class that reaches a bin does so with g rows
    of a batch, √(g/r). At N = 128 a thousand steps draw 8 million pairs: a bin with one in 10⁵ of all pairs is then
    known to 11 %. Rarer angles rest on the nearest classes, which are exact.

    The draws are a fixed pseudo-random sequence over the steps: PyTorch's generators are left alone, and a training run
    is the same to the bit with and without a counter.

    Nothing of it is saved: the state dict of a head stays `weight` alone, and loads where there is no counter. Save
    what `histograms` returns where it is wanted. Its buffers follow the head between devices. DistributedDataParallel
    copies rank 0's buffers to all, so they describe rank 0's rows. A forward that runs twice (activation checkpointing)
    counts twice, and `torch.func` transforms refuse the write.

    Args:
        classes_per_step: classes drawn a step, > 0.
        device: of the buffers.

    Raises:
        TypeError, ValueError: `classes_per_step` is no int > 0.
    """

    counts: Tensor
    steps: Tensor
    pairs: Tensor

    def __init__(self, classes_per_step: int = 64, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.classes_per_step = integer("classes_per_step", classes_per_step, positive=True)
        for name, shape in (("counts", (3, BINS + 1)), ("steps", ()), ("pairs", ())):
            # integers: head.half() leaves them as they are
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=device), persistent=False)

    def reset_parameters(self) -> None:
        """As it was made: no counts, and the draws from their beginning."""
        self.steps.zero_()
        self.reset()

    def reset(self) -> None:
        """Forget the counts, as at the start of an epoch. The draws go on."""
        self.counts.zero_()
        self.pairs.zero_()

    def histograms(self) -> AngleHistograms:
        """What was counted since the last `reset`, on the device; reading the numbers is what synchronises."""
        target, drawn, hardest = self.counts[:, :BINS].double()
        return AngleHistograms(target, drawn * (self.pairs / drawn.sum().clamp_min(1)), hardest)

    @torch.no_grad()
    def forward(self, embeddings: Tensor, weight: Tensor, target: Tensor, rows: RowStats) -> None:
        """Count one batch.

        Args:
            embeddings: `[N, D]`.
            weight: `[C, D]`, on the same device.
            target: `[N]`, of `ops.prepare_labels`.
            rows: of the backend's forward; its `cos_target` and `hardest` are read.

        Raises:
            ValueError: the counter is on another device.
        """
        if self.counts.device != weight.device:
            raise ValueError(f"angle_counter: expected it on {weight.device}, as the weight, got {self.counts.device}")
        counted = (target != IGNORED) & (target != INVALID)  # [N]
        own, drawn, hardest = self.counts
        add_to_bins(own, bin_of(rows.cos_target, target >= 0))
        add_to_bins(hardest, bin_of(rows.hardest, counted & (rows.hardest > -torch.inf)))

        classes = self._draw(weight.shape[0])  # [m]
        dtype = compute_dtype(embeddings, weight)
        with without_autocast(weight.device):
            cos = F.normalize(embeddings.to(dtype)) @ F.normalize(weight[classes].to(dtype)).t()  # [N, m]
        is_other = counted.unsqueeze(1) & (target.unsqueeze(1) != classes)
        add_to_bins(drawn, bin_of(cos, is_other))
        self.pairs += counted.sum() * weight.shape[0] - (target >= 0).sum()
        self.steps += 1

    def _draw(self, classes: int) -> Tensor:
        """One class from each of min(classes_per_step, classes) equal parts of 0 … classes − 1, ascending."""
        size = min(self.classes_per_step, classes)
        part = torch.arange(size, device=self.steps.device)
        fraction = _scrambled(self.steps * size + part) >> (32 - FRACTION_BITS)
        return ((part << FRACTION_BITS) + fraction) * classes // (size << FRACTION_BITS)


def _scrambled(number: Tensor) -> Tensor:
    """A hash of 32 bits, for random numbers without a generator's state. The constants are Wellons' (hash-prospector);
    both are below 2³¹, so that no product leaves int64."""
    number = number & 0xFFFFFFFF
    number = ((number ^ (number >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    number = ((number ^ (number >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return number ^ (number >> 15)
