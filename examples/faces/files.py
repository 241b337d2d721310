"""Writing so that a failure leaves the old file or the whole new one, and names that are safe to print."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)


class OutputError(Exception):
    """Something cannot be written. One line that names the path; `full` where it is for want of space."""

    def __init__(self, message: str, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(f"cannot write {printable(path)}: {reason}", error.errno in FULL) from None


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Writes the file in one move. Whatever happens, `path` is the old file or the new one, and nothing else is left.

    Raises:
        OutputError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # some file systems find out only now that they are full
            os.replace(part, path)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):
                part.unlink()
            raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes strict JSON: a number that is not finite becomes null, a byte that is no UTF-8 the text \\xNN."""
    write_file(path, (json.dumps(_strict(content), indent=1, allow_nan=False) + "\n").encode())


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    if isinstance(value, str):
        return _utf8(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _utf8(name: str | Path) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def printable(name: str | Path) -> str:
    """A file's name on one line of text: bytes that are no UTF-8, line breaks and control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in _utf8(name))


@contextmanager
def output_folders(folders: Iterable[Path], files: Iterable[str]) -> Iterator[None]:
    """Makes the folders for the block, and removes those that are still empty after it.

    Raises:
        OutputError: before the block, if a folder cannot be made or written into, or if one of the `files` to be
            written is a folder there.
    """
    made: list[Path] = []
    try:
        for folder in folders:
            _make(folder, made)
            for name in files:
                with writing(folder / name):
                    if (folder / name).is_dir():
                        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield
    finally:
        for folder in sorted(made, reverse=True):  # the inner ones first
            with suppress(OSError):
                folder.rmdir()


def _make(folder: Path, made: list[Path]) -> None:
    with writing(folder):
        made += [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
