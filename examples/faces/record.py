"""What a run leaves behind beside its checkpoint: metrics.json, TensorBoard events and weights."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sface_kernels.angles import AngleHistograms

from .events import Events
from .files import write_file, write_json, writing
from .options import TrainOptions
from .processes import whole
from .verification import Verification

METRICS, BACKBONE, HEAD, EVENTS = "metrics.json", "backbone.pt", "head.pt", "tensorboard"
STATISTICS = ("intra", "inter", "cos_target", "cos_other", "accuracy", "active_pairs")  # of the head's SFaceStats
STEP = ("step", "epoch", "loss", *STATISTICS, "head_ms", "step_ms")


class Recorder:
    """The record of one head's run, in `folder`, which is there.

    `metrics["steps"]` has a dict with the keys STEP per training step, `metrics["epochs"]` one per epoch. Every method raises OutputError
    where it cannot write.
    """

    def __init__(self, folder: Path, options: TrainOptions, head: str, data: dict[str, Any]) -> None:
        self.folder = folder
        about = {"options": options.as_json(), "head": head, "data": data}
        self.metrics: dict[str, Any] = {**about, "steps": [], "epochs": []}
        self._events: Events | None = None
        self._former: list[Path] = []  # events of another training

    def begin(self, tensorboard: bool) -> None:
        """Before the next step: starts the TensorBoard events after the steps already recorded. Without any, what
        another training left is removed when an epoch is done, and not before."""
        if not self.metrics["steps"]:
            self._former = list((self.folder / EVENTS).glob("events.out.tfevents.*"))
        if tensorboard:
            with writing(self.folder / EVENTS):
                self._events = Events(self.folder / EVENTS, len(self.metrics["steps"]))

    def step(self, values: dict[str, float]) -> None:
        self.metrics["steps"].append(values)
        self._curves({f"train/{name}": value for name, value in values.items() if name not in ("step", "epoch")})

    def epoch(self, epoch: int, seconds: float, result: Verification, angles: AngleHistograms | None = None) -> None:
        """The end of an epoch. `angles` are those of its batches, which go to TensorBoard."""
        with writing(self.folder / EVENTS):
            for path in self._former:
                path.unlink(missing_ok=True)
        self._former = []
        verification = verification_json(result)
        self.metrics["epochs"].append({"epoch": epoch, "seconds": seconds, "verification": verification})
        curves = {f"unseen/{name}": verification[name] for name in ("auc", "accuracy")}
        self._curves(curves | {f"unseen/tar_at_far_{far}": tar for far, tar in result.tar.items()}, flush=True)
        if self._events is not None and angles is not None:
            with writing(self.folder / EVENTS):
                for name, counts in angles._asdict().items():
                    self._events.add_angles(f"angles/{name}", counts, len(self.metrics["steps"]))
                self._events.flush()

    def _curves(self, values: dict[str, float], flush: bool = False) -> None:
        if self._events is None:
            return
        with writing(self.folder / EVENTS):
            for name, value in values.items():
                self._events.add(name, value, len(self.metrics["steps"]))
            if flush:
                self._events.flush()

    def save_metrics(self) -> None:
        write_json(self.folder / METRICS, self.metrics)

    def save_steps(self) -> None:
        """After a failure: the steps so far, but not in place of another training's record with what belongs to it."""
        if self.metrics["epochs"] or not (self.folder / HEAD).exists():
            self.save_metrics()

    def save(self, backbone: nn.Module, head: nn.Module) -> None:
        """Writes metrics.json, backbone.pt and head.pt (state dicts; the head's one key is `weight`)."""
        self.save_metrics()
        write_file(self.folder / BACKBONE, packed(backbone.state_dict()))
        write_file(self.folder / HEAD, packed(whole(head.state_dict())))

    def close(self) -> None:
        with suppress(OSError):  # each epoch's curves are written already
            if self._events is not None:
                self._events.close()
                if self._former:  # it ended within its first epoch
                    self._events.path.unlink()


def packed(content: Any) -> memoryview:
    """The bytes that `torch.save` writes; in memory first, as it hides the reason why a file cannot be written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def verification_json(result: Verification) -> dict[str, Any]:
    """The figures of a verification under the names of metrics.json."""
    return {
        "auc": result.auc,
        "accuracy": result.accuracy,
        "tar_at_far": result.tar,
        "genuine_pairs": result.genuine_pairs,
        "impostor_pairs": result.impostor_pairs,
    }
