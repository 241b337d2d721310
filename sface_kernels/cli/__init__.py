"""The command `sface-kernels`, a thin layer of typer and rich over `bench/`. One file for each command.

Exit status: 0; 1 where a result is wrong; 2 for options that cannot be used, with one line that says why; 130 after an
interrupt.
"""

from __future__ import annotations

import sys

EXTRA = ("typer", "rich", "matplotlib")  # what `pip install 'sface-kernels[cli]'` brings


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        from .app import run

        return run(sys.argv[1:] if arguments is None else arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        print(f"sface-kernels: {error.name} is missing: pip install 'sface-kernels[cli]'", file=sys.stderr)
        return 2
