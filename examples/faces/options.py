"""The options of a run, checked before anything is loaded or written."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .files import printable
from .processes import started_by_torchrun

LARGEST = 1e30  # of what is multiplied in float32
SMALL = 10_000  # training images below which a run takes the recipe for small data
WHOLE_NUMBERS = {  # lowest and highest
    "epochs": (1, 1_000_000),
    "batch_size": (2, 1_000_000),
    "embedding_size": (1, 65_536),
    "threads": (1, 1_024),
    "seed": (0, 2**63 - 1),
    "identities": (4, 10_000_000),
    "images_per_identity": (2, 1_000_000),
}


class OptionError(ValueError):
    """An option cannot be used. One line: the option, what was expected and what came."""


@dataclass(frozen=True)
class TrainOptions:
    """See `train_faces.py --help` for the meaning. None stands for "chosen by the data"."""

    data: Path | None = None
    head: str = "fused"
    out: Path = Path("runs/faces")
    epochs: int | None = None
    batch_size: int | None = None
    embedding_size: int = 128
    lr: float = 0.05
    s: float = 64.0
    k: float = 80.0
    a: float = 0.80
    b: float = 1.23
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    val_fraction: float = 0.25
    identities: int | None = None
    images_per_identity: int | None = None
    resume: bool = False
    class_parallel: bool = False
    live_plot: bool = False
    tensorboard: bool = True

    @property
    def heads(self) -> list[str]:
        return ["fused", "reference"] if self.head == "both" else [self.head]

    @property
    def folders(self) -> dict[str, Path]:
        """Where the run of each head goes."""
        return {name: self.out / name if len(self.heads) > 1 else self.out for name in self.heads}

    @property
    def torch_device(self) -> torch.device:
        name = "cuda" if self.device == "auto" and torch.cuda.is_available() else self.device
        return torch.device("cpu" if name == "auto" else name)

    def check(self) -> None:
        """Raises OptionError for the first option that makes no sense or names what is not there."""
        for name in ("lr", "s", "k", "a", "b"):
            value = getattr(self, name)
            if not 0 < value <= LARGEST:  # False for NaN
                raise OptionError(f"--{name}: expected a number > 0 and at most {LARGEST:g}, got {value:g}")
        for name in ("a", "b"):
            if getattr(self, name) >= math.pi:
                raise OptionError(f"--{name}: expected an angle in radians below π, got {getattr(self, name):g}")
        for name, (low, high) in WHOLE_NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = "--" + name.replace("_", "-")
                raise OptionError(f"{option}: expected a whole number from {low} to {high}, got {value}")
        if not 0 < self.val_fraction < 1:
            raise OptionError(f"--val-fraction: expected a share between 0 and 1, got {self.val_fraction:g}")
        for name in ("identities", "images_per_identity"):
            if self.data is not None and getattr(self, name) is not None:
                raise OptionError(f"--{name.replace('_', '-')}: is for generated faces, and --data was given too")
        if self.class_parallel and self.head != "fused":
            raise OptionError(f"--class-parallel: expected --head fused, got {self.head}")
        if self.class_parallel and ":" in self.device:
            raise OptionError(f"--class-parallel: each process takes a GPU of its own, got --device {self.device}")
        if self.class_parallel and not started_by_torchrun():
            raise OptionError(
                "--class-parallel: expected to be started by torchrun --nproc-per-node=2 train_faces.py …"
            )
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise OptionError(
                "--tensorboard: tensorboard is not installed: pip install tensorboard, or go without by --no-tensorboard"
            )
        self._check_device()
        if self.data is not None:
            data, outs = Path(os.path.realpath(self.data)), map(os.path.realpath, self.folders.values())
            if any(data in (Path(out), *Path(out).parents) for out in outs):
                raise OptionError(f"--out: expected a folder outside --data, got {printable(self.out)}")

    def _check_device(self) -> None:
        there = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        expected = f"--device: expected auto or a device of this machine ({', '.join(there)}), got {self.device!r}"
        try:
            device = self.torch_device
        except RuntimeError:
            raise OptionError(expected) from None
        if f"{device.type}:{device.index or 0}" not in [*there, "cpu:0"]:
            raise OptionError(expected)

    def settled(self, training_images: int) -> TrainOptions:
        """With epochs and batch size chosen by the number of training images where they were left open."""
        small = training_images < SMALL
        generated = self.data is None
        epochs = (8 if generated else 30) if small else 20
        batch_size = (64 if generated else 32) if small else 128
        return replace(self, epochs=self.epochs or epochs, batch_size=self.batch_size or batch_size)

    def as_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
