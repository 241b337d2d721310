"""Trains a small face recogniser with the SFace loss, and verifies it on people it has never seen.

python examples/train_faces.py --data DIR --head both --out runs/mine     # one folder per identity in DIR
python examples/train_faces.py --head both --out runs/demo                # generated cartoon faces
"""

from __future__ import annotations

import math
import os
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other where cores are shared

import torch
import typer
from faces.angles import angle_histograms
from faces.backbone import FaceNet
from faces.cartoon import generate_faces
from faces.comparison import BACKENDS, HeadRun, compare
from faces.data import DataError, FaceSet, Split, augment, batches, split_identities, steps_per_epoch
from faces.folder import load_folder
from faces.options import OptionError, TrainOptions
from faces.plots import Curves, draw_all
from faces.record import CHECKPOINT, CheckpointError, Recorder, load_checkpoint, save_checkpoint
from faces.verification import Verification, embed, verify
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, track
from torch import Tensor

from sface_kernels import SFaceLoss, explain

WARMUP = 0.05  # share of the steps over which the learning rate rises
STATISTICS = ("intra", "inter", "cos_target", "cos_other", "accuracy", "active_pairs")


class Interrupted(Exception):
    """Ctrl-C, after what was recorded has been saved. The text says where."""


class DivergedError(RuntimeError):
    """The loss is no longer a number."""


def train(options: TrainOptions, console: Console) -> dict[str, HeadRun]:
    """The whole run: faces, one training per head, plots, and the comparison where there are two."""
    options.check()
    if options.threads:
        torch.set_num_threads(options.threads)
    split = split_identities(load_faces(options, console), options.val_fraction, options.seed)
    options = options.settled(len(split.train.images))
    folders = {name: options.out / name if len(options.heads) > 1 else options.out for name in options.heads}
    if options.resume and not any((folder / CHECKPOINT).exists() for folder in folders.values()):
        raise CheckpointError(f"--resume: expected {CHECKPOINT} of a former run in {options.out}, found none")
    console.print(
        f"{split.classes} identities with {len(split.train.images)} images to train on, "
        f"{int(split.unseen.labels.max()) + 1} unseen ones with {len(split.unseen.images)} images to verify on; "
        f"{options.epochs} epochs, batches of {options.batch_size}"
    )

    runs, plots = {}, []
    for name, folder in folders.items():
        runs[name] = train_head(name, folder, options, split, console)
        plots += draw_all({name: runs[name].curves}, options.as_json(), folder)
    if len(runs) > 1:
        plots = compare(runs, options, console)
    console.print("Plots: " + ", ".join(str(path) for path in plots), soft_wrap=True)
    console.print(f"Curves: tensorboard --logdir {options.out}", soft_wrap=True)
    return runs


def load_faces(options: TrainOptions, console: Console) -> FaceSet:
    """The faces of --data, with a word on each broken file, or generated ones."""
    if options.data is None:
        identities, each = options.identities or 400, options.images_per_identity or 20
        console.print(f"Drawing {identities} identities with {each} images each (seed {options.seed})")
        return FaceSet(*generate_faces(identities, each, options.seed), f"{identities} generated identities")
    faces, broken = load_folder(options.data, lambda files: track(files, "Reading faces", console=console))
    if broken:
        console.print(
            f"Skipped {len(broken)} broken image{'s' * (len(broken) > 1)}: " + "; ".join(broken), soft_wrap=True
        )
    return faces


def train_head(name: str, folder: Path, options: TrainOptions, split: Split, console: Console) -> HeadRun:
    """Trains backbone and head from `options.seed`: the same initial weights and images whatever the head."""
    device = options.torch_device
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)  # order of the images and their augmentation
    backbone = FaceNet(options.embedding_size).to(device, memory_format=torch.channels_last)
    head = SFaceLoss(
        options.embedding_size, split.classes, s=options.s, k=options.k, a=options.a, b=options.b,
        backend=BACKENDS[name],
    ).to(device)  # fmt: skip
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=options.lr, momentum=0.9, weight_decay=5e-4)

    recorder = Recorder(folder, options, {"head": name, "data": split.as_json()})
    done = 0
    if options.resume and (folder / CHECKPOINT).exists():
        done = load_checkpoint(recorder, backbone, head, optimizer, generator)
        console.print(f"{name}: going on after epoch {done}")
    recorder.open_events()
    console.print(explain(device, backend=BACKENDS[name]).splitlines()[0])
    images, epochs = len(split.train.images), options.epochs or 1
    total_steps = epochs * steps_per_epoch(images, options.batch_size or 1)
    result = None
    save_checkpoint(recorder, backbone, head, optimizer, generator, done)
    try:
        with training_progress(console) as progress:
            bar = progress.add_task(name, total=epochs * images, completed=done * images, loss=math.nan, rate=0.0)
            for epoch in range(done + 1, epochs + 1):
                start = time.perf_counter()
                for rows in batches(images, options.batch_size or 1, generator):
                    began, step = time.perf_counter(), len(recorder.metrics["steps"]) + 1
                    set_learning_rate(optimizer, options.lr, step, total_steps)
                    faces, labels = augment(split.train.images[rows], device, generator), split.train.labels[rows]
                    values = training_step(backbone, head, optimizer, faces, labels.to(device))
                    seconds = time.perf_counter() - began
                    values = {"step": step, "epoch": epoch, **values, "step_ms": seconds * 1e3}
                    recorder.step(values)
                    if not math.isfinite(values["loss"]):
                        raise DivergedError(f"the loss is {values['loss']} at step {step}: try a lower --lr")
                    rate = len(rows) / seconds
                    progress.update(bar, advance=len(rows), loss=values["loss"], rate=rate)
                seconds = time.perf_counter() - start
                result = verify(backbone, split.unseen, device)
                recorder.epoch(epoch, seconds, result)
                save_checkpoint(recorder, backbone, head, optimizer, generator, epoch)
                progress.console.print(epoch_line(name, epoch, epochs, recorder.metrics, images / seconds, result))
    except KeyboardInterrupt:
        epochs_done = len(recorder.metrics["epochs"])
        raise Interrupted(
            f"interrupted in epoch {epochs_done + 1} of {epochs} of the {name} head: metrics.json with "
            f"{len(recorder.metrics['steps'])} steps, backbone.pt and head.pt are in {folder}; "
            f"--resume goes on after epoch {epochs_done}"
        ) from None
    finally:
        recorder.save(backbone, head)
        recorder.close()
    result = result or verify(backbone, split.unseen, device)
    return finished(recorder, backbone, head, split, device, options, result)


def training_step(
    backbone: FaceNet, head: SFaceLoss, optimizer: torch.optim.Optimizer, faces: Tensor, labels: Tensor
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


def training_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  loss {task.fields[loss]:7.2f}  {task.fields[rate]:6.0f} samples/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def epoch_line(name: str, epoch: int, epochs: int, metrics: dict[str, Any], rate: float, result: Verification) -> str:
    """One line on an epoch: means over its steps, then verification on the unseen identities."""
    steps = [step for step in metrics["steps"] if step["epoch"] == epoch]
    mean = {key: sum(step[key] for step in steps) / len(steps) for key in ("loss", *STATISTICS)}
    return (
        f"{name} epoch {epoch}/{epochs}  loss {mean['loss']:6.2f} (intra {mean['intra']:.2f}, inter "
        f"{mean['inter']:.2f})  cos {mean['cos_target']:.3f}/{mean['cos_other']:.3f}  acc {mean['accuracy']:.3f}  "
        f"unseen: AUC {result.auc:.4f}, acc {result.accuracy:.4f}  {rate:.0f} samples/s"
    )


def finished(
    recorder: Recorder,
    backbone: FaceNet,
    head: SFaceLoss,
    split: Split,
    device: torch.device,
    options: TrainOptions,
    result: Verification,
) -> HeadRun:
    own, others = angle_histograms(backbone, head.weight, split.train, device)
    batch = slice(0, options.batch_size)
    embeddings = embed(backbone, split.train.images[batch], device).to(device)
    curves = Curves(recorder.metrics["steps"], result, own, others)
    return HeadRun(curves, recorder.metrics, head.weight.detach(), embeddings, split.train.labels[batch].to(device))


class HeadChoice(str, Enum):
    fused = "fused"
    reference = "reference"
    both = "both"


def command(
    data: Annotated[Path | None, typer.Option(help="Folder with one sub-folder of jpg, png or pgm images per identity. Left out: generated cartoon faces.")] = None,
    head: Annotated[HeadChoice, typer.Option(help="fused: the fastest backend here; reference: plain PyTorch; both: one after the other, compared.")] = HeadChoice.fused,
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
) -> None:  # fmt: skip
    """Train a small face recogniser with the SFace loss and verify it on identities it has never seen.

    The loss starts near 0, rises while all embeddings still point one way, then falls below 0 and need not fall
    monotonically: once every face is within angle a of its centre both terms fade to 0.
    """
    given = {**locals(), "head": head.value}
    console = Console()
    try:
        train(TrainOptions(**given), console)
    except (OptionError, DataError, CheckpointError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except DivergedError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except (Interrupted, KeyboardInterrupt) as stop:
        typer.echo(str(stop) or "interrupted before training: nothing was recorded", err=True)
        raise typer.Exit(130) from None


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
app.command()(command)

if __name__ == "__main__":
    app()
