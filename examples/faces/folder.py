"""Loading a folder of faces: one sub-folder per identity, images inside."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import UnidentifiedImageError

from .data import DataError, FaceSet
from .files import printable
from .pictures import read_face

NAMED = 20  # files and folders left out that are named on one line


def load_folder(
    folder: Path, show_progress: Callable[[list[Path]], Iterable[Path]] = iter
) -> tuple[FaceSet, list[str]]:
    """Reads every image of every identity as grey levels, cropped and resized to HEIGHT×WIDTH.

    An identity is a sub-folder whose name does not begin with a dot, an image is a file in it that Pillow can read,
    whatever its name. Nothing else is taken, and everything that is not is named.

    Args:
        folder: one sub-folder per identity. All images are kept in memory (2.6 kB each).
        show_progress: wraps the list of files while they are read.

    Returns:
        The faces, identities in the order of their folders' names, and for each file or folder that was left out
        "its name (the reason)".

    Raises:
        DataError: no such folder, one that cannot be read, or not one image.
    """
    files, left_out = _find(folder)
    images, owners = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's do not say of which file they speak
        for file in show_progress(files):
            try:
                images.append(read_face(file))
                owners.append(file.parent)
            except Exception as error:  # Pillow's readers raise whatever their format's parser does
                left_out.append(_named(file.relative_to(folder), _reason(error, file)))
    if not images:
        raise DataError(
            f"--data: expected one sub-folder per identity with images in it, got {printable(folder)} without a "
            f"readable image{': ' * bool(left_out)}{shortened(left_out)}"
        )
    index = {person: label for label, person in enumerate(dict.fromkeys(owners))}
    labels = torch.tensor([index[owner] for owner in owners])  # [M]
    return FaceSet(torch.from_numpy(np.stack(images)), labels, printable(folder)), left_out


def shortened(left_out: list[str]) -> str:
    """The first NAMED of them on one line, and the number of the rest."""
    more = len(left_out) - NAMED
    return "; ".join(left_out[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def _find(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of all identities, by the identities' names and then their own, and what is left out already."""
    try:
        # A link after what it may link to, so that the folder itself is taken
        entries = sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name))
    except OSError as error:
        raise DataError(
            f"--data: expected a folder with one sub-folder per identity, got {printable(folder)}: {error.strerror}"
        ) from None
    real = Path(os.path.realpath(folder))
    seen = {path: "a link to a folder around it" for path in (real, *real.parents)}
    files, left_out = [], []
    for entry in entries:
        where, inside = Path(os.path.realpath(entry)), []
        reason = _refusal(entry, stat.S_ISDIR, "not in the folder of an identity") or seen.get(where)
        if reason is None:
            seen[where] = f"the same folder as {printable(entry.name)}"
            try:
                inside = list(entry.iterdir())
                reason = None if inside else "an empty folder"
            except OSError as error:
                reason = error.strerror or type(error).__name__
        reasons = {file: _refusal(file, stat.S_ISREG, "not a file") for file in sorted(inside)}
        files += [file for file in reasons if reasons[file] is None]
        left_out += [
            _named(path.relative_to(folder), why) for path, why in {entry: reason, **reasons}.items() if why is not None
        ]
    return sorted(files), left_out


def _refusal(path: Path, wanted: Callable[[int], bool], otherwise: str) -> str | None:
    """Why a path is left out: it is hidden, cannot be looked at, or is not of the `wanted` type. None if it is taken."""
    if path.name.startswith("."):
        return "hidden"
    try:
        return None if wanted(path.stat().st_mode) else otherwise
    except OSError as error:
        return error.strerror or type(error).__name__


def _reason(error: Exception, file: Path) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow reads"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).replace(str(file), file.name)
    return (text.splitlines() or [type(error).__name__])[0]


def _named(name: Path, reason: str) -> str:
    return f"{printable(name)} ({printable(reason)})"
