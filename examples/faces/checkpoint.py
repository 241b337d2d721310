"""The checkpoint of a run: everything it needs to go on after an epoch as if it had not stopped."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .files import printable, write_file
from .processes import shard_like, whole
from .record import STEP, packed

CHECKPOINT = "checkpoint.pt"
PARTS: dict[str, Any] = {
    **{"epoch": int, "backbone": dict, "head": dict, "optimizer": dict, "metrics": dict},
    **{"data_rng": Tensor, "torch_rng": Tensor, "cuda_rng": list},
}
METRICS: dict[str, Any] = {"options": dict, "head": str, "data": dict, "steps": list, "epochs": list}
EPOCH: dict[str, Any] = {"epoch": int, "seconds": float, "verification": dict}
# A run may go on elsewhere: on another machine, from another folder with the same images, into another one.
FREE_ON_RESUME = {
    *("data", "head", "device", "threads", "out", "resume", "class_parallel", "source", "left_out"),
    *("live_plot", "tensorboard"),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be continued by this run. One line: what was expected and what came."""


class DivergedError(RuntimeError):
    """The training no longer has finite numbers."""


class Training(NamedTuple):
    """What changes with every step, apart from the metrics."""

    backbone: nn.Module
    head: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator


def save_checkpoint(folder: Path, training: Training, metrics: dict[str, Any]) -> None:
    """Writes the checkpoint of the last epoch in `metrics`, whole or not at all.

    Raises:
        DivergedError: a weight, or a number of the optimizer, is not finite. Nothing is written.
        OutputError: it cannot be written.
    """
    epoch = len(metrics["epochs"])
    state = {
        "epoch": epoch,
        "backbone": training.backbone.state_dict(),
        "head": whole(training.head.state_dict()),
        "optimizer": whole(training.optimizer.state_dict()["state"]),  # its options are this program's
        "data_rng": training.generator.get_state(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all(),
        "metrics": metrics,
    }
    if not _finite(state):
        raise DivergedError(f"the weights are not finite after epoch {epoch}: try a lower --lr")
    write_file(folder / CHECKPOINT, packed(state))


def read_checkpoint(folder: Path, name: str = CHECKPOINT) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote into the folder.

    Raises:
        CheckpointError: there is none, or it is something else.
    """
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"--resume: cannot read {printable(path)}: {error.strerror}") from None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its zip and pickle readers do
        raise _no_checkpoint(path, f"torch.load refuses it ({type(error).__name__})") from None
    _expect([state], PARTS, path)
    metrics = state["metrics"]
    _expect([metrics], METRICS, path)
    _expect(metrics["steps"], dict.fromkeys(STEP, (int, float)), path)
    _expect(metrics["epochs"], EPOCH, path)
    if len(metrics["epochs"]) != state["epoch"]:
        raise _no_checkpoint(path, f"it is of epoch {state['epoch']}, with metrics of {len(metrics['epochs'])} epochs")
    if not _finite(state):
        raise _no_checkpoint(path, "its weights are not finite")
    return state


def check_same_training(state: dict[str, Any], metrics: dict[str, Any], folder: Path) -> None:
    """Raises CheckpointError, with the first difference, if the state is of another training than `metrics`."""
    was, now = state["metrics"], metrics
    pairs = [(name, was["options"].get(name), value) for name, value in now["options"].items()]
    pairs += [(name, was["data"].get(name), value) for name, value in now["data"].items()]
    pairs = [pair for pair in pairs if pair[0] not in FREE_ON_RESUME]
    for name, there, here in (*pairs, ("head", was["head"], now["head"])):
        if there != here:
            raise CheckpointError(
                f"--resume: {printable(folder / CHECKPOINT)} differs in {name.replace('_', ' ')}: {there}, and this run "
                f"has {here}"
            )


def restore(state: dict[str, Any], training: Training, folder: Path) -> None:
    """Puts the state into the training.

    Raises:
        CheckpointError: it does not fit. The training is then of no use.
    """
    try:
        training.backbone.load_state_dict(state["backbone"])
        training.head.load_state_dict(state["head"])
        training.optimizer.load_state_dict({**training.optimizer.state_dict(), "state": state["optimizer"]})
        for parameter in (*training.backbone.parameters(), *training.head.parameters()):
            training.optimizer.state[parameter]["momentum_buffer"]  # without it SGD would start anew, without a word
            shard_like(parameter, training.optimizer.state[parameter])
        training.generator.set_state(state["data_rng"])
        torch.set_rng_state(state["torch_rng"])
        if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
    except Exception as error:  # of many kinds, by what does not fit
        raise _no_checkpoint(folder / CHECKPOINT, " ".join(str(error).split())[:200]) from None


def promise(folder: Path, metrics: dict[str, Any]) -> str:
    """What `--resume` would do now, from what is really in the folder."""
    try:
        state = read_checkpoint(folder)
        check_same_training(state, metrics, folder)
    except CheckpointError:
        return "no epoch of this training is saved, so that --resume has nothing to go on from"
    return f"--resume goes on after epoch {state['epoch']}"


def _expect(entries: list[Any], parts: dict[str, Any], path: Path) -> None:
    for entry in entries:
        for name, kind in parts.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise _no_checkpoint(path, f"it lacks {name!r}")


def _no_checkpoint(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"--resume: {printable(path)} is no checkpoint of this program: {printable(reason)}")


def _finite(tree: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(tree))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)
