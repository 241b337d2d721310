"""What is wrong on one process is an error on all of them, with words, and nothing hangs."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from sface_kernels.distributed import ClassParallelSFaceLoss, parallel
from tests.distributed.batches import make_head, split
from tests.distributed.pool import GROUP_TIMEOUT
from tests.support.cases import f32, f64

DISAGREE: dict[str, tuple[dict, dict]] = {
    "in_features": (dict(in_features=8), dict(in_features=9)),
    "num_classes": (dict(num_classes=9), dict(num_classes=10)),
    "weight dtype": (dict(dtype=f32), dict(dtype=f64)),
    "s": (dict(s=64.0), dict(s=32.0)),
    "k": (dict(k=80.0), dict(k=70.0)),
    "a": (dict(a=0.8), dict(a=0.9)),
    "b": (dict(b=1.23), dict(b=1.2)),
    "filter_eps": (dict(filter_eps=0.0), dict(filter_eps=None)),
    "reduction": (dict(reduction="mean"), dict(reduction="sum")),
    "k_inter": (dict(k_inter=None), dict(k_inter=70.0)),
    "ignore_index": (dict(ignore_index=-100), dict(ignore_index=-1)),
    "uneven_batches": (dict(uneven_batches=True), dict(uneven_batches=False)),
    "sample_rate": (dict(sample_rate=1.0), dict(sample_rate=0.5)),
}


def disagreements():
    for name, choices in DISAGREE.items():
        mine = choices[dist.get_rank() == 2]
        with pytest.raises(ValueError, match=rf"^{name}: expected the same on every process, got .* on rank 2$"):
            ClassParallelSFaceLoss(**{"in_features": 8, "num_classes": 9, **mine})


def later_disagreements():
    batch = split("even", (24, 9, 16), f32)
    x, labels = batch.x[batch.mine], batch.labels[batch.mine]
    head = make_head(batch.w)
    last = dist.get_rank() == dist.get_world_size() - 1
    with pytest.raises(ValueError, match=r"^embeddings dtype: expected the same .*float32.*float16"):
        head(x.half() if last else x, labels)
    head.b = 1.0 if last else head.b
    with pytest.raises(ValueError, match=r"^b: expected the same on every process, got 1.1 on rank 0 and 1.0"):
        head(x, labels)
    head.b = 1.1
    with pytest.raises(ValueError, match=r"^return_stats: expected the same on every process, got False on rank 0"):
        head(x, labels, return_stats=last)
    with pytest.raises((ValueError, RuntimeError), match="return_stats: exp" if last else "raised an error"):
        head(x, labels, return_stats="row" if last else "rows")
    head.backend = "fast" if last else head.backend
    with pytest.raises(ValueError if last else RuntimeError, match="backend: exp" if last else "raised an error"):
        head(x, labels)
    head.backend = "auto"
    bad = [
        (x[:, :3], labels, r"weight: expected \[C, 3\]"),
        (x, labels.float(), "labels: expected an integer dtype"),
        (x, labels + 9, r"labels: expected values in \[0, 9\).*in row 0"),
        (x, labels[1:], "labels: expected shape"),
        (x.long(), labels, "embeddings: expected a dtype"),
        (None, labels, "embeddings: expected a torch.Tensor"),
    ]
    for theirs, classes, text in bad:
        with pytest.raises((ValueError, TypeError) if last else RuntimeError) as caught:
            head(theirs, classes) if last else head(x, labels)
        caught.match(text if last else f"rank {dist.get_world_size() - 1} raised an error")
    head(x, labels)  # and the group is still in step


def test_processes_that_disagree(pool):
    pool.run(3, disagreements)
    for processes in (2, 4):
        pool.run(processes, later_disagreements)


def arguments():
    for options, error, text in (
        (dict(reduction="none"), ValueError, "reduction: expected one of"),
        (dict(num_classes=0), ValueError, "num_classes: expected an int > 0"),
        (dict(in_features=2.0), TypeError, "in_features: expected an int"),
        (dict(s=0.0), ValueError, "s: expected a number > 0"),
        (dict(backend="fast"), ValueError, "backend: expected one of"),
        (dict(sample_rate="all"), TypeError, "sample_rate: expected a number"),
        (dict(sample_seed=0.5), TypeError, "sample_seed: expected an int"),
        (dict(mesh="cpu"), TypeError, "mesh: expected a DeviceMesh, got 'cpu'"),
        (dict(dtype=torch.int32), TypeError, "dtype: expected a dtype of float32"),
    ):
        with pytest.raises(error, match=text):
            ClassParallelSFaceLoss(**{"in_features": 8, "num_classes": 9, **options})
    group = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError, match="process_group: this process is not in it"):
            ClassParallelSFaceLoss(8, 9, process_group=group)


def test_arguments(pool):
    pool.run(2, arguments)


def test_no_process_group():
    with pytest.raises(RuntimeError, match=r"init_process_group.*for a single process use SFaceLoss"):
        ClassParallelSFaceLoss(8, 9)


def labels_outside_of_fixed_batches():
    """Without the exchange every process sees the gathered labels, and all of them raise."""
    batch = split("even", (24, 9, 16), f32)
    head, x, labels = make_head(batch.w, uneven_batches=False), batch.x[batch.mine], batch.labels[batch.mine].clone()
    head(x, labels)
    if dist.get_rank() == 1:
        labels[0] = 9
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 9\).*got 9"):
        head(x, labels)


def test_labels_outside(pool):
    pool.run(2, labels_outside_of_fixed_batches)


def dies_in(moment):
    batch = split("even", (24, 9, 16), f32)
    head, x = make_head(batch.w), batch.x[batch.mine].clone().requires_grad_()
    loss = head(x, batch.labels[batch.mine])
    dying = dist.get_rank() == 1
    if dying and moment == "before the backward":
        os._exit(1)
    start = time.monotonic()
    try:
        loss.backward()
        if dying and moment == "between two steps":
            os._exit(1)
        if dying:
            parallel.shard_rows = lambda *_: os._exit(1)
        head(x, batch.labels[batch.mine])
    except RuntimeError:
        return time.monotonic() - start
    raise AssertionError("nobody noticed")


@pytest.mark.parametrize("moment", ["before the backward", "between two steps", "within the forward"])
def test_a_process_that_dies(pool, moment):
    """The others end with an error within the group's timeout."""
    outcomes = pool.outcomes(3, dies_in, moment)
    assert [fine for fine, _ in outcomes] == [True, False, True], outcomes
    assert "died" in outcomes[1][1]
    assert all(outcomes[rank][1] < GROUP_TIMEOUT.total_seconds() + 5 for rank in (0, 2))
