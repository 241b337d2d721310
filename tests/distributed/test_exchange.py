"""What a step exchanges, in which order, and what goes on in the meantime: the record of every process, no clock."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from sface_kernels.compat.partial_fc import PartialFCSFace
from sface_kernels.dispatch import BACKENDS
from sface_kernels.distributed import ClassParallelSFaceLoss, parallel, sampling
from tests.distributed.recording import recording

C, D = 40, 16
HEADS = {
    "head": lambda **options: ClassParallelSFaceLoss(D, C, backend="reference", **options),
    "partial_fc": lambda **options: PartialFCSFace(D, C, backend="reference", **options),
}


def step(name, options, stats=False):
    """The second step of a head, as events with the collectives numbered."""
    head = HEADS[name](**options)
    x, labels = torch.randn(6, D, requires_grad=True), torch.arange(6) * 7  # classes of both processes
    asked = {"return_stats": True} if stats else {}
    head(x, labels, **asked)
    with recording() as record:
        grad_weight = record.note(BACKENDS["reference"].grad_weight, "∂w")
        with (
            mock.patch.object(parallel, "prepare_labels", record.note(parallel.prepare_labels, "targets")),
            mock.patch.object(sampling, "take_classes", record.note(sampling.take_classes, "sampled rows")),
            mock.patch.object(parallel, "shard_rows", record.note(parallel.shard_rows, "the shard's pass")),
            mock.patch.object(parallel, "sampled_rows", record.note(parallel.sampled_rows, "the shard's pass")),
            mock.patch.dict(BACKENDS, reference=BACKENDS["reference"]._replace(grad_weight=grad_weight)),
        ):
            result = head(x, labels, **asked)
            loss = result[0] if stats else result
            record.events.append("the forward ends")
            loss.backward()
    assert x.grad is not None and head.weight.grad is not None
    return record.events


SIZES = ["targets", "start gather 0", "wait gather 0"]  # the labels are checked before the numbers of rows go out


def from_labels_on(first, sampled=False):
    labels, rows, loss, grad_x = range(first, first + 4)
    return [
        f"start gather {labels}",
        f"start gather {rows}",
        f"wait gather {labels}",
        "targets",
        *(["sampled rows"] if sampled else []),
        f"wait gather {rows}",
        "the shard's pass",
        f"start reduce {loss}",
        f"start sum and scatter {grad_x}",
        f"wait reduce {loss}",
        "the forward ends",
        *["∂w"] * (1 + sampled),
        f"wait sum and scatter {grad_x}",
    ]


@pytest.mark.parametrize("name", HEADS)
def test_order(pool, name):
    """Embeddings travel while labels become targets, and sampled rows are copied; ∂x while the loss is summed and ∂w is
    computed. Only the value of the loss waits for its sum, and the backward starts no exchange."""
    for events in pool.run(2, step, name, {}):
        assert events == SIZES + from_labels_on(1)
    for events in pool.run(2, step, name, {"sample_rate": 0.5}):
        assert events == SIZES + from_labels_on(1, sampled=True)


def test_order_of_fixed_batches(pool):
    for events in pool.run(2, step, "head", {"uneven_batches": False}):
        assert events == from_labels_on(0)


def test_order_with_statistics(pool):
    """They travel with the loss, in one message; the accuracy takes a maximum, and so another one."""
    for events in pool.run(2, step, "head", {}, True):
        start = events.index("the shard's pass")
        assert events[start + 1 : events.index("the forward ends")] == [
            "start reduce 3",
            "start reduce 4",
            "start sum and scatter 5",
            "wait reduce 3",
            "wait reduce 4",
        ]
        assert events[-2:] == ["∂w", "wait sum and scatter 5"]


def without_gradients():
    head, x = HEADS["head"](), torch.randn(6, D)
    with recording() as record, torch.no_grad():
        head(x.requires_grad_(), torch.arange(6))
    with recording() as frozen:
        head(x.detach(), torch.arange(6)).backward()
    for each in (record, frozen):
        assert [e.name for e in each.exchanges] == ["gather"] * 3 + ["reduce"]


def test_nothing_is_sent_for_gradients_that_nobody_wants(pool):
    pool.run(2, without_gradients)


def one_backward_alone():
    """A process that skips its backward keeps nobody waiting, and the next step is in step again."""
    head, x = HEADS["head"](), torch.randn(6, D, requires_grad=True)
    first = head(x, torch.arange(6))
    if dist.get_rank() == 0:
        first.backward()
    head(x, torch.arange(6)).backward()


def test_a_backward_alone(pool):
    pool.run(2, one_backward_alone)
