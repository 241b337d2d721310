"""The PNG plots of a run. Each takes one curve per head, so that one head and several look alike."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

# Only files are drawn. A notebook's setting, inherited by what it starts, names a module that may be missing here, and
# then matplotlib cannot even be imported.
os.environ["MPLBACKEND"] = "agg"

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from .angles import BINS
from .files import write_file
from .verification import Verification

PLOTS = ("losses", "cosines", "roc", "angles")

STYLE = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "figure.dpi": 130,
    "legend.frameon": False,
}
# Drawn in this order; dashes let the curve below show through where two agree.
HEADS = {"fused": ("#2563eb", "-", 2.2), "reference": ("#f97316", (0, (4, 3)), 1.5)}


class Curves(NamedTuple):
    """What the plots show of one head's run."""

    steps: list[dict[str, float]]  # metrics["steps"]
    verification: Verification
    target_angles: Tensor  # [BINS] counts over 0 … π
    other_angles: Tensor  # [BINS]


def draw_all(runs: dict[str, Curves], options: dict[str, Any], folder: Path) -> list[Path]:
    """Writes losses.png, cosines.png, roc.png and angles.png into `folder` and returns their paths.

    Raises:
        OutputError: one cannot be written.
    """
    with matplotlib.style.context(STYLE, after_reset=True):  # reset: not the user's fonts, sizes or LaTeX
        figures = (
            _over_steps(
                runs,
                {
                    "loss": "loss = intra + inter",
                    "intra": "intra: pull to the own centre",
                    "inter": "inter: push from other centres",
                },
                "mean over the batch",
            ),
            _over_steps(
                runs,
                {"cos_target": "cosine to the own centre", "cos_other": "mean cosine to the other centres"},
                "mean cosine",
            ),
            _roc(runs),
            _angles(runs, options),
        )
        paths = [folder / f"{name}.png" for name in PLOTS]
        for path, figure in zip(paths, figures, strict=True):
            content = io.BytesIO()
            figure.savefig(content, format="png")
            write_file(path, content.getbuffer())
    return paths


def _smooth(values: Tensor, window: int) -> Tensor:
    """Mean over the last `window` steps, fewer at the start: `[T]` → `[T]`."""
    total = torch.cat((torch.zeros(1, dtype=values.dtype), values.cumsum(0)))
    end = torch.arange(1, len(values) + 1)
    start = (end - window).clamp(0)
    return (total[end] - total[start]) / (end - start)


def _over_steps(runs: dict[str, Curves], panels: dict[str, str], ylabel: str) -> Figure:
    figure = Figure(figsize=(4.6 * len(panels), 3.7), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, run in runs.items():
            if not run.steps:
                continue
            colour, dash, width = HEADS[name]
            step = torch.tensor([values["step"] for values in run.steps])
            values = torch.tensor([values[key] for values in run.steps], dtype=torch.float64)
            window = max(1, len(values) // 40)
            axis.plot(step, values, color=colour, alpha=0.18, linewidth=0.8)
            axis.plot(step, _smooth(values, window), color=colour, linestyle=dash, linewidth=width, label=name)
        axis.set(title=title, xlabel="training step")
        axis.margins(x=0.01)
    axes[0].set_ylabel(ylabel)
    axes[0].legend(title="head, smoothed", loc="best")
    return figure


def _roc(runs: dict[str, Curves]) -> Figure:
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axis = figure.subplots()
    lowest = 1e-3
    for name, run in runs.items():
        colour, dash, width = HEADS[name]
        far, tar = run.verification.roc
        lowest = min(lowest, 1 / run.verification.impostor_pairs)
        label = f"{name}: AUC {run.verification.auc:.4f}"
        axis.step(far, tar, where="post", color=colour, linestyle=dash, linewidth=width, label=label)
    chance = torch.logspace(math.log10(lowest), 0, 200)
    axis.plot(chance, chance, color="0.6", linewidth=1, linestyle=":", label="chance")
    axis.set(
        xscale="log",
        xlim=(lowest, 1),
        ylim=(0, 1.01),
        title="Verification on identities never seen in training",
        xlabel="false accept rate",
        ylabel="true accept rate",
    )
    axis.legend(loc="lower right")
    return figure


def _angles(runs: dict[str, Curves], options: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8.2, 4.4), layout="constrained")
    axis = figure.subplots()
    theta = (torch.arange(BINS) + 0.5) * (math.pi / BINS)
    for name, run in runs.items():
        _, dash, _ = HEADS[name]
        of_head = f" ({name})" if len(runs) > 1 else ""
        kinds = (("own centre", run.target_angles, "#16a34a"), ("other centres", run.other_angles, "#64748b"))
        for label, counts, colour in kinds:
            density = counts / counts.sum().clamp_min(1) / (math.pi / BINS)
            if name == next(iter(runs)):
                axis.fill_between(theta, density, step="mid", color=colour, alpha=0.22, linewidth=0)
            axis.step(theta, density, where="mid", color=colour, linestyle=dash, linewidth=1.4, label=label + of_head)
    axis.set(xlabel="angle θ to a class centre (rad)", ylabel="density of pairs (1/rad)", xlim=(0, math.pi))
    axis.set_ylim(0, axis.get_ylim()[1] * 1.25)  # room for the legend
    axis.legend(loc="upper right", ncols=2, title="training images, angle to the")
    _draw_rescale(axis, options)
    degrees = axis.secondary_xaxis("top", functions=(_to_degrees, _to_radians))
    degrees.set_xlabel("θ (degrees)")
    return figure


def _to_degrees(radians: Any) -> Any:
    return radians * (180 / math.pi)


def _to_radians(degrees: Any) -> Any:
    return degrees * (math.pi / 180)


def _draw_rescale(axis: Axes, options: dict[str, Any]) -> None:
    """The two rescale functions, equations (3) and (4), as shares of s on a right-hand axis."""
    k, a, b = (options[name] for name in "kab")
    theta = torch.linspace(0, math.pi, 1000, dtype=torch.float64)
    right = axis.twinx()
    right.grid(False)
    right.spines["right"].set_visible(True)
    right.plot(theta, torch.sigmoid(k * (theta - a)), color="#15803d", linewidth=1.8)
    right.plot(theta, torch.sigmoid(-k * (theta - b)), color="#b91c1c", linewidth=1.8)
    right.set(ylabel="rescale, as a share of s", ylim=(0, 1.25), yticks=[0, 0.25, 0.5, 0.75, 1])
    right.text(a + 0.02, 1.03, f"intra, a = {a:g}", color="#15803d", fontsize=9)
    right.text(b - 0.02, 1.09, f"inter, b = {b:g}", color="#b91c1c", fontsize=9, ha="right")
