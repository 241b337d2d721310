"""`HeadSGD` and `HeadAdamW` on a sharded weight: the training of one process on the whole batch by torch.optim."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from sface_kernels import SFaceLoss
from sface_kernels.distributed import ClassParallelSFaceLoss, clip_grad_norm_
from sface_kernels.optim import HeadAdamW, HeadSGD
from tests.distributed.batches import make_head, single
from tests.support.problems import trained_problem

ROWS, FEATURES = 24, 8
RULES = {
    "SGD": (HeadSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "AdamW": (HeadAdamW, torch.optim.AdamW, dict(lr=0.01)),
}
MAX_NORM = 0.3


def batch(step, classes):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(ROWS, FEATURES, generator=g), torch.randint(0, classes, (ROWS,), generator=g)


def mine():
    rank, size = dist.get_rank(), dist.get_world_size()
    return slice(rank * ROWS // size, (rank + 1) * ROWS // size)


def train(rule, backend, classes, steps=4):
    """A group's head by ours against one head in each process by torch.optim, in float64 where the backend takes it."""
    ours, theirs, options = RULES[rule]
    w = trained_problem(ROWS, classes, FEATURES).w
    w = w if backend == "native" else w.double()
    head, whole = make_head(w, backend=backend), single(w, backend=backend)
    optimizer = ours(head, **options, max_norm=MAX_NORM)
    reference = theirs(whole.parameters(), **options)
    for step in range(steps):
        for part in range(2):
            x, labels = batch(2 * step + part, classes)
            x = x.to(w.dtype)
            local = x[mine()].clone().requires_grad_()
            head(local, labels[mine()]).backward()
            x.requires_grad_()
            whole(x, labels).backward()
            torch.testing.assert_close(local.grad, dist.get_world_size() * x.grad[mine()])
        assert head.weight.grad is None
        norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), MAX_NORM)
        assert norm > MAX_NORM
        torch.testing.assert_close(optimizer.grad_norm(), norm)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    torch.testing.assert_close(head.full_weight(), whole.weight.detach())
    assert not torch.equal(whole.weight, w)
    for name, value in reference.state[whole.weight].items():
        kept = optimizer.state[head.weight][name]
        assert isinstance(kept, DTensor) == (value.dim() > 0)
        torch.testing.assert_close(kept.full_tensor() if isinstance(kept, DTensor) else kept, value)


@pytest.mark.parametrize("classes", [13, 1], ids=["uneven", "a process without classes"])
@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("rule", RULES)
def test_two_processes(pool, rule, backend, classes):
    pool.run(2, train, rule, backend, classes)


def changes(folder):
    """More classes, a checkpoint that torch.optim goes on from, sampling, and what is refused."""
    w = trained_problem(ROWS, 13, FEATURES).w.double()
    head = make_head(w)
    optimizer = HeadSGD(head, lr=0.05, momentum=0.9)

    def step(head, optimizer, number, classes):
        x, labels = batch(number, classes)
        head(x[mine()].double(), labels[mine()]).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(head, optimizer, 0, 13)
    head.add_classes(6, optimizer)
    step(head, optimizer, 1, 19)
    weights, states = get_state_dict(head, optimizer)
    dcp.save({"head": weights, "optimizer": states}, checkpoint_id=folder)
    other = ClassParallelSFaceLoss(FEATURES, 19, dtype=torch.float64, s=30.0, k=60.0, a=0.9, b=1.1, filter_eps=0.0)
    plain = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    weights, states = get_state_dict(other, plain)
    dcp.load({"head": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(other, plain, model_state_dict=weights, optim_state_dict=states)
    for number in (2, 3):
        step(head, optimizer, number, 19)
        step(other, plain, number, 19)
    torch.testing.assert_close(head.full_weight(), other.full_weight())

    before = head.full_weight()
    head.sample_rate = 0.5  # its gradient is that of copied rows, and comes as .grad
    x, labels = batch(4, 19)
    head(x[mine()].double(), labels[mine()]).backward()
    assert isinstance(head.weight.grad, DTensor)
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(head.full_weight(), before)

    head.sample_rate = 1.0
    head(x[mine()].double(), labels[mine()]).backward()
    with pytest.raises(RuntimeError, match="gradient waits"):
        clip_grad_norm_(head.parameters(), 1.0)
    before = head.full_weight()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))  # makes its scale
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(head.full_weight(), before)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        HeadSGD(SFaceLoss(4, 5))
    assert any("an SFaceLoss in 2 processes" in str(one.message) for one in said)


def overflow():
    """In one process's rows: all of them skip the step, and their scales stay the same."""
    head = make_head(trained_problem(ROWS, 13, FEATURES).w)
    optimizer = HeadSGD(head, lr=0.05, max_norm=1.0)
    if dist.get_rank() == 0:
        head.weight.to_local().detach()[0] *= 1e-9
    before = head.full_weight()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    x, labels = batch(0, 13)
    scaler.scale(head(x[mine()], labels[mine()])).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(head.full_weight(), before) and scaler.get_scale() == 2.0**119


def scaled(rule, classes):
    """GradScaler's question for infinities is one of all processes, also of those that hold no classes."""
    ours, theirs, options = RULES[rule]
    w = trained_problem(ROWS, classes, FEATURES).w
    head, whole = make_head(w), single(w)
    optimizers = ours(head, **options), theirs(whole.parameters(), **options)
    scalers = [torch.amp.GradScaler("cpu", init_scale=8.0) for _ in optimizers]
    for number in range(3):
        x, labels = batch(number, classes)
        losses = head(x[mine()], labels[mine()]), whole(x, labels)
        for scaler, loss, optimizer in zip(scalers, losses, optimizers, strict=True):
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    torch.testing.assert_close(head.full_weight(), whole.weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_loss_scaling_with_a_process_without_classes(pool, rule):
    pool.run(2, scaled, rule, 1)


def one_backward_alone():
    """A process without a gradient takes part in the norm all the same."""
    head = make_head(trained_problem(ROWS, 13, FEATURES).w)
    optimizer = HeadSGD(head, lr=0.05, max_norm=1.0)
    x, labels = batch(0, 13)
    loss, before = head(x[mine()], labels[mine()]), head.full_weight()
    if dist.get_rank() == 0:
        loss.backward()
    optimizer.step()
    moved = (head.full_weight() != before).any(1)
    assert moved[:7].all() and not moved[7:].any()


def test_a_backward_alone(pool):
    pool.run(2, one_backward_alone)


def writes(backend):
    """To a weight whose gradient waits, or whose graph is still to be differentiated."""
    head = make_head(trained_problem(ROWS, 13, FEATURES).w, backend=backend)
    optimizer = HeadSGD(head, lr=0.05)
    x, labels = batch(0, 13)

    def by_operation():
        head.weight.mul_(2)

    def to_the_rows():
        head.weight.to_local().mul_(2)

    for write in (by_operation, to_the_rows):
        head(x[mine()], labels[mine()]).backward()
        with torch.no_grad():
            write()
        with pytest.raises(RuntimeError, match=r"weight: modified by an in-place operation between backward\(\) and"):
            optimizer.step()
        optimizer.zero_grad()
    first, second = (head(x[mine()], labels[mine()]) for _ in range(2))
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_writes_to_the_weight_in_between(pool, backend):
    pool.run(2, writes, backend)


def surroundings():
    """Another dtype, a compiled forward, a gradient that another loss left replicated, and one process's state."""
    w = trained_problem(ROWS, 13, FEATURES).w
    head, whole = make_head(w), single(w)
    optimizer = HeadSGD(head, lr=0.05, momentum=0.9)
    head.double()
    whole.double()
    reference = torch.optim.SGD(whole.parameters(), lr=0.05, momentum=0.9)
    forward = torch.compile(head, backend="eager")
    for number in range(3):
        x, labels = batch(number, 13)
        x = x.double()
        third = head.weight[3].sum()
        assert isinstance(third, DTensor)
        (forward(x[mine()], labels[mine()]) + third.full_tensor()).backward()
        assert isinstance(head.weight.grad, DTensor) and head.weight.grad.placements[0].is_replicate()
        (whole(x, labels) + whole.weight[3].sum()).backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    torch.testing.assert_close(head.full_weight(), whole.weight.detach())

    optimizer.load_state_dict(reference.state_dict())
    head(x[mine()], labels[mine()]).backward()
    with pytest.raises(ValueError, match=r"state_dict: expected momentum_buffer \[[76], 8\], .* got \[13, 8\]"):
        optimizer.step()


def test_surroundings(pool):
    pool.run(2, surroundings)


def test_an_overflow_in_one_process(pool):
    pool.run(2, overflow)


def test_changes(pool, tmp_path):
    pool.run(2, changes, str(tmp_path / "checkpoint"))
