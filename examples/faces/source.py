"""The faces of a run: those of a folder, or generated ones."""

from __future__ import annotations

from rich.console import Console
from rich.progress import track

from .cartoon import generate_faces
from .data import FaceSet
from .folder import load_folder, shortened
from .options import TrainOptions
from .record import METRICS


def load_faces(options: TrainOptions, console: Console) -> tuple[FaceSet, list[str]]:
    """The faces of --data, or generated ones, and what was left out of the folder: the first of it is printed too."""
    if options.data is None:
        identities, each = options.identities or 400, options.images_per_identity or 20
        console.print(f"Drawing {identities} identities with {each} images each (seed {options.seed})")
        return FaceSet(*generate_faces(identities, each, options.seed), f"{identities} generated identities"), []
    faces, left_out = load_folder(options.data, lambda files: track(files, "Reading faces", console=console))
    if left_out:
        console.print(
            f"Files and folders left out: {len(left_out)}, listed in {METRICS}: {shortened(left_out)}", soft_wrap=True
        )
    return faces, left_out
