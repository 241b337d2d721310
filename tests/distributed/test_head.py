"""`ClassParallelSFaceLoss` on 1 to 4 processes against `SFaceLoss` on the concatenated batch."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from sface_kernels import SFaceLoss
from sface_kernels.distributed import ClassParallelSFaceLoss, collectives
from sface_kernels.distributed.layout import class_range, fill_normal
from sface_kernels.optim import HeadSGD
from tests.distributed.batches import OPTIONS, assert_near, make_head, one_process, single, split
from tests.support.cases import bf16, f16, f32, f64

PROCESSES = (1, 2, 3, 4)
# C = 101 is cut unevenly by 2, 3 and 4; 5 leaves the fourth process without classes; 1 all but the first
CLASSES = (101, 5, 1)


def compare(kind, classes, dtype, backend, reduction, geometry):
    batch = split(kind, (23, classes, 16), dtype, geometry)
    options = dict(backend=backend, reduction=reduction)
    theirs, exact = one_process(batch, **options), one_process(batch, f64, **{**options, "backend": "reference"})
    head = make_head(batch.w, **options)
    x = batch.x[batch.mine].clone().requires_grad_()
    loss, stats = head(x, batch.labels[batch.mine], return_stats=True)
    loss.backward()
    alone = head(x, batch.labels[batch.mine])

    grad_w = head.weight.grad
    assert isinstance(grad_w, DTensor) and grad_w.placements == head.weight.placements
    assert torch.equal(alone, loss) and loss.dim() == 0 and loss.dtype == dtype
    assert_near("loss", loss.detach(), theirs.loss, exact.loss)
    processes = dist.get_world_size()
    mine = [t[batch.mine] for t in (theirs.grad_x, exact.grad_x)]
    assert x.grad.shape == x.shape and x.grad.dtype == dtype
    assert_near("grad_x", x.grad / processes, *mine)
    assert_near("grad_w", grad_w.full_tensor(), theirs.grad_w, exact.grad_w)
    for name in ("intra", "inter", "cos_target", "cos_other", "dropped"):
        assert_near(name, getattr(stats, name), getattr(theirs.stats, name), getattr(exact.stats, name))
    assert float(stats.accuracy) == float(theirs.stats.accuracy)
    assert int(stats.active_pairs) == int(theirs.stats.active_pairs)
    return float(loss.detach()), float(stats.accuracy)


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("kind", ["even", "uneven", "nothing"])
def test_in_fp64(pool, processes, classes, kind):
    for reduction in ("mean", "sum"):
        for backend in ("reference", "chunked"):
            results = pool.run(processes, compare, kind, classes, f64, backend, reduction, "trained")
            assert len(set(results)) == 1, "processes returned different losses"


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("geometry", ["trained", "random", "collapsed"])
def test_in_fp32(pool, processes, geometry, native):
    for classes in CLASSES:
        results = pool.run(processes, compare, "uneven", classes, f32, "native", "mean", geometry)
        assert len(set(results)) == 1, "processes returned different losses"


def half_inputs(dtype, autocast):
    batch = split("uneven", (23, 101, 32), f32)
    batch = batch._replace(x=batch.x.to(dtype))
    options = dict(backend="auto", filter_eps=2.0**-12)
    head, single = make_head(batch.w, **options), SFaceLoss(32, 101, **{**OPTIONS, **options})
    single.load_state_dict({"weight": batch.w})
    mine, whole = batch.x[batch.mine].clone().requires_grad_(), batch.x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours, theirs = head(mine, batch.labels[batch.mine]), single(whole, batch.labels)
    (ours * 1024).backward()
    (theirs * 1024).backward()
    assert ours.dtype == f32 and mine.grad.dtype == dtype and head.weight.grad.dtype == f32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    processes = dist.get_world_size()
    expected = whole.grad[batch.mine].float() * processes
    # parts are summed in float32, and their sum is rounded to half: each side of the comparison was, once
    rounding = torch.finfo(dtype).eps * expected.norm(dim=1)
    assert ((mine.grad.float() - expected).norm(dim=1) <= rounding + 1e-12).all()
    torch.testing.assert_close(head.weight.grad.full_tensor(), single.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_half_embeddings(pool, dtype):
    for autocast in (False, True):
        pool.run(3, half_inputs, dtype, autocast)


def by_reduce_scatter(dtype):
    with mock.patch.object(collectives, "SCATTERS_A_COPY", set()):
        compare("uneven", 101, dtype, "chunked", "mean", "trained")


def test_reduce_scatter(pool):
    """What NCCL is given in the place of gloo's all-reduce."""
    for dtype in (f32, f64):
        pool.run(3, by_reduce_scatter, dtype)


def away_from_every_centre():
    """Cosines that are all negative: a process without a row's class must not offer 0 for it."""
    w = torch.randn(7, 16, dtype=f64) * 0.1 + 1
    labels = torch.arange(7)
    x = -w.roll(1, 0) * torch.linspace(1, 2, 16, dtype=f64)
    _, theirs = single(w)(x, labels, return_stats=True)
    _, ours = make_head(w)(*((x, labels) if dist.get_rank() == 0 else (x[:0], labels[:0])), return_stats=True)
    assert 0 < float(theirs.accuracy) < 1 and float(theirs.cos_target) < -0.5
    assert float(ours.accuracy) == float(theirs.accuracy)


def test_accuracy_of_negative_cosines(pool):
    pool.run(3, away_from_every_centre)


def same_rows(size, rank):
    parts = [range(first, first + count) for first, count in (class_range(size, 4, r) for r in range(4))]
    assert [c for part in parts for c in part] == list(range(size))
    return len(parts[rank])


def initial(seeds_differ, classes, features):
    torch.manual_seed(5 + seeds_differ * dist.get_rank())
    head = ClassParallelSFaceLoss(features, classes)
    assert len(head.weight.to_local()) == head.class_range[1]
    if dist.get_world_size() == 4:
        assert head.class_range[1] == same_rows(classes, dist.get_rank())
    torch.randn(1)
    return head.full_weight()


def test_initial_weight(pool):
    """N(0, 2·√(2/C)) with the C of all; no row twice; the same whatever the number of processes and their own seeds."""
    classes, features = 10_007, 8
    whole, *others = (pool.run(p, initial, p == 3, classes, features) for p in PROCESSES)
    for results in others:
        assert all(torch.equal(result, whole[0]) for result in results)
    std = 2 * math.sqrt(2 / classes)
    assert abs(float(whole[0].double().std()) / std - 1) < 5 / (2 * whole[0].numel()) ** 0.5
    assert len(whole[0].unique(dim=0)) == classes


def test_initial_rows_whatever_the_default_dtype():
    drawn = []
    for dtype in (f32, f64):
        torch.set_default_dtype(dtype)
        try:
            drawn.append(torch.empty(3, 4, dtype=f64))
            fill_normal(drawn[-1], 4095, 1.0, 7)
        finally:
            torch.set_default_dtype(f32)
    assert torch.equal(*drawn)


def initial_with(std):
    head = ClassParallelSFaceLoss(8, 1001, init_std=std)
    head.add_classes(1000)
    return head.full_weight()


def disagreeing():
    with pytest.raises(ValueError, match=r"init_std: expected the same on every process, got None on rank 0"):
        ClassParallelSFaceLoss(8, 100, init_std=0.5 if dist.get_rank() else None)


def test_initial_weight_that_does_not_depend_on_the_number_of_classes(pool):
    for weight in pool.run(2, initial_with, 0.25):
        for rows in (weight[:1001], weight[1001:]):
            assert float(rows.double().std()) == pytest.approx(0.25, rel=5 / (2 * rows.numel()) ** 0.5)
    pool.run(2, disagreeing)


def requires_grad(embeddings_everywhere, weight):
    """Every subset of gradients, with a rank whose embeddings ask for none while the others' do."""
    batch = split("uneven", (23, 5, 16), f64)
    theirs, head = one_process(batch), make_head(batch.w)
    head.weight.requires_grad_(weight)
    x = batch.x[batch.mine].clone().requires_grad_(embeddings_everywhere or dist.get_rank() == 0)
    head(x, batch.labels[batch.mine]).backward()
    if x.requires_grad:
        torch.testing.assert_close(x.grad, theirs.grad_x[batch.mine] * dist.get_world_size())
    if weight:
        torch.testing.assert_close(head.weight.grad.full_tensor(), theirs.grad_w)
    else:
        assert head.weight.grad is None


def frozen_backbone():
    batch = split("uneven", (23, 5, 16), f64)
    theirs, head = one_process(batch), make_head(batch.w)
    head(batch.x[batch.mine], batch.labels[batch.mine]).backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), theirs.grad_w)
    with torch.no_grad():
        loss = head(batch.x[batch.mine], batch.labels[batch.mine])
    torch.testing.assert_close(loss, theirs.loss)
    assert not loss.requires_grad


def test_subsets_of_gradients(pool):
    for embeddings_everywhere in (True, False):
        for weight in (True, False):
            pool.run(4, requires_grad, embeddings_everywhere, weight)
    pool.run(4, frozen_backbone)


def upstream_gradient_that_is_not_finite():
    """Ignored rows keep a gradient of 0, as those of `SFaceLoss` do."""
    batch = split("uneven", (23, 9, 16), f64)
    head, x = make_head(batch.w), batch.x[batch.mine].clone().requires_grad_()
    whole, whole_x = single(batch.w), batch.x.clone().requires_grad_()
    (head(x, batch.labels[batch.mine]) * torch.inf).backward()
    (whole(whole_x, batch.labels) * torch.inf).backward()
    assert torch.equal(x.grad.isnan(), whole_x.grad.isnan()[batch.mine])
    assert not x.grad[batch.labels[batch.mine] == -100].any()


def test_ignored_rows_beside_an_infinite_gradient(pool):
    pool.run(3, upstream_gradient_that_is_not_finite)


def one_process_without_gradients():
    """What it sends is what the others expect."""
    batch = split("even", (24, 9, 16), f64)
    theirs, head = one_process(batch), make_head(batch.w)
    for _ in range(2):
        x = batch.x[batch.mine].clone().requires_grad_()
        with torch.set_grad_enabled(dist.get_rank() == 0):
            loss = head(x, batch.labels[batch.mine])
        torch.testing.assert_close(loss, theirs.loss)
        if loss.requires_grad:
            loss.backward()
            torch.testing.assert_close(x.grad, theirs.grad_x[batch.mine] * dist.get_world_size())
    assert loss.requires_grad == (dist.get_rank() == 0)


def test_one_process_without_gradients(pool):
    pool.run(2, one_process_without_gradients)


def backward_again():
    batch = split("even", (24, 9, 16), f64)
    head, x = make_head(batch.w), batch.x[batch.mine].clone().requires_grad_()
    loss = head(x, batch.labels[batch.mine])
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x, retain_graph=True)[0])
    for of in (x, head.weight):
        (grad,) = torch.autograd.grad(loss, of, create_graph=True)
        grad = grad.to_local() if isinstance(grad, DTensor) else grad
        with pytest.raises(RuntimeError, match=r"differentiable once|once_differentiable"):
            grad.sum().backward()


def test_backward_twice_and_of_itself(pool):
    pool.run(2, backward_again)


def fixed_batches():
    batch = split("even", (24, 9, 16), f64)
    head, (x, labels) = make_head(batch.w, uneven_batches=False), (batch.x[batch.mine], batch.labels[batch.mine])
    theirs = one_process(batch)
    for _ in range(2):
        torch.testing.assert_close(head(x, labels), theirs.loss)
    with pytest.raises(ValueError, match=r"expected 12 rows as in the first batch .*got 11"):
        head(x[1:], labels[1:])
    with pytest.raises(ValueError, match=r"rows of embeddings with uneven_batches=False: .*got 12 on rank 0 and 11"):
        rank, other = dist.get_rank(), make_head(batch.w, uneven_batches=False)
        other(x[rank:], labels[rank:])
    torch.testing.assert_close(other(x, labels), theirs.loss)  # the first batch is the first that all agree on


def test_batches_of_fixed_size(pool):
    pool.run(2, fixed_batches)


def along_one_dimension():
    """The head over one dimension of a 2×2 mesh: two heads of two processes each, with batches of their own.

    It is the first dimension, ranks {0, 2} and {1, 3}: DTensor's caches would take a mesh of ranks {0, 1} for the one
    that an earlier test had in these processes, whose group is gone.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("classes", "replica"))
    replica, rank = mesh.get_local_rank("replica"), mesh.get_local_rank("classes")
    batch = split("even", (24, 9, 16), f64, seed=replica)
    head = make_head(batch.w, mesh=mesh["classes"])
    half = slice(12 * rank, 12 * rank + 12)
    torch.testing.assert_close(head(batch.x[half], batch.labels[half]), one_process(batch).loss)
    with pytest.raises(ValueError, match="mesh: expected one dimension"):
        make_head(batch.w, mesh=mesh)
    group = mesh["classes"].get_group()
    by_group = make_head(batch.w, process_group=group)
    torch.testing.assert_close(by_group(batch.x[half], batch.labels[half]), one_process(batch).loss)
    with pytest.raises(ValueError, match="mesh, process_group: expected one of them"):
        make_head(batch.w, mesh=mesh["classes"], process_group=group)


def test_mesh_and_group(pool):
    pool.run(4, along_one_dimension)


def heads_of_two_groups():
    """Two heads of two processes each, {0, 2} and {1, 3}, with batches of their own: nothing crosses over."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("classes", "replica"))
    replica, rank = mesh.get_local_rank("replica"), mesh.get_local_rank("classes")
    batch = split("even", (24, 9, 16), f64, seed=replica)
    half, theirs = slice(12 * rank, 12 * rank + 12), one_process(batch)
    head = make_head(batch.w, mesh=mesh["classes"])
    x = batch.x[half].clone().requires_grad_()
    loss, stats = head(x, batch.labels[half], return_stats=True)
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * theirs.grad_x[half])
    torch.testing.assert_close(head.weight.grad.full_tensor(), theirs.grad_w)
    for name in ("intra", "inter", "cos_target", "accuracy"):
        torch.testing.assert_close(getattr(stats, name), getattr(theirs.stats, name))

    torch.manual_seed(replica)
    weights = [torch.empty(0)] * 4
    dist.all_gather_object(weights, ClassParallelSFaceLoss(16, 9, mesh=mesh["classes"]).full_weight())
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[3])
    assert not torch.equal(weights[0], weights[1])

    head.weight.grad = None
    optimizer = HeadSGD(head, lr=0.05)
    head(x.detach(), batch.labels[half]).backward()
    torch.testing.assert_close(optimizer.grad_norm(), theirs.grad_w.norm())
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = scaler.scale(head(x.detach(), batch.labels[half]))
    (loss * torch.inf if replica else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (2.0 if replica else 4.0)
    assert torch.equal(head.full_weight(), batch.w) == bool(replica)


def test_two_groups(pool):
    pool.run(4, heads_of_two_groups)


def state_and_names():
    batch = split("even", (24, 5, 16), f64)
    head = make_head(batch.w)
    assert [name for name, _ in head.named_parameters()] == ["weight"] and list(head.state_dict()) == ["weight"]
    assert torch.equal(head.full_weight(), batch.w)
    head.full_weight().zero_()
    assert torch.equal(head.full_weight(), batch.w), "full_weight gave away the weight itself"
    other = make_head(torch.zeros_like(batch.w))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.full_weight(), batch.w)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        head.load_state_dict({"weight": batch.w[:4]})
    meta = ClassParallelSFaceLoss(16, 5, device="meta")
    assert meta.weight.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert float(meta.full_weight().std()) > 0
    assert "num_classes=5" in repr(head) and f"processes={dist.get_world_size()}" in repr(head)
    assert not any(word in str(ClassParallelSFaceLoss).lower() for word in ("model", "container", "batchnorm"))


def test_state_and_names(pool):
    for processes in (1, 4):
        pool.run(processes, state_and_names)
