"""What the commands print: tables and results on stdout, what is being done on stderr."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import TextIO

import rich.table
from rich.console import Console
from rich.markup import escape

from ..bench.table import Table


def line(text: str, style: str = "", warning: bool = False) -> None:
    """A sentence, not broken into lines; a warning in yellow on stderr."""
    Console(stderr=warning).print(
        text, style="yellow" if warning else style, markup=False, highlight=False, soft_wrap=True
    )


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None where the caller closed it


def table(table: Table, red: Container[int] = ()) -> None:
    """The table, with the rows of these numbers in red."""
    shown = rich.table.Table(title=table.title, title_justify="left")
    for column, heading in enumerate(table.head):
        shown.add_column(heading, justify="left" if column < table.words else "right")
    for number, cells in enumerate(table.rows):
        shown.add_row(*map(escape, cells), style="red" if number in red else "")
    Console(width=None if _is_terminal(sys.stdout) else 140).print(shown)


def progress(*parts: str) -> None:
    """What is being done: on a terminal it takes the place of the last such line, nothing clears it."""
    text = ": ".join(parts)
    if _is_terminal(sys.stderr):
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
