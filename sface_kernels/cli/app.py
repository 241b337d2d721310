"""The commands together."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .bench import bench
from .check import check
from .info import info
from .plot import plot

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for command in (info, check, bench, plot):
    app.command()(command)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """SFace loss kernels: what runs here, is it right, how fast is it, against what."""
    if version or context.invoked_subcommand is None:
        typer.echo(__version__ if version else context.get_help())
        raise typer.Exit
