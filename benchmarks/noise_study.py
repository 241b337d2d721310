"""`python -m benchmarks.noise_study`: are a and b worth choosing, and does SFace stand wrong labels better than ArcFace?

Small trainings with the example's faces, backbone and recipe, on generated identities and on those of --data. A share of
the training images gets another identity's label; verification is on identities never seen. Each seed is another split,
other wrong labels, other weights, the same for every head. "suggested" trains with what `angles.suggest` makes of the last
epoch of the seed's run with the default a and b. Finished runs stay in --out, so that --runs makes the study in pieces.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from sface_kernels import angles
from sface_kernels.bench import report
from sface_kernels.bench.table import plain_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import train_faces
from faces import backbone, cartoon, data, folder, heads, options, verification, watch

HEADS = ("default", "CASIA-WebFace", "suggested", "ArcFace")  # of angles.RECIPES, but the last two
NOISE, SEEDS, FAR = (0.0, 0.1, 0.2), range(5), "1e-02"
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's, two-sided 95 %, by the number of seeds
IDENTITIES, IMAGES, BATCH, EPOCHS = 64, 12, 32, {"generated": 10, "real": 20}
# Scale and learning rate: the best mean AUC on both data sets, right labels, seed 99 (which no run has), of those tried
TUNED = {"ArcFace": [16.0, 0.02], "SFace": [64.0, 0.005]}
SETTINGS = {"identities": IDENTITIES, "images": IMAGES, "epochs": EPOCHS, "batch": BATCH, "scale_and_lr": TUNED}
KEY = ("data", "noise", "seed", "head")  # tells one training from another


def mislabelled(labels: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """`labels` `[M]` with round(share·M) of them, chosen at random, replaced by another class, all equally likely."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    rows = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    away = torch.randint(1, classes, rows.shape, generator=generator)
    return labels.index_copy(0, rows, (labels[rows] + away) % classes)


def trained(key: tuple[Any, ...], faces: data.FaceSet, a: float, b: float) -> dict[str, Any]:
    """Trains one head; its verification on the unseen identities, and the suggestion by its last epoch's angles."""
    kind, noise, seed, name = key
    split = data.split_identities(faces, 0.25, seed)
    images, labels = split.train.images, mislabelled(split.train.labels, noise, seed)
    s, lr = TUNED["ArcFace" if name == "ArcFace" else "SFace"]
    cpu, epochs, given = torch.device("cpu"), EPOCHS[kind], options.TrainOptions(s=s, lr=lr, a=a, b=b)
    torch.manual_seed(seed)
    network = backbone.FaceNet(given.embedding_size).to(memory_format=torch.channels_last)
    head = heads.build_head("arcface" if name == "ArcFace" else "fused", given, split.classes)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=lr, momentum=0.9, weight_decay=5e-4)
    generator, step, steps = torch.Generator().manual_seed(seed), 0, epochs * data.steps_per_epoch(len(images), BATCH)
    for _ in range(epochs):
        watch.forget_angles(head)
        for rows in data.batches(len(images), BATCH, generator):
            step += 1
            train_faces.set_learning_rate(optimizer, given.lr, step, steps)
            inputs = data.augment(images[rows], cpu, generator)
            train_faces.training_step(network, head, optimizer, inputs, labels[rows])
    found, counted = verification.verify(network, split.unseen, cpu), watch.batch_angles(head)
    suggested = None if counted is None else angles.suggest(counted)[:2]
    about = {"a": a, "b": b, "suggested": suggested, "auc": found.auc, "tar": found.tar}
    return {**dict(zip(KEY, key, strict=True)), **about}


def interval(values: list[float]) -> str:
    """Mean ± half of the 95 % confidence interval, by Student's t over the seeds."""
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T_95 else math.nan
    return f"{statistics.fmean(values):.4f} ± {half:.4f}" if values else "–"


def summary(done: dict[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each data set, share of wrong labels and head; differences are taken seed by seed."""
    lines = []
    for kind, noise, name in sorted(dict.fromkeys((k, n, h) for k, n, _, h in done), key=lambda case: case[:2]):
        rows = {seed: done[kind, noise, seed, name] for seed in SEEDS if (kind, noise, seed, name) in done}
        pairs = [(row, done.get((kind, noise, seed, "ArcFace"))) for seed, row in rows.items()]
        a, b = (statistics.fmean(row[name] for row in rows.values()) for name in "ab")
        recipe = "–" if name == "ArcFace" else f"{a:.2f}, {b:.2f}"
        line = {"data": kind, "wrong labels": f"{noise:.0%}", "head": name, "a, b": recipe}
        line["AUC"] = interval([row["auc"] for row in rows.values()])
        line[f"TAR at FAR {FAR}"] = interval([row["tar"][FAR] for row in rows.values()])
        line["AUC less ArcFace's"] = interval([row["auc"] - other["auc"] for row, other in pairs if other])
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="noise_study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help='one sub-folder of images per identity, "real" in the table')
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-noise-study.json"))
    parser.add_argument("--runs", type=int, help="make at most so many trainings now")
    given = parser.parse_args()
    if given.runs is not None and given.runs < 1:
        parser.error(f"--runs: expected at least 1, got {given.runs}")
    faces = {"generated": data.FaceSet(*cartoon.generate_faces(IDENTITIES, IMAGES, 0), "generated")}
    try:
        faces |= {"real": folder.load_folder(given.data)[0]} if given.data else {}
        new = report.new_report("table", SETTINGS, torch.device("cpu"))
        result = report.load(given.out) if given.out.exists() else new
    except (data.DataError, report.ReportError) as error:
        parser.error(str(error))
    if result["settings"] != SETTINGS:
        parser.error(f"--out: {given.out} has runs with the settings {result['settings']}, and now they are {SETTINGS}")
    done = {tuple(row[name] for name in KEY): row for row in result.setdefault("runs", [])}
    wanted = [(kind, noise, seed, name) for seed, noise, kind, name in itertools.product(SEEDS, NOISE, faces, HEADS)]
    for key in [key for key in wanted if key not in done][: given.runs]:
        kind, noise, seed, name = key
        suggested = name == "suggested" and done[kind, noise, seed, "default"]["suggested"]
        done[key] = trained(key, faces[kind], *(suggested or angles.RECIPES.get(name, angles.RECIPES["default"])))
        result.update(runs=list(done.values()), rows=summary(done))
        report.save(result, given.out)
        print(*key, f"AUC {done[key]['auc']:.4f}", flush=True)
    print(plain_table(result["rows"]).markdown())


if __name__ == "__main__":
    main()
