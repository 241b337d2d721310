"""What a run shows of its training while it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import nn

from sface_kernels.angles import AngleHistograms

from .options import TrainOptions
from .plots import draw_live
from .record import STATISTICS
from .verification import Verification

LIVE = "live.png"
SHORTEST_BAR = 6  # characters
SECONDS_BETWEEN_PLOTS = 15.0


class TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        return super().render(task) + Text(" left")


def training_progress(console: Console) -> Progress:
    """A bar that takes one line whatever the terminal's width: what does not fit is left out."""
    columns: list[tuple[int, ProgressColumn]] = [  # with their widths; the first ones matter most
        (9, TextColumn("{task.description}")),
        (5, TextColumn("{task.percentage:3.0f} %")),
        (12, TextColumn("loss {task.fields[loss]:7.2f}")),
        (12, TimeLeft(compact=True)),
        (SHORTEST_BAR, BarColumn()),
        (16, TextColumn("{task.fields[rate]:6.0f} samples/s")),
        (7, TimeElapsedColumn()),
    ]
    taken = [
        column for at, column in enumerate(columns) if sum(width + 1 for width, _ in columns[: at + 1]) <= console.width
    ]
    spare = console.width - sum(width + 1 for width, _ in taken)
    for _, column in taken:
        if isinstance(column, BarColumn):
            column.bar_width = min(40, SHORTEST_BAR + spare)
    return Progress(*(column for _, column in taken), console=console)


class LivePlot:
    """Rewrites a picture of the training every few seconds, in `path`; nothing where that is None."""

    def __init__(self, path: Path | None, name: str, options: TrainOptions) -> None:
        self.path, self.name, self.options = path, name, options.as_json()
        self._next = 0.0  # when to draw, on the monotonic clock

    def update(self, steps: list[dict[str, float]], head: nn.Module, now: bool = False) -> None:
        """Draws if it is time, or `now`. Raises OutputError where the file cannot be written."""
        if self.path is None or (time.monotonic() < self._next and not now):
            return
        draw_live(steps, batch_angles(head), self.name, self.options, self.path)
        self._next = time.monotonic() + SECONDS_BETWEEN_PLOTS


def batch_angles(head: nn.Module) -> AngleHistograms | None:
    """What the head counted since its counter was reset; None for a head that counts nothing."""
    counter = getattr(head, "angle_counter", None)
    return None if counter is None else counter.histograms()


def forget_angles(head: nn.Module) -> None:
    """Before an epoch, whose angles are then those of its batches alone."""
    counter = getattr(head, "angle_counter", None)
    if counter is not None:
        counter.reset()


def epoch_line(name: str, epoch: int, epochs: int, metrics: dict[str, Any], rate: float, result: Verification) -> str:
    """One line on an epoch: means over its steps, then verification on the unseen identities."""
    steps = [step for step in metrics["steps"] if step["epoch"] == epoch]
    mean = {key: sum(step[key] for step in steps) / len(steps) for key in ("loss", *STATISTICS)}
    return (
        f"{name} epoch {epoch}/{epochs}  loss {mean['loss']:6.2f} (intra {mean['intra']:.2f}, inter "
        f"{mean['inter']:.2f})  cos {mean['cos_target']:.3f}/{mean['cos_other']:.3f}  acc {mean['accuracy']:.3f}  "
        f"unseen: AUC {result.auc:.4f}, acc {result.accuracy:.4f}  {rate:.0f} samples/s"
    )
