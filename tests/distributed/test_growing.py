"""`add_classes` on a spread weight: rows and optimizer state move to the processes that hold them then."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sface_kernels.distributed import ClassParallelSFaceLoss
from tests.distributed.batches import make_head, single
from tests.distributed.test_training import OPTIMIZERS, bounds
from tests.support.cases import f64

ROWS, FEATURES = 12, 8


def steps(head, optimizer, first, classes, whole):
    for step in range(first, first + 3):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(ROWS, FEATURES, generator=g, dtype=f64)
        labels = torch.randint(0, classes, (ROWS,), generator=g)
        rows = slice(None) if whole else bounds("even", ROWS)
        head(x[rows], labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def grow(optimizer_name, classes, counts):
    torch.manual_seed(0)
    w = torch.randn(classes, FEATURES, dtype=f64)
    head, plain = make_head(w), single(w)
    ours, theirs = (OPTIMIZERS[optimizer_name](m.parameters()) for m in (head, plain))
    for index, count in enumerate(counts):
        steps(head, ours, 10 * index, classes, False)
        steps(plain, theirs, 10 * index, classes, True)
        before = head.full_weight()
        head.add_classes(count, ours)
        plain.add_classes(count, theirs)
        classes += count
        grown = head.full_weight()
        assert grown.shape == (classes, FEATURES) and head.num_classes == classes
        assert len(head.weight.to_local()) == head.class_range[1] and head.weight.grad is None
        assert torch.equal(grown[:-count], before)
        assert len(grown.unique(dim=0)) == classes and grown[-count:].any(1).all()
        with torch.no_grad():
            plain.weight.copy_(grown)
    steps(head, ours, 100, classes, False)
    steps(plain, theirs, 100, classes, True)
    torch.testing.assert_close(head.full_weight(), plain.weight.detach(), rtol=1e-9, atol=1e-11)
    return grown


@pytest.mark.parametrize("processes", [1, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on(pool, processes, optimizer):
    """Against a single process; also from two classes on, where the last processes begin without any."""
    for classes, counts in ((10, (5, 1)), (2, (1, 30))):
        pool.run(processes, grow, optimizer, classes, counts)


def new_rows():
    head = ClassParallelSFaceLoss(64, 1000)
    head.add_classes(2000)
    rows = head.full_weight()[1000:].double()
    assert abs(float(rows.std()) / (2 * (2 / 3000) ** 0.5) - 1) < 5 / (2 * rows.numel()) ** 0.5


def test_new_rows_start_as_a_head_of_the_final_size_does(pool):
    pool.run(2, new_rows)


def bad_counts():
    head = ClassParallelSFaceLoss(8, 9)
    with pytest.raises(ValueError, match="count: expected an int > 0"):
        head.add_classes(0)
    with pytest.raises(
        ValueError, match=r"^count: expected the same on every process, got 1 on rank 0 and 2 on rank 1"
    ):
        head.add_classes(1 + dist.get_rank())
    weight = head.weight
    with pytest.raises(ValueError, match="optimizer: expected one that holds the head's weight"):
        head.add_classes(1, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    assert head.weight is weight and head.num_classes == 9


def test_bad_input(pool):
    pool.run(2, bad_counts)
