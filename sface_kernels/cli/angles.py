"""`sface-kernels angles`: where the angles of a trained model lie, and what a and b they suggest."""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import angles as of
from ..bench import report
from ..bench.table import Table
from . import options, show
from .options import option

FORMATS = (".png", ".svg", ".pdf")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if not EXAMPLES.is_dir():  # installed, not run in the checkout
    EXAMPLES = Path("examples")


def angles(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint.pt of examples/train_faces.py.")],
    data: Annotated[Path | None, typer.Option(help="The folder of faces it was trained on. Left out for generated faces.")] = None,
    out: Annotated[Any, option(options.output_file, "Draw the angles into this file.", "FILE.png")] = None,
    examples: Annotated[Path, typer.Option(help="The folder examples/ of a checkout, which knows the backbone.", show_default=False)] = EXAMPLES,
) -> None:  # fmt: skip
    """Show how much of pull and push is left in a trained model, for its a and b and the published ones, and suggest others."""
    if not (examples / "faces" / "trained.py").is_file():
        raise typer.BadParameter(
            f"expected the folder examples/ of a checkout, got {examples}", param_hint="--examples"
        )
    if out is not None and out.suffix not in FORMATS:
        raise typer.BadParameter(f"expected a name that ends in {', '.join(FORMATS)}, got {out}", param_hint="--out")
    sys.path.insert(0, str(examples))
    os.environ["MPLBACKEND"] = "agg"  # a notebook's setting names a module that may be missing
    try:
        trained = importlib.import_module("faces.trained")
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error.name} is missing: pip install 'sface-kernels[train]'") from None
    try:
        histograms, run = trained.trained_angles(checkpoint, data, Console(stderr=True, markup=False, emoji=False))
    except (trained.CheckpointError, trained.DataError) as error:
        raise typer.BadParameter(str(error)) from None
    suggestion = of.suggest(histograms)
    own = {} if run["head"] == "arcface" else {"of this run": (run["a"], run["b"])}  # ArcFace has no a and b
    recipes = {**own, **of.RECIPES, "suggested": suggestion[:2]}
    rows = []
    for name, (a, b) in recipes.items():
        found = of.shares(histograms, a, b, run["k"])
        rows.append(
            [name, f"{a:.2f}", f"{b:.2f}", f"{found.pulled:.1%}", f"{found.pushed:.2g}", f"{found.rows_pushed:.1%}"]
        )
    head = ["recipe", "a", "b", "targets pulled", "others pushed", "nearest others pushed"]
    show.table(Table("Shares of the training faces' pairs, at this model's angles", head, rows))
    show.line(suggestion.text())
    if out is not None:
        content = io.BytesIO()
        figure = of.plot(histograms, run["a"], run["b"], run["k"], suggestion=suggestion)
        figure.savefig(content, format=out.suffix.removeprefix("."))
        report.write(out, content.getvalue())
        show.line(str(out))
