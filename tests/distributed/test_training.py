"""Whole training steps on several processes against one process with the concatenated batch."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sface_kernels.distributed import clip_grad_norm_
from tests.distributed.batches import cuts, make_head, single
from tests.support.cases import f32, f64
from tests.support.problems import trained_problem

ROWS, CLASSES, FEATURES = 24, 13, 8
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def make_backbone(dtype=f64):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, FEATURES)).to(dtype)


def data(step, rows=ROWS, dtype=f64):
    g = torch.Generator().manual_seed(100 + step)
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    labels[::7] = -100
    return torch.randn(rows, 12, generator=g).to(dtype), labels


def bounds(kind, rows=ROWS):
    edges = cuts(rows, dist.get_world_size(), kind)
    return slice(edges[dist.get_rank()], edges[dist.get_rank() + 1])


def plain_parameters(backbone):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in backbone.parameters()]


def train(wrap, optimizer, kind, accumulate, max_norm, steps=4):
    """Losses and parameters of a group's training, beside those of one process."""
    w = trained_problem(ROWS, CLASSES, FEATURES).w.double()
    whole_backbone, whole_head = make_backbone(), single(w)
    whole_optimizer = OPTIMIZERS[optimizer]([*whole_backbone.parameters(), *whole_head.parameters()])
    backbone, head = make_backbone(), make_head(w)
    backbone = DistributedDataParallel(backbone) if wrap == "DDP" else fully_shard(backbone)
    our_optimizers = [OPTIMIZERS[optimizer]([{"params": m.parameters()}]) for m in (backbone, head)]

    for step in range(steps):
        for part in range(accumulate):
            x, labels = data(step * accumulate + part)
            (whole_head(whole_backbone(x), labels) / accumulate).backward()
            last = part == accumulate - 1
            later = backbone.no_sync() if wrap == "DDP" and not last else contextlib.nullcontext()
            mine = bounds(kind)
            with later:
                loss = head(backbone(x[mine]), labels[mine]) / accumulate
                loss.backward()
        parameters = [*whole_backbone.parameters(), *whole_head.parameters()]
        ours = [*backbone.parameters(), *head.parameters()]
        if max_norm is not None:
            theirs = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
            torch.testing.assert_close(clip_grad_norm_(ours, max_norm), theirs)
            assert float(theirs) > max_norm, "nothing was clipped"
        for a, b in zip(plain_parameters(backbone), whole_backbone.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        whole_optimizer.step()
        whole_optimizer.zero_grad()
        for each in our_optimizers:
            each.step()
            each.zero_grad()
    for a, b in zip(plain_parameters(backbone), whole_backbone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head.full_weight(), whole_head.weight, rtol=1e-9, atol=1e-11)
    assert float((head.full_weight() - w).norm()) > 1e-2, "the weight did not move"


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_ddp(pool, processes, optimizer):
    pool.run(processes, train, "DDP", optimizer, "uneven", 1, None)
    pool.run(processes, train, "DDP", optimizer, "even", 1, None)


def test_gradient_accumulation(pool):
    pool.run(2, train, "DDP", "SGD", "uneven", 3, None)


def test_clipping_of_backbone_and_head_together(pool):
    pool.run(3, train, "DDP", "SGD", "uneven", 1, 0.5)
    pool.run(2, train, "FSDP2", "SGD", "even", 1, 0.5)


def clipped_by_any_norm(norm_type):
    """The last of three processes holds no class."""
    w = trained_problem(ROWS, 2, FEATURES).w.double()
    backbone, head, reference, whole = make_backbone(), make_head(w), make_backbone(), single(w)
    x, labels = data(0)
    labels, mine = labels % 2, bounds("uneven")
    averaged = DistributedDataParallel(backbone)
    head(averaged(x[mine]), labels[mine]).backward()
    whole(reference(x), labels).backward()
    parts = [*backbone.parameters(), *head.parameters()], [*reference.parameters(), *whole.parameters()]
    theirs = torch.nn.utils.clip_grad_norm_(parts[1], 0.01, norm_type)
    torch.testing.assert_close(clip_grad_norm_(parts[0], 0.01, norm_type), theirs)
    assert float(theirs) > 0.01, "nothing was clipped"
    torch.testing.assert_close(head.weight.grad.full_tensor(), whole.weight.grad)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
def test_clipping_beside_a_process_without_classes(pool, norm_type):
    pool.run(3, clipped_by_any_norm, norm_type)


def a_tensor_alone():
    """As PyTorch's takes one: its rows would be parameters without a gradient."""
    problem = trained_problem(ROWS, CLASSES, FEATURES)
    head, plain = make_head(problem.w), single(problem.w)
    for each in (head, plain):
        each(problem.x, problem.labels).backward()
    theirs = torch.nn.utils.clip_grad_norm_(plain.weight, 0.5)
    assert float(theirs) > 0.5, "nothing was clipped"
    torch.testing.assert_close(clip_grad_norm_(head.weight, 0.5), theirs)
    torch.testing.assert_close(head.weight.grad.full_tensor(), plain.weight.grad)
    torch.testing.assert_close(clip_grad_norm_(plain.weight, 0.1), torch.tensor(0.5))


def test_clipping_of_a_tensor_alone(pool):
    pool.run(2, a_tensor_alone)


def test_with_fsdp2(pool):
    for optimizer in OPTIMIZERS:
        pool.run(2, train, "FSDP2", optimizer, "uneven", 1, None)


class Net(nn.Module):
    """Backbone and head in one module, as Lightning and many loops have it."""

    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = make_backbone(), head

    def forward(self, x, labels):
        return self.head(self.backbone(x), labels)


def left_out_of(wrapper):
    """A wrapper around the whole module has to leave the head's weight out, and can."""
    w = trained_problem(ROWS, CLASSES, FEATURES).w.double()
    net, backbone, head = Net(make_head(w)), make_backbone(), single(w)
    if wrapper == "DDP":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["head.weight"])
        wrapped: Any = DistributedDataParallel(net)
    else:
        wrapped = fully_shard(net, ignored_params=set(net.head.parameters()))
    x, labels = data(0)
    mine = bounds("uneven")
    wrapped(x[mine], labels[mine]).backward()
    head(backbone(x), labels).backward()
    torch.testing.assert_close(net.head.weight.grad.full_tensor(), head.weight.grad)
    for ours, theirs in zip(net.backbone.parameters(), backbone.parameters(), strict=True):
        grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(grad, theirs.grad)


def test_head_inside_of_a_wrapped_module(pool):
    for wrapper in ("DDP", "FSDP2"):
        pool.run(2, left_out_of, wrapper)


def overflow_in_one_shard():
    """The scaler must skip the head's step on every process, and lower its scale on all, if one shard's ∂w overflows."""
    w = trained_problem(ROWS, CLASSES, FEATURES).w
    backbone, head = DistributedDataParallel(make_backbone(f32)), make_head(w)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (backbone, head)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    reference, whole = make_backbone(f32), single(w)
    plain = torch.optim.SGD([*reference.parameters(), *whole.parameters()], lr=0.05)
    for step in range(3):
        x, labels = data(step, dtype=f32)
        mine = bounds("uneven")
        scaler.scale(head(backbone(x[mine]), labels[mine])).backward()
        overflows = step == 1
        if overflows and dist.get_rank() == dist.get_world_size() - 1:
            head.weight.grad.to_local()[0, 0] = torch.inf
        before = head.full_weight()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        assert torch.equal(before, head.full_weight()) == overflows
        assert scaler.get_scale() == (128.0 if step >= 1 else 256.0)
        loss = whole(reference(x), labels)
        loss.backward()
        if overflows:
            whole.weight.grad = None  # the head alone is skipped
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(head.full_weight(), whole.weight, rtol=1e-4, atol=1e-5)


def overflow_in_the_embeddings():
    """One process's embeddings overflow: the loss is not finite anywhere, and everybody skips everything."""
    w = trained_problem(ROWS, CLASSES, FEATURES).w
    backbone, head = DistributedDataParallel(make_backbone(f32)), make_head(w)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (backbone, head)]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x, labels = data(0, dtype=f32)
    mine = bounds("even")
    x, labels = x[mine].clone(), labels[mine]
    if dist.get_rank() == 1:
        x[1] = torch.inf
        labels[1] = 0
    before = [p.detach().clone() for p in backbone.parameters()], head.full_weight()
    loss = head(backbone(x), labels)
    assert not loss.isfinite()
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0
    assert all(torch.equal(a, b) for a, b in zip(before[0], backbone.parameters(), strict=True))
    assert torch.equal(before[1], head.full_weight())


def test_overflow_is_everybodys(pool):
    for processes in (2, 4):
        pool.run(processes, overflow_in_one_shard)
        pool.run(processes, overflow_in_the_embeddings)
