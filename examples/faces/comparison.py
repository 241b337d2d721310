"""Two heads trained from the same seed, side by side."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import Tensor

from .files import write_json
from .head_memory import measure
from .heads import BACKENDS
from .options import TrainOptions
from .plots import Curves, draw_all
from .record import METRICS, verification_json

FIRST_STEPS = 10  # before rounding has grown: from here on two runs of even the same head may drift


class HeadRun(NamedTuple):
    """A finished training run of one head."""

    curves: Curves
    metrics: dict[str, Any]
    weight: Tensor  # [C, D]
    embeddings: Tensor  # [N, D], a batch of the trained backbone
    labels: Tensor  # [N]


def compare(runs: dict[str, HeadRun], options: TrainOptions, console: Console) -> list[Path]:
    """Prints the side-by-side table, writes the common metrics.json and plots, and returns the plots' paths."""
    summaries = {name: _summary(name, run, options) for name, run in runs.items()}
    agreement = curve_agreement(*(run.curves.steps for run in runs.values()))
    content = {"options": options.as_json(), "heads": summaries, "agreement": agreement}
    write_json(options.out / METRICS, content)
    _print(summaries, agreement, next(iter(runs.values())), console)
    return draw_all({name: run.curves for name, run in runs.items()}, options.as_json(), options.out)


def _summary(name: str, run: HeadRun, options: TrainOptions) -> dict[str, Any]:
    steps = run.curves.steps
    constants = {key: getattr(options, key) for key in ("s", "k", "a", "b")}
    tail = steps[-max(1, len(steps) // 20) :]
    return {
        "head_ms_median": statistics.median(step["head_ms"] for step in steps),
        "step_ms_median": statistics.median(step["step_ms"] for step in steps),
        "head_peak_mib": measure(BACKENDS[name], run.weight, run.embeddings, run.labels, constants),
        "seconds": sum(epoch["seconds"] for epoch in run.metrics["epochs"]),
        "final_loss": statistics.fmean(step["loss"] for step in tail),
        "verification": verification_json(run.curves.verification),
    }


def curve_agreement(one: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float]:
    """How far two runs' losses are apart, per step, in units of the loss.

    Returns:
        `first_steps_max`: largest difference in the first FIRST_STEPS steps; `first_steps_loss_max`: largest loss
        there, for scale; `all_steps_mean`: mean difference of the whole runs; `all_steps_deviation`: standard
        deviation of the first run's loss over its steps, for scale.
    """
    losses = [(a["loss"], b["loss"]) for a, b in zip(one, other, strict=False)]
    apart = [abs(a - b) for a, b in losses]
    return {
        "first_steps_max": max(apart[:FIRST_STEPS]),
        "first_steps_loss_max": max(abs(a) for a, _ in losses[:FIRST_STEPS]),
        "all_steps_mean": statistics.fmean(apart),
        "all_steps_deviation": statistics.pstdev(a for a, _ in losses),
    }


def _print(summaries: dict[str, dict[str, Any]], agreement: dict[str, float], run: HeadRun, console: Console) -> None:
    classes, size = run.weight.shape
    table = Table(
        title=f"The heads side by side, N = {len(run.labels)}, C = {classes}, D = {size}", title_justify="left"
    )
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")

    def row(title: str, *path: str, form: str) -> None:
        cells = []
        for summary in summaries.values():
            value: Any = summary
            for key in path:
                value = value[key]
            cells.append("unknown" if value is None else form.format(value))
        table.add_row(title, *cells)

    row("head, forward + backward, median (ms)", "head_ms_median", form="{:.2f}")
    row("whole training step, median (ms)", "step_ms_median", form="{:.1f}")
    row("head, peak memory of a step (MiB)", "head_peak_mib", form="{:.2f}")
    row("training time (s)", "seconds", form="{:.1f}")
    row("loss, mean of the last 5 % of steps", "final_loss", form="{:.3f}")
    row("unseen identities: AUC", "verification", "auc", form="{:.4f}")
    row("unseen identities: 10-fold accuracy", "verification", "accuracy", form="{:.4f}")
    for far in next(iter(summaries.values()))["verification"]["tar_at_far"]:
        row(f"unseen identities: TAR at FAR {far}", "verification", "tar_at_far", far, form="{:.4f}")
    console.print(table)
    console.print(
        f"Losses: apart by at most {agreement['first_steps_max']:.1e} in the first {FIRST_STEPS} steps (losses up to "
        f"{agreement['first_steps_loss_max']:.2g}), then rounding grows; by {agreement['all_steps_mean']:.2g} on "
        f"average over the run, whose loss varies by {agreement['all_steps_deviation']:.2g} (standard deviation)."
    )
    console.print(
        "Peak memory: rise of resident memory during one step of the head alone, in a process of its own. Both "
        f"costs of the reference grow with N·C; {classes} classes are few, see benchmarks/ for many."
    )
