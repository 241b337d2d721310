"""A model that a run has trained, and the angles it has to its training faces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sface_kernels.angles import AngleHistograms

from .angles import angle_histograms
from .backbone import FaceNet
from .checkpoint import CheckpointError, read_checkpoint
from .data import DataError, split_identities
from .files import printable
from .options import TrainOptions
from .source import load_faces


def trained_angles(file: Path, data: Path | None, console: Console) -> tuple[AngleHistograms, dict[str, Any]]:
    """The angles of a checkpoint's backbone and head on the faces that they were trained on, and the run's options, with
    the "head" that this checkpoint is of.

    Args:
        file: a checkpoint of `train_faces.py`.
        data: the folder of faces that it was trained on; None for generated faces.
        console: says what is being done.

    Raises:
        CheckpointError, DataError: the checkpoint cannot be used, or not with these faces. One line.
    """
    try:
        state = read_checkpoint(file.parent, file.name)
    except CheckpointError as error:
        raise CheckpointError(str(error).removeprefix("--resume: ")) from None
    options, was = state["metrics"]["options"], state["metrics"]["data"]
    if data is None and options["data"] is not None:
        raise DataError(f"--data: expected the folder of faces that {printable(file)} was trained on, got none")
    if data is not None and options["data"] is None:
        raise DataError(f"--data: {printable(file)} was trained on generated faces, leave the folder out")
    which = ("identities", "images_per_identity", "seed", "val_fraction")
    faces, _ = load_faces(TrainOptions(data=data, **{name: options[name] for name in which}), console)
    split = split_identities(faces, options["val_fraction"], options["seed"])
    for name, now in split.as_json().items():
        if name != "source" and was.get(name) != now:
            raise DataError(
                f"--data: expected the faces that {printable(file)} was trained on, with {name.replace('_', ' ')} "
                f"{was.get(name)}, got {now}"
            )
    run = {**options, "head": state["metrics"]["head"]}
    backbone, weight = FaceNet(options["embedding_size"]), state["head"].get("weight")
    try:
        backbone.load_state_dict(state["backbone"])
        return angle_histograms(backbone, weight, split.train, torch.device("cpu")), run
    except (AttributeError, RuntimeError, ValueError) as error:
        reason = printable(" ".join(str(error).split()))[:200]
        raise CheckpointError(f"{printable(file)} is no checkpoint of this program: {reason}") from None
