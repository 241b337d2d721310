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

from sface_kernels.angles import AngleHistograms, draw_histograms, draw_rescale, finish_axis

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
HEADS = {
    "fused": ("#2563eb", "-", 2.2),
    "reference": ("#f97316", (0, (4, 3)), 1.5),
    "arcface": ("#7c3aed", "-", 2.2),
}


class Curves(NamedTuple):
    """What the plots show of one head's run."""

    steps: list[dict[str, float]]  # metrics["steps"]
    verification: Verification
    angles: AngleHistograms


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
            _write(figure, path)
    return paths


def _write(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_file(path, content.getbuffer())


def _smooth(values: Tensor, window: int) -> Tensor:
    """Mean over the last `window` steps, fewer at the start: `[T]` → `[T]`."""
    total = torch.cat((torch.zeros(1, dtype=values.dtype), values.cumsum(0)))
    end = torch.arange(1, len(values) + 1)
    start = (end - window).clamp(0)
    return (total[end] - total[start]) / (end - start)


def _curve(axis: Axes, steps: list[dict[str, float]], key: str, name: str) -> None:
    colour, dash, width = HEADS[name]
    step = torch.tensor([values["step"] for values in steps])
    values = torch.tensor([values[key] for values in steps], dtype=torch.float64)
    axis.plot(step, values, color=colour, alpha=0.18, linewidth=0.8)
    smooth = _smooth(values, max(1, len(values) // 40))
    axis.plot(step, smooth, color=colour, linestyle=dash, linewidth=width, label=name)


def _over_steps(runs: dict[str, Curves], panels: dict[str, str], ylabel: str) -> Figure:
    figure = Figure(figsize=(4.6 * len(panels), 3.7), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, run in runs.items():
            if run.steps:
                _curve(axis, run.steps, key, name)
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
    for name, run in runs.items():
        of_head = f" ({name})" if len(runs) > 1 else ""
        draw_histograms(axis, run.angles, of_head, HEADS[name][1], fill=name == next(iter(runs)))
    finish_axis(axis)
    if "arcface" not in runs:
        draw_rescale(axis, *(options[name] for name in "kab"))
    return figure


def draw_live(
    steps: list[dict[str, float]], angles: AngleHistograms | None, name: str, options: dict[str, Any], path: Path
) -> None:
    """Writes one picture of a training that goes on: the loss, and the angles of this epoch's batches or else cosines.

    Raises:
        OutputError: it cannot be written.
    """
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 3))
        _curve(left, steps, "loss", name)
        left.set(title=f"{name}: loss", xlabel="training step")
        if angles is None:
            _curve(right, steps, "cos_target", name)
            right.set(title="mean cosine to the own centre", xlabel="training step")
        else:
            draw_histograms(right, angles)
            finish_axis(right)
            draw_rescale(right, *(options[key] for key in "kab"))
        _write(figure, path)
