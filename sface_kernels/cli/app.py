"""The commands together, and what becomes of their errors."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated

import typer

from .._version import __version__
from ..bench import report
from .angles import angles
from .bench import INTERRUPTED, bench
from .check import check
from .info import info
from .plot import plot

FULL = (errno.ENOSPC, errno.EDQUOT)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
for command in (info, check, bench, plot, angles):
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
    """Exit status of one call. An error in the options, or a file that cannot be written, is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no UTF-8, a terminal know ASCII alone
    try:
        status = app(arguments, prog_name="sface-kernels", standalone_mode=False, obj=arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if not (isinstance(error, report.WriteError) or error.errno in FULL):
            raise
        name = os.fsencode(error.filename or "what is printed").decode("utf-8", "backslashreplace")
        print(f"sface-kernels: error: cannot write {name}: {error.strerror}", file=sys.stderr)
        return 1 if error.errno in FULL else 2
    except Exception as error:
        # typer's and click's errors have this in common, and no importable base class over all versions
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "sface-kernels"
        print(f"{where}: error: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
    return status if isinstance(status, int) else 0
