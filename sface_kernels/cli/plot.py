"""`sface-kernels plot`: pictures of result files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..bench import report
from ..bench.contestant import MODES
from . import options

FORMATS = ("png", "svg")


def plot(
    files: Annotated[
        list[Path], typer.Argument(help="JSON files of bench, benchmarks.density or benchmarks.accuracy.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures; it is made where it is missing.")] = Path("plots"),
    prefix: Annotated[str, typer.Option(help="Of the pictures' names.")] = "",
    formats: Annotated[str, typer.Option(help="Comma-separated.")] = "png,svg",
    only: Annotated[str | None, typer.Option(help=f"Comma-separated, of {', '.join(report.FIGURES)}.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="Which of the modes in the files.", show_default="both, or the one there is")
    ] = None,
) -> None:
    """Draw time and memory against C and N, ratios, error against filter_eps, time against the share of active pairs.

    Each picture is drawn where the files hold its data; several files of one kind are drawn together.
    """
    if mode is not None:
        options.split("--mode", mode, options.one_of(MODES))
    endings = options.split("--formats", formats, options.one_of(FORMATS))
    wanted = list(report.FIGURES) if only is None else options.split("--only", only, options.one_of(report.FIGURES))
    reports = []
    for file in files:
        try:
            reports.append(report.load(file))
        except report.ReportError as error:
            raise options.wrong("FILES", str(error)) from error
        except OSError as error:
            raise options.wrong("FILES", f"cannot read {file}: {error.strerror}") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise options.wrong("--out", f"cannot make the folder {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise options.wrong("--out", f"cannot write into {out}")
    from ..bench import plots

    modes = [row.get("mode") for result in reports for row in result["rows"] if row.get("mode")]
    mode = mode or ("both" if "both" in modes or not modes else modes[0])
    try:
        drawn = plots.draw(reports, mode)
    except KeyError as error:
        raise options.wrong("FILES", f"a row lacks the key {error}, which benchmarks/README.md describes") from error
    # an error picture has its dtype behind its name
    figures = {name: figure for name, figure in drawn.items() if name.startswith(tuple(wanted))}
    if not figures:
        raise options.wrong(
            "FILES", f"nothing to draw: these files hold no data for {', '.join(wanted)} in mode {mode!r}"
        )
    for name, figure in figures.items():
        for ending in endings:
            path = out / f"{prefix}{name}.{ending}"
            figure.savefig(path)
            typer.echo(path)
