"""Choosing a and b: histograms of the angles of eq. (2), what they say about a pair (a, b), a suggestion, a plot.

    head = SFaceLoss(512, 85_742, angle_histogram=True)
    ...                                                  # train; head.angle_counter.reset() at each epoch's start
    histograms = head.angle_counter.histograms()
    print(angles.suggest(histograms).text())
    angles.plot(histograms, a=head.a, b=head.b).savefig("angles.png")

The plot needs matplotlib, which is imported when it is drawn; everything else needs torch alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import validation
from .histograms import BINS, NOWHERE, AngleCounter, AngleHistograms, add_to_bins, bin_of
from .ops import compute_dtype, prepare_labels
from .precision import full_precision
from .types import DEFAULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BINS",
    "RECIPES",
    "AngleCounter",
    "AngleHistograms",
    "Shares",
    "Suggestion",
    "count_angles",
    "plot",
    "shares",
    "suggest",
]

RECIPES = {  # (a, b) of the reference project, all with s = 64 and k = 80
    "default": (DEFAULTS.a, DEFAULTS.b),
    "CASIA-WebFace": (0.87, 1.20),
    "VGGFace2": (0.88, 1.25),
    "MS1MV2": (0.90, 1.20),
}
SMALLEST_GAP = 0.30  # radians between a and b, that of the MS1MV2 recipe: no published one has less
BLOCK_ELEMENTS = 1 << 20  # of N·block and D·block: cosines and unit rows that exist at once


class Shares(NamedTuple):
    """What a pair (a, b) does to the counted pairs. Shares, 0 … 1, each pair weighted with its sigmoid."""

    pulled: float  # of the targets: mean of sigmoid(k (θ_y − a)), eq. (3) over s
    pushed: float  # of the other pairs: mean of sigmoid(−k_inter (θ − b)), eq. (4) over s
    rows_pushed: float  # of the rows: the same mean over their nearest other classes


class Suggestion(NamedTuple):
    """An a and a b with the reasons for them, one sentence each."""

    a: float  # radians
    b: float  # radians
    reasons: tuple[str, ...]

    def text(self) -> str:
        return "\n".join((f"a = {self.a:.2f}, b = {self.b:.2f}", *self.reasons))


@torch.no_grad()
def count_angles(embeddings: Tensor, weight: Tensor, labels: Tensor, ignore_index: int = -100) -> AngleHistograms:
    """Exact histograms of all pairs, in blocks of classes: for embeddings and a weight that are there already.

    Args:
        embeddings, weight, labels, ignore_index: as in `sface_loss`.

    Returns:
        Counts on the device of the embeddings.

    Raises:
        TypeError, ValueError: as `sface_loss`.
    """
    validation.check_tensors(embeddings, weight, labels)
    target = prepare_labels(labels, weight.shape[0], validation.integer("ignore_index", ignore_index), True)  # [N]
    dtype = compute_dtype(embeddings, weight)
    unit = F.normalize(embeddings.to(dtype))  # [N, D]
    counts = torch.zeros(3, BINS + 1, dtype=torch.int64, device=unit.device)
    own, other, hardest = counts
    counted = target >= 0  # [N]
    nearest = unit.new_full([len(unit)], -torch.inf)  # [N], largest cosine to another class
    block = max(1, BLOCK_ELEMENTS // max(1, *embeddings.shape))
    for first in range(0, weight.shape[0], block):
        cos = full_precision(torch.mm)(unit, F.normalize(weight[first : first + block].to(dtype)).t())  # [N, block]
        is_own = target.unsqueeze(1) == torch.arange(first, first + cos.shape[1], device=unit.device)
        add_to_bins(own, bin_of(cos, is_own))
        add_to_bins(other, bin_of(cos, counted.unsqueeze(1) & ~is_own))
        nearest = torch.maximum(nearest, cos.masked_fill(is_own, -torch.inf).amax(1))
    add_to_bins(hardest, bin_of(nearest, counted & (nearest > -torch.inf)))
    return AngleHistograms(*counts[:, :NOWHERE].double())


def shares(
    histograms: AngleHistograms,
    a: float = DEFAULTS.a,
    b: float = DEFAULTS.b,
    k: float = DEFAULTS.k,
    k_inter: float | None = None,
) -> Shares:
    """How much of the pull and of the push of eqs. (3) and (4) is on, with the angles spread evenly within each bin.

    The nearest other classes are counted exactly, the others may be an estimate: it is never taken for less than they
    alone make certain. nan where nothing was counted.

    Raises:
        TypeError, ValueError: `k` or `k_inter` is no number > 0, or `a` or `b` no finite number.
    """
    target, other, hardest = (counts.cpu().double() for counts in histograms)
    k, a, b = validation.positive("k", k), validation.finite("a", a), validation.finite("b", b)
    k_inter = k if k_inter is None else validation.positive("k_inter", k_inter)
    push = 1 - _sigmoid_of_bins(k_inter, b)  # [BINS]
    pushed = torch.maximum((other * push).sum(), (hardest * push).sum()) / other.sum()
    return Shares(
        pulled=float((target * _sigmoid_of_bins(k, a)).sum() / target.sum()),
        pushed=float(pushed),
        rows_pushed=float((hardest * push).sum() / hardest.sum()),
    )


def suggest(histograms: AngleHistograms) -> Suggestion:
    """An a and a b that leave half of the rows to the pull and half of the rows to the push.

    b is the median angle to the nearest other class. A row is pushed at half force or more where another class is
    within b, so half of the rows have something to push away, whatever C and D are. a is the median angle to the own
    class: the closer half has been learned and is let go, the other half goes on being pulled. With wrong labels this
    median moves outwards, as their rows lie far from the class they were given. Between a and b stays a gap of at least
    SMALLEST_GAP, but where b itself is less: then a is 0, and a reason says that the embeddings have collapsed.

    It describes the weights that the angles were counted with, so take them from a training that has settled, or from
    the last epochs, and expect another suggestion after training with this one.

    Raises:
        ValueError: no target, or no other class, was counted.
    """
    target, _, hardest = (counts.cpu().double() for counts in histograms)
    if target.sum() == 0 or hardest.sum() == 0:
        raise ValueError("histograms: expected counts of targets and of other classes, got none: train a step first")
    nearest, own = _quantile(hardest, 0.5), _quantile(target, 0.5)
    b = round(nearest, 2)
    a = round(max(0.0, min(own, b - SMALLEST_GAP)), 2)
    far = f"half of the targets are farther than {own:.2f} rad from their class"
    reasons = [
        f"b: half of the rows have another class nearer than {nearest:.2f} rad, and are pushed from it",
        f"a: {far}, and go on being pulled" if own <= b - SMALLEST_GAP else far,
    ]
    if b < SMALLEST_GAP:
        reasons.append(
            f"half of the rows have another class nearer than {SMALLEST_GAP:.2f} rad, the smallest gap between a and b "
            "of a published recipe: the embeddings have collapsed onto each other, and no a has that gap here"
        )
    elif own > b - SMALLEST_GAP:
        reasons.append(
            f"a is kept {SMALLEST_GAP:.2f} below b, as in the published recipe with the smallest gap: the targets are "
            "not yet apart from the other classes, so look again later in the training"
        )
    share = float(target[round(b * BINS / math.pi) :].sum() / target.sum())
    reasons.append(f"{share:.1%} of the targets are farther than b from their class: wrong labels, or not yet learned")
    return Suggestion(a, b, tuple(reasons))


def _quantile(counts: Tensor, share: float) -> float:
    """The angle below which this share of the counts lies, with the angles spread evenly within each bin."""
    below = counts.cumsum(0)
    wanted = share * below[-1]
    i = int(torch.searchsorted(below, wanted).clamp(max=BINS - 1))
    inside = (wanted - (below[i] - counts[i])) / counts[i]
    return (i + float(inside)) * math.pi / BINS


def _sigmoid_of_bins(k: float, middle: float) -> Tensor:
    """Mean of sigmoid(k (θ − middle)) in each bin, `[BINS]` float64; the integral is softplus(k (θ − middle)) / k."""
    edges = torch.linspace(0, math.pi, BINS + 1, dtype=torch.float64, device="cpu")
    integral = torch.logaddexp(torch.zeros_like(edges), k * (edges - middle)) / k
    return integral.diff() * (BINS / math.pi)


def plot(
    histograms: AngleHistograms,
    a: float = DEFAULTS.a,
    b: float = DEFAULTS.b,
    k: float = DEFAULTS.k,
    k_inter: float | None = None,
    suggestion: Suggestion | None = None,
) -> Figure:
    """The three histograms as densities, and the rescale curves of eqs. (3) and (4), the suggested ones dashed.

    Returns:
        A `matplotlib.figure.Figure` of its own, which no window shows: `plot(…).savefig("angles.png")`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axis = figure.subplots()
    draw_histograms(axis, histograms)
    finish_axis(axis)
    right = draw_rescale(axis, k, a, b, k_inter)
    if suggestion is not None:
        draw_rescale(axis, k, suggestion.a, suggestion.b, k_inter, onto=right)
    return figure


def draw_histograms(
    axis: Axes, histograms: AngleHistograms, label: str = "", dash: Any = "-", fill: bool = True
) -> None:
    """Onto an axis of matplotlib: densities over the angle, named with `label` behind."""
    theta = (torch.arange(BINS, device="cpu") + 0.5) * (math.pi / BINS)
    kinds = (
        ("own class", histograms.target, "#16a34a"),
        ("nearest other class", histograms.hardest, "#d97706"),
        ("other classes", histograms.other, "#64748b"),
    )
    for name, counts, colour in kinds:
        counts = counts.cpu()
        density = counts / counts.sum().clamp_min(1) / (math.pi / BINS)
        if fill:
            axis.fill_between(theta, density, step="mid", color=colour, alpha=0.22, linewidth=0)
        axis.step(theta, density, where="mid", color=colour, linestyle=dash, linewidth=1.4, label=name + label)


def finish_axis(axis: Axes) -> None:
    """Labels, degrees along the top and a legend, once the histograms are drawn."""
    axis.set(xlabel="angle θ to a class centre (rad)", ylabel="density of pairs (1/rad)", xlim=(0, math.pi))
    axis.set_ylim(0, axis.get_ylim()[1] * 1.3)  # room for the names of a and b
    # below the rescale curves' 1, at the far side, where hardly an angle is
    axis.legend(loc="upper right", bbox_to_anchor=(1, 0.74), title="angle to the", frameon=False, fontsize=9)
    degrees = axis.secondary_xaxis("top", functions=(_to_degrees, _to_radians))
    degrees.set_xlabel("θ (degrees)")


def draw_rescale(
    axis: Axes, k: float, a: float, b: float, k_inter: float | None = None, onto: Axes | None = None
) -> Axes:
    """The two rescale curves, eqs. (3) and (4), as shares of s on a right-hand axis; dashed and lower named on the axis
    `onto` that a former call returned."""
    theta = torch.linspace(0, math.pi, 1000, dtype=torch.float64, device="cpu")
    suggested = onto is not None
    right = axis.twinx() if onto is None else onto
    right.grid(False)
    right.spines["right"].set_visible(True)
    right.set(ylabel="rescale, as a share of s", ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])
    style: dict[str, Any] = {"linestyle": (0, (4, 2)) if suggested else "-", "linewidth": 1.2 if suggested else 1.8}
    right.plot(theta, torch.sigmoid(k * (theta - a)), color="#15803d", **style)
    right.plot(theta, torch.sigmoid(-(k if k_inter is None else k_inter) * (theta - b)), color="#b91c1c", **style)
    names = ("a suggested", "b suggested") if suggested else ("intra, a", "inter, b")
    height = 1.15 if suggested else 1.03
    right.text(a + 0.02, height, f"{names[0]} = {a:.2f}", color="#15803d", fontsize=9, ha="right")
    right.text(b - 0.02, height, f"{names[1]} = {b:.2f}", color="#b91c1c", fontsize=9, ha="left")
    return right


def _to_degrees(radians: Any) -> Any:
    return radians * (180 / math.pi)


def _to_radians(degrees: Any) -> Any:
    return degrees * (math.pi / 180)
