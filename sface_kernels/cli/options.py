"""Values that several commands take, checked before anything is run. Errors name the option and what came."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
import typer

from ..bench import report

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def wrong(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")


def split(option: str, text: str, convert: Callable[[str], T]) -> list[T]:
    """Comma-separated values, each once."""
    values = []
    for part in text.split(","):
        try:
            values.append(convert(part.strip()))
        except ValueError as error:
            raise wrong(option, str(error)) from error
        if values[-1] in values[:-1]:
            raise wrong(option, f"{part.strip()!r} is given twice")
    return values


def positive(text: str) -> int:
    """An integer above 0, with or without underscores."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(f"expected a positive integer, got {text!r}")
    return value


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    allowed = list(names)

    def convert(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}, got {text!r}")
        return text

    return convert


def device(text: str | None, option: str = "--device") -> torch.device:
    """A device that is there; the GPU where there is one and none is named."""
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise wrong(option, f"expected cpu, cuda or cuda:<number>, got {text!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise wrong(option, f"expected cpu, cuda or cuda:<number>, got {text!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise wrong(option, f"{text}: PyTorch finds {torch.cuda.device_count()} CUDA devices here")
    return chosen


def output_file(path: Path | None, option: str = "--out") -> Path | None:
    """A file that can be written; it is left as it is."""
    if path is None:
        return None
    try:
        report.check_writable(path)
    except OSError as error:
        raise wrong(option, f"cannot write {path}: {error.strerror}") from error
    return path
