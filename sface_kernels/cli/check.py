"""`sface-kernels check`: every backend against float64 on this machine, and the Triton kernels without a GPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Annotated, Any

import typer

from ..bench import report
from ..bench.table import Table
from ..dispatch import BACKENDS
from ..testing import selfcheck
from . import options, show
from .options import option, several

TARGETS = "sface_kernels.backends.triton.tools.compile_report"  # imported on demand: it needs Triton
ALL = ",".join(BACKENDS)
INTERPRET = "TRITON_INTERPRET"  # Triton reads it when it is imported


def check(
    backends: Annotated[Any, option(several(options.one_of(BACKENDS)), "Comma-separated; all that run here if left out.")] = ALL,
    device: Annotated[Any, options.DEVICE] = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line for every problem.")] = False,
    interpret: Annotated[bool, typer.Option("--interpret", help="Run the Triton kernels in Triton's interpreter, on the CPU.")] = False,
    targets: Annotated[str | None, typer.Option(help="Compile the Triton kernels for these, e.g. sm_80,sm_90,sm_100. Needs no GPU.")] = None,
    out: Annotated[Any, options.OUT] = None,
) -> None:  # fmt: skip
    """Compare every available backend with float64: errors beside their budget. Exit status 1 if any is over.

    The budget is twice the error of plain PyTorch in the same dtype and one rounding of each cosine, angle and term.
    For plain PyTorch itself, and in float64, it is the a-priori bound of such sums.
    """
    if targets is not None:
        raise typer.Exit(_compile(targets))
    if interpret:
        command = [sys.executable, "-m", "sface_kernels", "check", "--backends", "triton", "--device", "cpu"]
        command += ["--verbose"] * verbose + (["--out", str(out)] if out is not None else [])
        raise typer.Exit(subprocess.run(command, env={**os.environ, INTERPRET: "1"}).returncode)
    reasons = {backend: selfcheck.unavailable(backend, device, selfcheck.DTYPES[0]) for backend in backends}
    for backend, reason in reasons.items():
        if reason is not None:
            show.line(f"{backend} is not checked: {reason}")
    if all(reasons.values()):
        raise typer.BadParameter(f"none of {', '.join(backends)} runs on {device}", param_hint="--backends")
    small = os.environ.get(INTERPRET) == "1" and "triton" in backends
    outcomes: list[selfcheck.Outcome] = []
    for dtype in selfcheck.DTYPES:
        show.progress(f"checking {dtype}")
        outcomes += selfcheck.run(backends, device, dtype, small)
    show.progress("")
    shown = outcomes if verbose else _worst(outcomes)
    head = ["backend", "embeddings", "filter", "problem", "loss", "∂x", "∂w", "of budget"]
    table = Table(f"Errors on {device}, beside their budget", head, [_cells(outcome) for outcome in shown], 4)
    show.table(table, tuple(number for number, outcome in enumerate(shown) if not outcome.ok))
    over = [outcome for outcome in outcomes if not outcome.ok]
    for outcome in over:
        show.line(f"OVER: {', '.join(_cells(outcome))} {outcome.failure or ''}", "red")
    show.line(f"{len(outcomes)} results, {len(over)} over their budget")
    if out is not None:
        named = [
            {**o._asdict(), "limits": o.limits._asdict(), "errors": o.errors and o.errors._asdict()} for o in outcomes
        ]
        report.save([{**row, "ok": outcome.ok} for row, outcome in zip(named, outcomes, strict=True)], out)
    raise typer.Exit(1 if over else 0)


def _worst(outcomes: list[selfcheck.Outcome]) -> list[selfcheck.Outcome]:
    """For each backend, dtype and filter the problem that takes most of its budget."""
    groups: dict[tuple[str, str, bool], selfcheck.Outcome] = {}
    for outcome in outcomes:
        key = outcome.backend, outcome.dtype, outcome.filter_eps > 0
        groups[key] = max(groups.get(key, outcome), outcome, key=lambda one: one.share)
    return list(groups.values())


def _cells(outcome: selfcheck.Outcome) -> list[str]:
    pairs = zip(outcome.errors or ["–"] * 3, outcome.limits, strict=True)
    errors = [f"{e if isinstance(e, str) else format(e, '.0e')} of {limit:.0e}" for e, limit in pairs]
    share = "failed" if outcome.failure else f"{100 * outcome.share:.0f} %"
    return [outcome.backend, outcome.dtype, report.filter_name(outcome.filter_eps), outcome.problem, *errors, share]


def _compile(text: str) -> int:
    """Compiles every kernel for the named targets; 1 where one has a problem."""
    try:
        module: Any = importlib.import_module(TARGETS)
    except ImportError as error:
        message = f"the Triton kernels cannot be compiled here: {error}"
        raise typer.BadParameter(message, param_hint="--targets") from error
    problems = 0
    columns = ("kernel", "variant", "registers", "spills", "shared_bytes", "tensor_core_instructions", "problem")
    for name in several(options.one_of(module.names()))(text):
        show.progress(f"compiling for {name}")
        rows = module.compile_table(name)
        show.progress("")
        bad = tuple(number for number, row in enumerate(rows) if row["problem"] is not None)
        cells = [[str(row[column] if row[column] is not None else "") for column in columns] for row in rows]
        head = [column.replace("_", " ") for column in columns]
        show.table(Table(f"Triton kernels compiled for {name}", head, cells, 2), bad)
        problems += len(bad)
    return 1 if problems else 0
