"""`sface-kernels check`: every backend against float64 on this machine, and the Triton kernels without a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..bench import report
from ..dispatch import BACKENDS
from ..testing import selfcheck
from . import options

TARGETS = "sface_kernels.backends.triton.tools.compile_report"  # imported on demand: it needs Triton
INTERPRET = "TRITON_INTERPRET"  # Triton reads it when it is imported
WORST = ("loss", "grad_x", "grad_w")


def check(
    backends: Annotated[str | None, typer.Option(help="Comma-separated; all that run here if left out.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>; the GPU if there is one.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line for every problem.")] = False,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Run the Triton kernels in Triton's interpreter, on the CPU.")
    ] = False,
    targets: Annotated[
        str | None,
        typer.Option(help="Compile the Triton kernels for these, e.g. sm_80,sm_90,sm_100. Needs no GPU."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every error and budget to this JSON file.")] = None,
) -> None:
    """Compare every available backend with float64: errors beside their budget. Exit status 1 if any is over.

    The budget is twice the error of plain PyTorch in the same dtype and one rounding of each cosine, angle and term.
    For plain PyTorch itself, and in float64, it is the a-priori bound of such sums.
    """
    options.output_file(out)
    if targets is not None:
        raise typer.Exit(_compile(targets))
    if interpret:
        raise typer.Exit(_interpret(verbose, out))
    chosen = list(BACKENDS) if backends is None else options.split("--backends", backends, options.one_of(BACKENDS))
    where = options.device(device)
    small = os.environ.get(INTERPRET) == "1" and "triton" in chosen
    console = Console(width=None if sys.stdout.isatty() else 120)
    reasons = {backend: selfcheck.unavailable(backend, where, options.DTYPES["float32"]) for backend in chosen}
    for backend, reason in reasons.items():
        if reason is not None:
            console.print(f"{backend} is not checked: {reason}", highlight=False, soft_wrap=True)
    if all(reasons.values()):
        raise options.wrong("--backends", f"none of {', '.join(chosen)} runs on {where}")
    outcomes: list[selfcheck.Outcome] = []
    for dtype in track(options.DTYPES.values(), "Checking", console=Console(stderr=True), transient=True):
        outcomes += selfcheck.run(chosen, where, dtype, small)
    over = [outcome for outcome in outcomes if not outcome.ok]
    console.print(_table(outcomes if verbose else _worst(outcomes), f"Errors on {where}, beside their budget"))
    for outcome in over:
        console.print(f"OVER: {_sentence(outcome)}", style="red", highlight=False, soft_wrap=True, markup=False)
    console.print(f"{len(outcomes)} results, {len(over)} over their budget", highlight=False)
    if out is not None:
        report.save([outcome.as_json() for outcome in outcomes], out)
    raise typer.Exit(1 if over else 0)


def _worst(outcomes: list[selfcheck.Outcome]) -> list[selfcheck.Outcome]:
    """For each backend, dtype and filter the problem that takes most of its budget."""
    groups: dict[tuple[str, str, bool], selfcheck.Outcome] = {}
    for outcome in outcomes:
        key = outcome.backend, outcome.dtype, outcome.filter_eps > 0
        if key not in groups or outcome.share() > groups[key].share():
            groups[key] = outcome
    return list(groups.values())


def _sentence(outcome: selfcheck.Outcome) -> str:
    about = f"{outcome.backend}, {outcome.dtype}, filter {_filter(outcome)}, {outcome.problem}"
    if outcome.failure is not None:
        return f"{about}: {outcome.failure}"
    assert outcome.errors is not None and outcome.limits is not None
    pairs = zip(WORST, outcome.errors, outcome.limits, strict=True)
    return f"{about}: " + ", ".join(f"{name} {error:.1e} of {limit:.1e}" for name, error, limit in pairs)


def _filter(outcome: selfcheck.Outcome) -> str:
    return report.filter_name(outcome.filter_eps)


def _table(outcomes: list[selfcheck.Outcome], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("backend", "embeddings", "filter", "problem"):
        table.add_column(heading)
    for heading in ("loss", "∂x", "∂w", "of budget"):
        table.add_column(heading, justify="right", no_wrap=True)
    for before, outcome in zip([outcomes[0], *outcomes], outcomes, strict=False):
        if before.dtype != outcome.dtype:
            table.add_section()
        cells = ["–"] * 3
        if outcome.errors is not None and outcome.limits is not None:
            cells = [f"{e:.0e} / {m:.0e}" for e, m in zip(outcome.errors, outcome.limits, strict=True)]
        share = "failed" if outcome.failure else f"{100 * outcome.share():.0f} %"
        style = "" if outcome.ok else "red"
        about = outcome.backend, outcome.dtype, _filter(outcome), outcome.problem
        table.add_row(*about, *cells, share, style=style)
    return table


def _interpret(verbose: bool, out: Path | None) -> int:
    """The check of the Triton backend in a process that has the variable set from its start."""
    command = [sys.executable, "-m", "sface_kernels", "check", "--backends", "triton", "--device", "cpu"]
    command += ["--verbose"] * verbose + (["--out", str(out)] if out is not None else [])
    return subprocess.run(command, env={**os.environ, INTERPRET: "1"}).returncode


def _compile(text: str) -> int:
    """Compiles every kernel for the named targets; 1 where one has a problem."""
    try:
        module: Any = importlib.import_module(TARGETS)
    except ImportError as error:
        raise options.wrong("--targets", f"the Triton kernels cannot be compiled here: {error}") from error
    names = options.split("--targets", text, options.one_of(module.names()))
    console = Console(width=None if sys.stdout.isatty() else 120)
    problems = 0
    for name in names:
        table = Table(title=f"Triton kernels compiled for {name}", title_justify="left")
        for heading in ("kernel", "variant"):
            table.add_column(heading)
        for heading in ("registers", "spills", "shared bytes", "tensor-core instructions"):
            table.add_column(heading, justify="right")
        table.add_column("problem")
        with Console(stderr=True).status(f"compiling for {name}"):
            rows = module.compile_table(name)
        for row in rows:
            problems += row["problem"] is not None
            counts = (row["registers"], row["spills"], row["shared_bytes"], row["tensor_core_instructions"])
            table.add_row(
                row["kernel"],
                row["variant"],
                *map(str, counts),
                row["problem"] or "",
                style="red" * bool(row["problem"]),
            )
        console.print(table)
    return 1 if problems else 0
