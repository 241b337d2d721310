"""`sface-kernels check`: every backend against float64 on this machine."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from ..bench import report
from ..bench.table import Table
from ..dispatch import BACKENDS
from ..testing import selfcheck
from . import options, show
from .options import option, several

ALL = ",".join(BACKENDS)


def check(
    backends: Annotated[Any, option(several(options.one_of(BACKENDS)), "Comma-separated; all that run here if left out.")] = ALL,
    device: Annotated[Any, options.DEVICE] = "auto",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="One line for every problem.")] = False,
    out: Annotated[Any, options.OUT] = None,
) -> None:  # fmt: skip
    """Compare every available backend with float64: errors beside their budget. Exit status 1 if any is over.

    The budget is twice the error of plain PyTorch in the same dtype and one rounding of each cosine, angle and term.
    For plain PyTorch itself, and in float64, it is the a-priori bound of such sums. With TRITON_INTERPRET=1 in the
    environment the Triton backend is checked on a CPU, in Triton's interpreter.
    """
    reasons = {backend: selfcheck.unavailable(backend, device, selfcheck.DTYPES[0]) for backend in backends}
    for backend, reason in reasons.items():
        if reason is not None:
            show.line(f"{backend} is not checked: {reason}")
    if all(reasons.values()):
        raise typer.BadParameter(f"none of {', '.join(backends)} runs on {device}", param_hint="--backends")
    small = os.environ.get("TRITON_INTERPRET") == "1" and "triton" in backends
    outcomes: list[selfcheck.Outcome] = []
    for dtype in selfcheck.DTYPES:
        show.progress(f"checking {dtype}")
        outcomes += selfcheck.run(backends, device, dtype, small)
    show.progress()
    shown = outcomes if verbose else _worst(outcomes)
    head = ["backend", "embeddings", "filter", "problem", "loss", "∂x", "∂w", "of budget"]
    table = Table(f"Errors on {device}, beside their budget", head, [_cells(outcome) for outcome in shown], 4)
    show.table(table, [number for number, outcome in enumerate(shown) if not outcome.ok])
    over = [outcome for outcome in outcomes if not outcome.ok]
    for outcome in over:
        show.line(f"OVER: {', '.join(_cells(outcome))} {outcome.failure or ''}", "red")
    show.line(f"{len(outcomes)} results, {len(over)} over their budget")
    if out is not None:
        report.save([outcome.as_json() for outcome in outcomes], out)
    raise typer.Exit(1 if over else 0)


def _worst(outcomes: list[selfcheck.Outcome]) -> list[selfcheck.Outcome]:
    """For each backend, dtype and filter the problem that takes most of its budget."""
    groups: dict[tuple[str, str, bool], selfcheck.Outcome] = {}
    for outcome in outcomes:
        key = outcome.backend, outcome.dtype, outcome.filter_eps > 0
        groups[key] = max(groups.get(key, outcome), outcome, key=lambda one: one.share)
    return list(groups.values())


def _cells(outcome: selfcheck.Outcome) -> list[str]:
    share = "failed" if outcome.errors is None else f"{100 * outcome.share:.0f} %"
    found = ["–"] * 3 if outcome.errors is None else [f"{error:.0e}" for error in outcome.errors]
    errors = [f"{error} of {limit:.0e}" for error, limit in zip(found, outcome.limits, strict=True)]
    return [outcome.backend, outcome.dtype, report.filter_name(outcome.filter_eps), outcome.problem, *errors, share]
