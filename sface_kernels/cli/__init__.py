"""The command `sface-kernels`, a thin layer of typer and rich over `bench/` and `testing/`. One file for each command.

Exit status: 0; 1 where a result is wrong; 2 for options that cannot be used, with one line that says why; 130 after an
interrupt.
"""

from __future__ import annotations

import sys

EXTRA = ("typer", "rich", "matplotlib")  # what `pip install 'sface-kernels[cli]'` brings
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status. An error in the options is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        from .app import app

        status = app(arguments, prog_name="sface-kernels", standalone_mode=False, obj=arguments)
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRA:
            print(f"sface-kernels: {error.name} is missing: pip install 'sface-kernels[cli]'", file=sys.stderr)
            return 2
        # typer's and click's errors have this in common, and no importable base class over all versions
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "sface-kernels"
        print(f"{where}: error: {' '.join(error.format_message().split())}", file=sys.stderr)
        return 2
