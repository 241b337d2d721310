"""Options of the scripts in this folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from sface_kernels.bench import report
from sface_kernels.bench.providers import Provider, resolve

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def provider_list(text: str) -> list[Provider]:
    try:
        return [resolve(name.strip()) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def output_file(text: str) -> Path:
    path = Path(text)
    try:
        report.check_writable(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
    return path


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
