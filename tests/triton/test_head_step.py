"""The head's optimizers on the Triton backend: the kernels that would make ∂w move the weight instead.

As `test_triton.py`, on a GPU, in Triton's interpreter or as compiled PTX.
"""

from __future__ import annotations

import pytest
import torch

from sface_kernels import SFaceLoss, pending
from sface_kernels.backends.triton import device, tiles
from sface_kernels.optim import HeadAdamW, HeadSGD
from tests.optim.test_trajectory import steps
from tests.optim.trainings import train
from tests.support.cases import f32
from tests.support.problems import GEOMETRIES
from tests.triton.conftest import forget_kinds
from tests.triton.test_triton import DEVICE, FAST, pytestmark  # noqa: F401

SHAPE = (5, 35, 17)


def problem(shape=SHAPE, geometry="trained"):
    return GEOMETRIES[geometry](*shape).to(DEVICE, f32, f32)


@pytest.fixture
def moves(monkeypatch):
    """The rules by which the kernels moved a weight."""
    made = []
    move = pending.WeightGradient.move

    def counted(gradient, rule, **numbers):
        made.append(rule)
        move(gradient, rule, **numbers)

    monkeypatch.setattr(pending.WeightGradient, "move", counted)
    return made


@pytest.mark.parametrize("filter_eps", [FAST, 0.0], ids=["lists", "dense"])
@pytest.mark.parametrize(
    "rule, options, name",
    [
        ("SGD", dict(), "momentum"),
        ("SGD", dict(momentum=0.0), "sgd"),
        ("SGD", dict(nesterov=True, maximize=True), "nesterov"),
        ("SGD", dict(dampening=0.3, weight_decay=0.0), "momentum"),
        ("AdamW", dict(), "adamw"),
        ("AdamW", dict(betas=(0.5, 0.9), eps=1e-3, maximize=True), "adamw"),
    ],
    ids=str,
)
def test_every_rule(poisoned, moves, rule, options, name, filter_eps):
    train(steps(3), problem(), rule, options, backend="triton", filter_eps=filter_eps)
    assert moves == ([name] * 3 if filter_eps else [])  # after dense products by ranges, as below


def test_a_list_that_is_too_small_reads_no_row_that_has_moved(poisoned, moves, lists, monkeypatch):
    """Such a sample's cosines need whole rows of w: no other program may have moved half of one."""
    monkeypatch.setattr(tiles, "SCATTER_FEATURES", 16)
    lists(1, 1)
    train(steps(2), problem((5, 35, 40)), "SGD", dict(lr=0.5), backend="triton", filter_eps=FAST)
    assert moves == ["momentum"] * 2


@pytest.mark.parametrize("filter_eps", [FAST, 0.0], ids=["lists", "dense"])
def test_several_backwards_are_added_up_by_ranges(poisoned, moves, monkeypatch, filter_eps):
    """Ranges of 128 classes, each from the lists of the whole forward, which is not run again."""
    monkeypatch.setattr(pending, "RANGE_BYTES", 1)
    monkeypatch.setattr(pending, "RANGE_BYTES_CUDA", 1)
    train(steps(2, per_step=2), problem((9, 300, 17)), "SGD", backend="triton", filter_eps=filter_eps)
    assert not moves


@pytest.mark.parametrize("optimizer", [HeadSGD, HeadAdamW])
def test_a_step_is_one_launch_and_makes_nothing_of_the_size_of_the_weight(optimizer):
    launched, sizes = [], []

    def allocated(buffer):
        sizes.append(buffer.numel())
        return buffer

    forget_kinds()
    head = SFaceLoss(64, 200_000, backend="triton", filter_eps=FAST)
    moved = optimizer(head)
    x, y = torch.zeros(8, 64, requires_grad=True), torch.zeros(8, dtype=torch.int64)
    with device.pretend((9, 0), run=lambda kernel, *_: launched.append(kernel.fn.__name__), allocated=allocated):
        head(x, y).backward()
        launched.clear()
        sizes.clear()
        moved.step()
    assert launched == ["scatter_classes"] and not sizes
