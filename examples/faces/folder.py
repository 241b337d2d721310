"""Loading a folder of faces: one sub-folder per identity, images inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .cartoon import HEIGHT, WIDTH
from .data import DataError, FaceSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".pgm")


def load_folder(
    folder: Path, show_progress: Callable[[list[Path]], Iterable[Path]] = iter
) -> tuple[FaceSet, list[str]]:
    """Reads every image of every sub-folder as grey levels, cropped and resized to HEIGHT×WIDTH.

    Args:
        folder: one sub-folder per identity, with jpg, png or pgm files. All images are kept in memory (2.6 kB each).
        show_progress: wraps the list of files while they are read.

    Returns:
        The faces, identities in the order of their folders' names, and a line for each file that could not be read.

    Raises:
        DataError: no such folder, or not one readable image.
    """
    if not folder.is_dir():
        raise DataError(
            f"--data: expected a folder with one sub-folder per identity, got {str(folder)!r}, "
            + ("a file" if folder.exists() else "which does not exist")
        )
    people = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [
        file
        for person in people
        for file in sorted(person.iterdir())
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    images, owners, broken = [], [], []
    for file in show_progress(files):
        try:
            images.append(_read(file))
            owners.append(file.parent)
        except Exception as error:  # Pillow's decoders raise whatever their format's parser does
            reason = str(error).replace(str(file), file.name).splitlines() or [type(error).__name__]
            broken.append(f"{file.relative_to(folder)} ({reason[0]})")
    if not images:
        raise DataError(
            f"--data: expected {', '.join(SUFFIXES)} images in sub-folders of {str(folder)!r}, got {len(people)} "
            f"sub-folders with {len(files)} such files" + (", none of them readable" if files else "")
        )
    index = {person: label for label, person in enumerate(dict.fromkeys(owners))}
    labels = torch.tensor([index[owner] for owner in owners])  # [M]
    return FaceSet(torch.from_numpy(np.stack(images)), labels, str(folder)), broken


def _read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        grey = ImageOps.exif_transpose(image).convert("L")
        fitted = ImageOps.fit(grey, (WIDTH, HEIGHT), method=Image.Resampling.BOX)
        return np.asarray(fitted)  # [HEIGHT, WIDTH] uint8
