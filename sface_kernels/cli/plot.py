"""`sface-kernels plot`: pictures of result files."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench import report
from ..bench.timing import MODES
from . import options
from .options import option, several

FORMATS = ("png", "svg")


def _load(text: str) -> dict[str, Any]:
    try:
        return report.load(Path(text))
    except report.ReportError as error:
        raise typer.BadParameter(str(error)) from error


def plot(
    files: Annotated[list[Any], typer.Argument(parser=_load, metavar="FILES...", help="JSON files of bench or benchmarks.accuracy.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures; it is made where it is missing.")] = Path("plots"),
    prefix: Annotated[str, typer.Option(help="Of the pictures' names.")] = "",
    formats: Annotated[Any, option(several(options.one_of(FORMATS)), "Comma-separated.")] = "png,svg",
    only: Annotated[str, typer.Option(help="Names of pictures, or how they begin; comma-separated.", show_default="all")] = "",
    mode: Annotated[Any, option(options.one_of(MODES), "Which of the modes in the files; both, or the one there is.", "NAME")] = None,
) -> None:  # fmt: skip
    """Draw time and memory against C and N, ratios, error against filter_eps, time against the share of active pairs.

    Each picture is drawn where the files hold its data; several files of one kind are drawn together.
    """
    # A notebook's setting, inherited by what it starts, names a module that may be missing: no import of matplotlib then
    os.environ["MPLBACKEND"] = "agg"
    from ..bench import plots

    modes = [row["mode"] for result in files for row in result["rows"] if "mode" in row]
    mode = mode or ("both" if "both" in modes or not modes else modes[0])
    try:
        drawn = plots.draw(files, mode)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        missing = f"lacks the key {error}" if isinstance(error, KeyError) else f"has a value of another kind ({error})"
        message = f"a row {missing}: benchmarks/README.md describes them"
        raise typer.BadParameter(message, param_hint="FILES") from error
    figures = {
        name: figure for name, figure in drawn.items() if name.startswith(tuple(map(str.strip, only.split(","))))
    }
    if not figures:
        message = f"nothing to draw: these files hold no data for {only or 'any picture'} in mode {mode!r}"
        raise typer.BadParameter(message, param_hint="FILES")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {out}: {error.strerror}", param_hint="--out") from error
    for name, figure in figures.items():
        for ending in formats:
            path, content = out / f"{prefix}{name}.{ending}", io.BytesIO()
            figure.savefig(content, format=ending)
            report.write(path, content.getvalue())
            typer.echo(path)
