"""What a run shows of its training while it goes on."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .record import STATISTICS
from .verification import Verification


def training_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  loss {task.fields[loss]:7.2f}  {task.fields[rate]:6.0f} samples/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def epoch_line(name: str, epoch: int, epochs: int, metrics: dict[str, Any], rate: float, result: Verification) -> str:
    """One line on an epoch: means over its steps, then verification on the unseen identities."""
    steps = [step for step in metrics["steps"] if step["epoch"] == epoch]
    mean = {key: sum(step[key] for step in steps) / len(steps) for key in ("loss", *STATISTICS)}
    return (
        f"{name} epoch {epoch}/{epochs}  loss {mean['loss']:6.2f} (intra {mean['intra']:.2f}, inter "
        f"{mean['inter']:.2f})  cos {mean['cos_target']:.3f}/{mean['cos_other']:.3f}  acc {mean['accuracy']:.3f}  "
        f"unseen: AUC {result.auc:.4f}, acc {result.accuracy:.4f}  {rate:.0f} samples/s"
    )
