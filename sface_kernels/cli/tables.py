"""How `bench` shows where it is and what it found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..bench import report, runner

PRODUCTS = ("mm-fp32", "mm-tf32", "mm-bf16")
BARE = (*PRODUCTS, "read-w", "write-w")


class Bar:
    """A live bar on stderr where that is a terminal; elsewhere a line for each thing that begins."""

    def __init__(self, steps: int) -> None:
        self.console = Console(stderr=True)
        self.live = self.console.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.task = self.progress.add_task("starting", total=steps)
        self.before = 0  # steps of the workloads before this one

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While something is printed on stdout."""
        self.progress.stop()
        yield
        self.progress.start()

    def part(self, workload: str, steps: int) -> _Part:
        """The next workload, of `steps` steps."""
        part = _Part(self, workload, self.before)
        self.before += steps
        return part

    def at(self, text: str, step: int) -> None:
        if self.live:
            self.progress.update(self.task, description=text, completed=step)
        else:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.console.print(Text(text, style="yellow"), soft_wrap=True)


class _Part(runner.Progress):
    """The part of the bar that belongs to one workload."""

    def __init__(self, bar: Bar, workload: str, before: int) -> None:
        self.bar, self.workload, self.before = bar, workload, before

    def at(self, text: str, step: int) -> None:
        self.bar.at(f"{self.workload}: {text}", self.before + step)

    def warn(self, text: str) -> None:
        self.bar.warn(f"warning: {text}")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One table for the rows of one workload and mode, and a line for each provider without a time."""
    first = rows[0]
    timed = [row for row in rows if row["time_ms"]]
    products = [name for name in PRODUCTS if any(row["provider"] == name for row in timed)]
    hot = any(row["hot_ms"] for row in rows)
    heading = f"{first['workload']}, {first['dtype']} on {first['device']}: {first['mode']}"
    table = Table(
        title=f"{heading}; {first['density']:.2g} active at 2^-16",
        caption=_counts(timed),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("provider", no_wrap=True)
    headings = ["median ms", "quartiles", *["hot ms"] * hot, "× reference"]
    headings += [f"/ {name.replace('-', ' ')}" for name in products]
    for text in (*headings, "extra MiB", "TFLOP/s", "GB/s"):
        table.add_column(text, justify="right", no_wrap=text in ("median ms", "quartiles"))
    for row in timed:
        table.add_row(report.label(row["provider"]), *_cells(row, products, hot))
    console = Console(width=None if sys.stdout.isatty() else 140)
    if timed:
        console.print(table)
    for row in rows:
        if not row["time_ms"]:
            text = f"{row['provider']}: {row['status']}" + (f": {row['reason']}" if row["reason"] else "")
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cells(row: dict[str, Any], products: list[str], hot: bool) -> list[str]:
    time, ratios, rates = row["time_ms"], row["ratios"], row["rates"]
    return [
        f"{time['median']:.2f}",
        f"{time['q1']:.2f}–{time['q3']:.2f}",
        *([f"{row['hot_ms']['median']:.2f}" if row["hot_ms"] else "–"] if hot else []),
        _number(ratios["speedup_vs_reference"], 1),
        *(_number(ratios[f"time_vs_{name.replace('-', '_')}"], 2) for name in products),
        _mebibytes(row["memory"]),
        f"{rates['tflops']:.2f}",
        f"{rates['gb_per_s']:.1f}",
    ]


def _counts(timed: list[dict[str, Any]]) -> str:
    """The stated counts behind the rates: those of the losses, and of the products."""
    parts = []
    loss = next((row for row in timed if row["provider"] not in BARE), None)
    product = next((row for row in timed if row["provider"] in PRODUCTS), None)
    for row in (loss, product):
        if row:
            name, work = "a loss" if row is loss else row["provider"], row["work"]
            parts.append(f"{name} {work['flop'] / 1e9:.4g} GFLOP, {work['bytes'] / 1e9:.3g} GB")
    return "Effective rates, by the counts of the dense computation: " + "; ".join(parts) if parts else ""


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mebibytes(memory: dict[str, Any] | None) -> str:
    if not memory:
        return "–"
    return f"{memory['peak_extra_bytes'] / 2**20:.0f}" if "peak_extra_bytes" in memory else "?"
