"""What a run leaves behind: metrics.json, TensorBoard events, weights, and the checkpoint it can go on from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from .options import FREE_ON_RESUME, TrainOptions
from .verification import Verification

CHECKPOINT = "checkpoint.pt"


class CheckpointError(ValueError):
    """A checkpoint cannot be continued by this run. One line: what was expected and what came."""


class Recorder:
    """The record of one head's run, in `folder`.

    `metrics["steps"]` has a dict per training step, `metrics["epochs"]` one per epoch.
    """

    def __init__(self, folder: Path, options: TrainOptions, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.metrics: dict[str, Any] = {"options": options.as_json(), **about, "steps": [], "epochs": []}
        self._writer: SummaryWriter | None = None

    def open_events(self) -> None:
        """Starts the TensorBoard events after the steps already recorded; those of a former run are removed."""
        events, steps = self.folder / "tensorboard", len(self.metrics["steps"])
        if steps == 0:
            for old in events.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer = SummaryWriter(str(events), purge_step=steps + 1 if steps else None)

    def step(self, values: dict[str, float]) -> None:
        self.metrics["steps"].append(values)
        for name, value in values.items():
            if self._writer and name not in ("step", "epoch"):
                self._writer.add_scalar(f"train/{name}", value, int(values["step"]))

    def epoch(self, epoch: int, seconds: float, result: Verification) -> None:
        verification = verification_json(result)
        self.metrics["epochs"].append({"epoch": epoch, "seconds": seconds, "verification": verification})
        if self._writer:
            step = len(self.metrics["steps"])
            for name in ("auc", "accuracy"):
                self._writer.add_scalar(f"unseen/{name}", verification[name], step)
            for far, tar in result.tar.items():
                self._writer.add_scalar(f"unseen/tar_at_far_{far}", tar, step)
            self._writer.flush()

    def save(self, backbone: nn.Module, head: nn.Module) -> None:
        """Writes metrics.json, backbone.pt and head.pt (state dicts; the head's one key is `weight`)."""
        write_json(self.folder / "metrics.json", self.metrics)
        _save(backbone.state_dict(), self.folder / "backbone.pt")
        _save(head.state_dict(), self.folder / "head.pt")

    def close(self) -> None:
        if self._writer:
            self._writer.close()


def verification_json(result: Verification) -> dict[str, Any]:
    """The figures of a verification under the names of metrics.json."""
    return {
        "auc": result.auc,
        "accuracy": result.accuracy,
        "tar_at_far": result.tar,
        "genuine_pairs": result.genuine_pairs,
        "impostor_pairs": result.impostor_pairs,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file in one move, so that an interruption leaves the old one or the new one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def _save(content: Any, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(content, part)
    os.replace(part, path)


def save_checkpoint(
    recorder: Recorder,
    backbone: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    epoch: int,
) -> None:
    """Everything the run needs to go on after `epoch` as if it had not stopped."""
    state = {
        "epoch": epoch,
        "backbone": backbone.state_dict(),
        "head": head.state_dict(),
        "optimizer": optimizer.state_dict(),
        "data_rng": generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
        "metrics": recorder.metrics,
    }
    _save(state, recorder.folder / CHECKPOINT)


def load_checkpoint(
    recorder: Recorder,
    backbone: nn.Module,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Puts a checkpoint's state into the arguments. Returns the epochs it has behind it.

    Raises:
        CheckpointError: it is of another number of classes or embedding size, of other options, or unreadable.
    """
    path = recorder.folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        classes, embedding_size = state["head"]["weight"].shape
    except Exception as error:  # torch.load raises what its zip and pickle readers do
        raise CheckpointError(f"--resume: cannot read {path}: {str(error).splitlines()[0]}") from None
    there, here = (classes, embedding_size), tuple(head.state_dict()["weight"].shape)
    for name, was, now in zip(("number of classes", "embedding size"), there, here, strict=True):
        if was != now:
            raise CheckpointError(f"--resume: {path} has another {name}: {was}, and this run has {now}")
    was_options, now_options = state["metrics"]["options"], recorder.metrics["options"]
    for name, now in now_options.items():
        if name not in FREE_ON_RESUME and was_options.get(name) != now:
            option = "--" + name.replace("_", "-")
            raise CheckpointError(f"--resume: {path} was made with {option} {was_options.get(name)}, not {now}")
    if state["metrics"]["data"]["fingerprint"] != recorder.metrics["data"]["fingerprint"]:
        raise CheckpointError(f"--resume: {path} was made with other images than those of {now_options['data']}")

    backbone.load_state_dict(state["backbone"])
    head.load_state_dict(state["head"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["data_rng"])
    torch.set_rng_state(state["torch_rng"])
    if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    recorder.metrics = {**state["metrics"], "options": now_options}
    return int(state["epoch"])
