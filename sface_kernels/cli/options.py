"""Values that several commands take, read before anything is run. Typer adds the option's name to each error."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer

from ..bench import report
from ..testing.selfcheck import DTYPES

LARGEST = 1_000_000_000  # of a size; the bytes of a tensor of two such sizes still fit into 64 bits
T = TypeVar("T")
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def option(parser: Callable[[str], Any], text: str, metavar: str = "LIST") -> Any:
    """A typer option whose value `parser` reads."""
    return typer.Option(parser=parser, metavar=metavar, help=text)


def several(convert: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Comma-separated values, each once."""

    def read(text: str) -> list[T]:
        values: list[T] = []
        for part in text.split(","):
            try:
                values.append(convert(part.strip()))
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
            if values[-1] in values[:-1]:
                raise typer.BadParameter(f"{part.strip()!r} is given twice")
        return values

    return read


def positive(text: str) -> int:
    """An integer from 1 to LARGEST, with or without underscores."""
    value = int(text) if re.fullmatch(r"\d+(_\d+)*", text) else 0
    if not 1 <= value <= LARGEST:
        raise typer.BadParameter(f"expected a positive integer up to {LARGEST:,}, got {text!r}")
    return value


def share(text: str) -> float:
    """A number in (0, 1]."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise typer.BadParameter(f"expected a number in (0, 1], got {text!r}")
    return value


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return convert


def device(text: str) -> torch.device:
    """A device that is there, a GPU with its number; the GPU where there is one and none is named."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::([0-9]{1,3}))?", text)
    if found is None:
        raise typer.BadParameter(f"expected cpu, cuda or cuda:<number>, got {text!r}")
    if text != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{text}: PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    # torch.cuda.set_device takes no GPU without a number
    return torch.device("cuda", int(found[1] or 0)) if text != "cpu" else torch.device(text)


def output_file(text: str) -> Path:
    """A file that can be written as `report.write` does; it is left as it is."""
    path = Path(text)
    if report.is_special(path):  # to open a pipe and close it again would end what reads it
        return path
    try:
        target = path.resolve()
        if target.exists():
            target.open("a").close()
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
    return path


DEVICE = option(device, "cpu, cuda or cuda:1 and so on; the GPU if there is one.", "NAME")
OUT = option(output_file, "Write the results to this JSON file.", "FILE.json")
