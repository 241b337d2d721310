"""Values that several commands take, read before anything is run. Typer adds the option's name to each error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer

from ..testing.selfcheck import DTYPES

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
    """An integer above 0, with or without underscores."""
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"expected a positive integer, got {text!r}")
    return int(text)


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return convert


def device(text: str) -> torch.device:
    """A device that is there; the GPU where there is one and none is named."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:<number>, got {text!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"{text}: PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    return torch.device(text)


def output_file(text: str) -> Path:
    """A file that can be written; it is left as it is."""
    path = Path(text)
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error
    if not existed:
        path.unlink()
    return path


DEVICE = option(device, "cpu, cuda or cuda:1 and so on; the GPU if there is one.", "DEVICE")
OUT = option(output_file, "Write the results to this JSON file.", "FILE.json")
