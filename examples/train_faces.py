"""Trains a small face recogniser with the SFace loss, and verifies it on people it has never seen.

python examples/train_faces.py --data DIR --head both --out runs/mine     # one folder per identity in DIR
python examples/train_faces.py --head both --out runs/demo                # generated cartoon faces
torchrun --nproc-per-node=2 examples/train_faces.py --class-parallel      # rows and classes spread over two processes
"""

from __future__ import annotations

import io
import math
import os
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other where cores are shared

import torch
import typer
from faces.angles import angle_histograms
from faces.backbone import FaceNet
from faces.checkpoint import (
    CHECKPOINT,
    CheckpointError,
    DivergedError,
    Training,
    check_same_training,
    promise,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from faces.comparison import HeadRun, compare
from faces.data import DataError, Split, augment, batches, split_identities, steps_per_epoch
from faces.files import FULL, OutputError, output_folders, printable
from faces.heads import about, build_head
from faces.options import OptionError, TrainOptions
from faces.plots import PLOTS, Curves, draw_all
from faces.processes import averaged, fewest_rows, own_rows, process_group, whole
from faces.record import BACKBONE, EVENTS, HEAD, METRICS, STATISTICS, Recorder
from faces.source import load_faces
from faces.verification import embed, verify
from faces.watch import LIVE, LivePlot, batch_angles, epoch_line, forget_angles, training_progress
from rich.console import Console
from torch import Tensor, nn

WARMUP = 0.05  # share of the steps over which the learning rate rises


class Interrupted(Exception):
    """Ctrl-C in the training. The text says what is saved."""


def train(options: TrainOptions, console: Console) -> dict[str, HeadRun]:
    """The whole run: faces, one training per head, plots, and the comparison where there are two."""
    options.check()
    saved = {}
    if options.resume:
        saved = {name: read_checkpoint(at) for name, at in options.folders.items() if os.path.exists(at / CHECKPOINT)}
        if not saved:
            where = printable(options.out)
            raise CheckpointError(f"--resume: expected {CHECKPOINT} of a former run in {where}, found none")
    if not options.class_parallel:
        return train_into_folders(options, saved, console)
    with process_group(options.torch_device) as rank, tempfile.TemporaryDirectory() as nowhere:
        if rank > 0:  # the first process speaks and writes for all
            options, console = replace(options, out=Path(nowhere)), Console(quiet=True)
        return train_into_folders(options, saved, console)


def train_into_folders(options: TrainOptions, saved: dict[str, Any], console: Console) -> dict[str, HeadRun]:
    """`train`, once the options are known to be sound. `saved` has the checkpoints to go on from, by head."""
    heads = options.folders.values()
    folders = dict.fromkeys((options.out, *heads, *(folder / EVENTS for folder in heads)))
    with output_folders(folders, (CHECKPOINT, METRICS, BACKBONE, HEAD, LIVE, *(f"{plot}.png" for plot in PLOTS))):
        return train_heads(options, saved, console)


def train_heads(options: TrainOptions, saved: dict[str, Any], console: Console) -> dict[str, HeadRun]:
    """`train`, once the output folders are there. `saved` has the checkpoints to go on from, by head."""
    if options.threads:
        torch.set_num_threads(options.threads)
    faces, left_out = load_faces(options, console)
    split = split_identities(faces, options.val_fraction, options.seed)
    images = len(split.train.images)
    options = options.settled(images)
    if min(options.batch_size or 1, images) < fewest_rows():
        raise OptionError(
            f"--class-parallel: expected batches of at least {fewest_rows()} images, two for each process, got "
            f"{options.batch_size} of {images} training images"
        )
    console.print(
        f"{split.classes} identities with {images} images to train on, "
        f"{int(split.unseen.labels.max()) + 1} unseen ones with {len(split.unseen.images)} images to verify on; "
        f"{options.epochs} epochs, batches of {options.batch_size}"
    )
    runs, plots = {}, []
    for name, folder in options.folders.items():
        recorder = Recorder(folder, options, name, {**split.as_json(), "left_out": left_out})
        runs[name] = train_head(name, recorder, options, split, saved.pop(name, None), console)
        plots += draw_all({name: runs[name].curves}, options.as_json(), folder)
    if len(runs) > 1:
        plots = compare(runs, options, console)
    console.print("Plots: " + ", ".join(map(printable, plots)), soft_wrap=True)
    if options.tensorboard:
        console.print(f"Curves: tensorboard --logdir {shlex.quote(printable(options.out))}", soft_wrap=True)
    return runs


def train_head(
    name: str, recorder: Recorder, options: TrainOptions, split: Split, state: dict[str, Any] | None, console: Console
) -> HeadRun:
    """Trains backbone and head from `options.seed`: the same initial weights and images whatever the head.

    Args:
        state: of a checkpoint to go on from, if any.
    """
    device = options.torch_device
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)  # order of the images and their augmentation
    backbone = FaceNet(options.embedding_size).to(device, memory_format=torch.channels_last)
    network = averaged(backbone)
    head = build_head(name, options, split.classes).to(device)
    parameters = [*backbone.parameters(), *head.parameters()]
    # foreach=False: sharded and plain parameters do not go through one fused update
    fused = False if options.class_parallel else None
    optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=5e-4, foreach=fused)
    training = Training(backbone, head, optimizer, generator)
    folder, metrics = recorder.folder, recorder.metrics
    if state is not None:
        check_same_training(state, metrics, folder)
        restore(state, training, folder)
        metrics.update(steps=state["metrics"]["steps"], epochs=state["metrics"]["epochs"])
        recorder.save(backbone, head)  # an interrupt may have left what they were before the checkpoint
        console.print(f"{name}: going on after epoch {len(metrics['epochs'])}")
    console.print(about(name, device))
    images, epochs, done = len(split.train.images), options.epochs or 1, len(metrics["epochs"])
    total_steps = epochs * steps_per_epoch(images, options.batch_size or 1, fewest_rows())
    result, live = None, LivePlot(folder / LIVE if options.live_plot else None, name, options)
    try:
        recorder.begin(options.tensorboard)
        with training_progress(console) as progress:
            loss = metrics["steps"][-1]["loss"] if metrics["steps"] else math.nan
            bar = progress.add_task(name, total=epochs * images, completed=done * images, loss=loss, rate=0.0)
            for epoch in range(done + 1, epochs + 1):
                spent = 0.0  # seconds in steps, without what is drawn meanwhile
                forget_angles(head)
                for rows in batches(images, options.batch_size or 1, generator, fewest_rows()):
                    began, step = time.perf_counter(), len(metrics["steps"]) + 1
                    set_learning_rate(optimizer, options.lr, step, total_steps)
                    faces, labels = augment(split.train.images[rows], device, generator), split.train.labels[rows]
                    mine = own_rows()
                    values = training_step(network, head, optimizer, faces[mine], labels[mine].to(device))
                    seconds = time.perf_counter() - began
                    spent += seconds
                    recorder.step({"step": step, "epoch": epoch, **values, "step_ms": seconds * 1e3})
                    if not math.isfinite(values["loss"]):
                        raise DivergedError(f"the loss is {values['loss']} at step {step}: try a lower --lr")
                    progress.update(bar, advance=len(rows), loss=values["loss"], rate=len(rows) / seconds)
                    live.update(metrics["steps"], head)
                result = verify(backbone, split.unseen, device)
                recorder.epoch(epoch, spent, result, batch_angles(head))
                live.update(metrics["steps"], head, now=True)
                save_checkpoint(folder, training, metrics)
                recorder.save(backbone, head)
                progress.console.print(epoch_line(name, epoch, epochs, metrics, images / spent, result))
    except OutputError as error:
        raise OutputError(f"{error}; {promise(folder, metrics)}", error.full) from None
    except BaseException as stop:  # Ctrl-C, a loss of NaN, too little memory: the steps so far are worth keeping
        recorder.save_steps()
        if isinstance(stop, KeyboardInterrupt):
            where = f"interrupted after step {len(metrics['steps'])} of {total_steps} of the {name} head"
            raise Interrupted(f"{where}; {promise(folder, metrics)}") from None
        raise
    finally:
        recorder.close()
    result = result or verify(backbone, split.unseen, device)
    weight = whole(head.weight.detach())
    angles = angle_histograms(backbone, weight, split.train, device)
    batch = slice(0, options.batch_size)
    embeddings = embed(backbone, split.train.images[batch], device).to(device)
    curves = Curves(metrics["steps"], result, angles)
    return HeadRun(curves, metrics, weight, embeddings, split.train.labels[batch].to(device))


def training_step(
    backbone: nn.Module, head: nn.Module, optimizer: torch.optim.Optimizer, faces: Tensor, labels: Tensor
) -> dict[str, float]:
    """One step of SGD. Returns the head's statistics and the time of its forward and backward alone, `head_ms`."""
    optimizer.zero_grad()
    embeddings = backbone(faces)  # [N, D]
    leaf = embeddings.detach().requires_grad_()  # cuts the graph, so that the head's part can be timed
    synchronise(leaf.device)
    start = time.perf_counter()
    loss, stats = head(leaf, labels, return_stats=True)
    loss.backward()
    synchronise(leaf.device)
    head_ms = (time.perf_counter() - start) * 1e3
    embeddings.backward(leaf.grad)
    optimizer.step()
    numbers = torch.stack([loss.detach().double()] + [getattr(stats, name).double() for name in STATISTICS])
    return {**dict(zip(("loss", *STATISTICS), numbers.tolist(), strict=True)), "head_ms": head_ms}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, total: int) -> None:
    """Linear warm-up, then a half cosine down to 0 after step `total`."""
    rate = peak * min(1.0, step / (WARMUP * total)) * 0.5 * (1 + math.cos(math.pi * (step - 1) / total))
    for group in optimizer.param_groups:
        group["lr"] = rate


class HeadChoice(str, Enum):
    fused = "fused"
    reference = "reference"
    arcface = "arcface"
    both = "both"


def command(
    data: Annotated[Path | None, typer.Option(help="Folder with one sub-folder of images per identity. Left out: generated cartoon faces.")] = None,
    head: Annotated[HeadChoice, typer.Option(help="fused: the fastest backend here; reference: plain PyTorch; both: these two, compared; arcface: plain ArcFace.")] = HeadChoice.fused,
    out: Annotated[Path, typer.Option(help="Where metrics.json, plots, TensorBoard events and weights go.")] = Path("runs/faces"),
    epochs: Annotated[int | None, typer.Option(help="Left out: below 10 000 training images 30 (generated: 8), else 20.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Left out: below 10 000 training images 32 (generated: 64), else 128.")] = None,
    embedding_size: Annotated[int, typer.Option(help="D, numbers per embedding.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate: 5 % linear warm-up, then a half cosine to 0.")] = 0.05,
    s: Annotated[float, typer.Option(help="Scale of the loss.")] = 64.0,
    k: Annotated[float, typer.Option(help="Slope of both rescale sigmoids, eqs. (3) and (4).")] = 80.0,
    a: Annotated[float, typer.Option(help="Angle (rad) around which the pull to the own centre fades.")] = 0.80,
    b: Annotated[float, typer.Option(help="Angle (rad) around which the push from other centres sets in.")] = 1.23,
    seed: Annotated[int, typer.Option(help="Of the generated faces, the split, the weights and the order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Left out: PyTorch's choice.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the identities kept out of training, for verification.")] = 0.25,
    identities: Annotated[int | None, typer.Option(help="Number of generated identities (400).")] = None,
    images_per_identity: Annotated[int | None, typer.Option(help="Images of each generated identity (20).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, with the same options.")] = False,
    live_plot: Annotated[bool, typer.Option("--live-plot", help="Rewrite live.png in --out every 15 seconds: the loss, and where the angles are.")] = False,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard events; needs the package tensorboard.")] = True,
    class_parallel: Annotated[bool, typer.Option("--class-parallel", help="Under torchrun: every process takes its rows of a batch and its classes of the head.")] = False,
) -> None:  # fmt: skip
    """Train a small face recogniser with the SFace loss and verify it on identities it has never seen.

    The loss starts near 0, rises while all embeddings still point one way, then falls below 0 and need not fall
    monotonically: once every face is within angle a of its centre both terms fade to 0.
    """
    given = {**locals(), "head": head.value}
    console = Console(markup=False, emoji=False)  # users' names have brackets and colons
    try:
        train(TrainOptions(**given), console)
    except (OptionError, DataError, CheckpointError) as error:
        leave(2, f"error: {error}")
    except OutputError as error:
        leave(1 if error.full else 2, f"error: --out: {error}")
    except DivergedError as error:
        leave(1, f"error: {error}")
    except OSError as error:
        if error.errno not in FULL:
            raise
        leave(1, f"error: cannot write what is printed: {error.strerror}")
    except (Interrupted, KeyboardInterrupt) as interrupt:
        leave(130, str(interrupt) or "interrupted")
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)):
            raise
        leave(1, "error: too little memory for these options and data")


def leave(status: int, message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(status)


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
app.command()(command)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone is no reason to stop
    app()


if __name__ == "__main__":
    main()
