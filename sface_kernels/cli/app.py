"""The commands together, and what becomes of their errors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .._version import __version__
from .bench import INTERRUPTED, bench
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
    if version:
        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str]) -> int:
    """Exit status of one call. An error in the options is one line on stderr."""
    try:
        status = app(arguments, prog_name="sface-kernels", standalone_mode=False, obj=arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        # typer's and click's errors have this in common, and no importable base class over all versions
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "sface-kernels"
        print(f"{where}: error: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0
