"""Histograms of the angles of eq. (2), counted on the device while a head trains. `angles` reads them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import compute_dtype
from .precision import full_precision
from .tracing import traced
from .types import NORM_EPS, RowStats
from .validation import integer

BINS = 180  # of one degree each, over 0 … π
NOWHERE = (
    BINS  # an extra bin for what is not counted, so that nothing has to be filtered, which would wait for the device
)
FRACTION_BITS = 24  # of where a class is drawn within its part
GOLDEN = 0x9E3779B1  # 2³² over the golden ratio, made odd: its multiples modulo 2³² fill that range evenly
ROOT_2 = 0x6A09E667  # 2³² times what √2 has beyond 1, which no multiple of the other meets
NO_CLASS = -100  # no value of a target


class AngleHistograms(NamedTuple):
    """Numbers of pairs by their angle, each `[BINS]` float64: bin i holds the angles in [i, i+1)·π/BINS radians."""

    target: Tensor  # each row with its own class
    other: Tensor  # each row with every other class; where classes were drawn, an estimate of that
    hardest: Tensor  # each row with the nearest of its other classes


def bin_of(cos: Tensor, counted: Tensor) -> Tensor:
    """The bin of each cosine's angle, int64 of its shape; NOWHERE for NaN, −inf and where `counted` (bool) is False."""
    angle = cos.clamp(-1, 1).acos()
    place = (angle * (BINS / math.pi)).long().clamp(max=BINS - 1)  # π itself belongs to the last bin
    return torch.where(counted & (cos > -2), place, NOWHERE)


def add_to_bins(counts: Tensor, place: Tensor) -> None:
    """Add one to `counts` (int64, flat) for each element of `place`."""
    place = place.reshape(-1)
    counts.index_add_(0, place, torch.ones_like(place))  # bincount would wait for a GPU


class AngleCounter(nn.Module):
    """Counts the angles of batches that pass through `sface_loss`, without an N×C tensor or a synchronisation.

    Exact: the angle of each row to its own class, and to the nearest other class as `SFaceRowStats.cos_hardest` has it
    (in rows without an active pair a screen may round that cosine). Estimated: those to all other classes.
    For them each step compares the batch with `classes_per_step` classes, one drawn from each of as many equal parts of
    the weight, so that every class is as likely as any other; the counts are scaled to all pairs. With no more classes
    than that, everything is counted and nothing is estimated.

    Sampling error: a bin to which r drawn pairs fell is known to within a share of 1/√r of itself (one standard
    deviation), as long as pairs of one class do not crowd into it; if each class that reaches a bin does so with g rows
    of a batch, √(g/r). At N = 128 a thousand counted batches draw 8 million pairs: a bin with one in 10⁵ of all pairs
    is then known to 11 %. Rarer angles rest on the nearest classes, which are exact.

    One batch in `every` is counted, the first after a `reset` among them. Counting is some forty small operations,
    and their number is what costs: a version with seventy took 1.6 to 2.2 ms at N = 128, C = 85,742, D = 512, about 5 %
    of a step on a CPU, whether 64 or 256 classes were drawn. A compiled graph, where they are fused, counts every
    batch. A captured CUDA graph repeats what the captured call did: set `every` to 1 there.

    The draws are a fixed sequence over the steps, in each part Weyl's with the golden ratio, which reaches all of its
    classes evenly. PyTorch's generators are left alone, and a training is the same to the bit with and without a
    counter.

    Nothing of it is saved: the state dict of a head stays `weight` alone, and loads where there is no counter. Save
    what `histograms` returns where it is wanted. Its buffers follow the head between devices. DistributedDataParallel
    copies rank 0's buffers to all, so they describe rank 0's rows. A forward that runs twice (activation checkpointing)
    counts twice, and `torch.func` transforms refuse the write.

    Args:
        classes_per_step: classes drawn a step, > 0.
        every: one call in so many is counted, > 0.
        device: of the buffers.

    Raises:
        TypeError, ValueError: `classes_per_step` or `every` is no int > 0.
    """

    counts: Tensor
    steps: Tensor

    def __init__(self, classes_per_step: int = 64, every: int = 4, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.every = integer("every", every, positive=True)
        self.calls = 0  # since the last reset
        self.classes_per_step = integer("classes_per_step", classes_per_step, positive=True)
        self.classes = 1  # C of the batches counted
        for name, shape in (("counts", (3, BINS + 1)), ("steps", ())):
            # integers: head.half() leaves them as they are
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device=device), persistent=False)

    def reset_parameters(self) -> None:
        """As it was made: no counts, and the draws from their beginning."""
        self.steps.zero_()
        self.reset()

    def _apply(self, *args: Any, **kwargs: Any) -> AngleCounter:
        was_meta = self.counts.is_meta
        super()._apply(*args, **kwargs)
        if was_meta and not self.counts.is_meta:  # to_empty leaves what the memory held, and no checkpoint has counts
            self.reset_parameters()
        return self

    def reset(self) -> None:
        """Forget the counts, as at the start of an epoch, and before the number of classes changes. The draws go on."""
        self.counts.zero_()
        self.calls = 0

    def histograms(self) -> AngleHistograms:
        """What was counted since the last `reset`, on the device; reading the numbers is what synchronises."""
        target, hardest, drawn = self.counts[:, :BINS].double()
        others = target.sum() * (self.classes - 1)
        return AngleHistograms(target, drawn * (others / drawn.sum().clamp_min(1)), hardest)

    @torch.no_grad()
    def forward(self, embeddings: Tensor, weight: Tensor, target: Tensor, rows: RowStats) -> None:
        """Count one batch, if it is its turn.

        Args:
            embeddings: `[N, D]`.
            weight: `[C, D]`, on the same device.
            target: `[N]`, of `ops.prepare_labels`.
            rows: of the backend's forward; its `cos_target` and `hardest` are read.

        Raises:
            ValueError: the counter is on another device.
        """
        if self.counts.is_meta and not weight.is_meta:  # load_state_dict(assign=True) gave the weight alone a device
            self.to_empty(device=weight.device)
        if self.counts.device != weight.device:
            raise ValueError(f"angle_counter: expected it on {weight.device}, as the weight, got {self.counts.device}")
        if not traced():  # a number that changes with each call would be a graph for each
            self.calls += 1
            if (self.calls - 1) % self.every:
                return
        # Few operations: after the forward has streamed w through the caches, each costs more than its size does
        classes = self._draw(weight.shape[0])  # [m]
        dtype = compute_dtype(embeddings, weight)
        x, w = embeddings.to(dtype), weight[classes].to(dtype)  # [N, D], [m, D]
        norms = [torch.linalg.vector_norm(t, dim=1).clamp_min(NORM_EPS) for t in (x, w)]  # [N], [m]
        cos = full_precision(torch.mm)(x, w.t()) / (norms[0].unsqueeze(1) * norms[1])  # [N, m]
        cos = torch.cat((rows.cos_target.unsqueeze(1), rows.hardest.unsqueeze(1), cos), 1)  # [N, 2 + m]
        row = target.unsqueeze(1)
        place = bin_of(cos, (row >= 0) & (row != F.pad(classes, (2, 0), value=NO_CLASS)))  # [N, 2 + m]
        place[:, 1:] += BINS + 1  # into the second row of counts
        place[:, 2:] += BINS + 1  # and the third
        add_to_bins(self.counts.view(-1), place)
        self.steps += 1
        self.classes = weight.shape[0]

    def _draw(self, classes: int) -> Tensor:
        """One class from each of min(classes_per_step, classes) equal parts of 0 … classes − 1, ascending."""
        size = min(self.classes_per_step, classes)
        part = torch.arange(size, device=self.steps.device)
        fraction = (self.steps * GOLDEN + part * ROOT_2 & 0xFFFFFFFF) >> (32 - FRACTION_BITS)
        return (part * classes + (fraction * classes >> FRACTION_BITS)) // size
