"""The two ways of a call, by lists and by dense products: both right, in one call, one after the other, and in what the
forward of a mean leaves. As `test_triton.py`, on a GPU, in Triton's interpreter or as compiled PTX.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import sface_loss, validation
from sface_kernels.backends import triton as backend
from sface_kernels.backends.triton import buffers, device, plan, tiles
from sface_kernels.types import HyperParameters
from tests.support.cases import bf16, f16, f32
from tests.support.checks import Judge, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES
from tests.triton.conftest import forget_kinds
from tests.triton.test_triton import CASE, DEVICE, FAST, SMALL, pytestmark  # noqa: F401


# Room for so many times the active pairs, of which int8 takes twice as many for candidates at so few features. Without
# any nearly every sample overflows, with nearly enough those that come last in the last tile.
@pytest.mark.parametrize("stripes, room", [(1, 0), (3, 0.5), (1, 0.95), (5, 4)])
@pytest.mark.parametrize("geometry", ["random", "trained"])
def test_overflow(poisoned, screen, lists, geometry, stripes, room):
    """A sample whose candidates find no room goes the dense way, the others by lists, in one call and one ∂w."""
    problem = GEOMETRIES[geometry](21, 300, 32)
    expected = run(CASE, problem, filter_eps=FAST).stats
    together = tiles.tile("screen", device.gpu_of(torch.device(DEVICE)).family, "half").block_n
    lists(stripes, max(1, int(room * int(expected.active_pairs) / (stripes * together))))
    result = run(CASE, problem, filter_eps=FAST)
    Judge(problem, filter_eps=FAST).check(result, "triton")
    assert int(result.stats.active_pairs) == int(expected.active_pairs) > 21 * 2
    dense = round(21 * float(result.stats.dense_share))  # samples
    assert float(expected.dense_share) == 0
    assert (dense > 0) == (room < 1) and (dense < 21 or room < 0.9 or screen == "int8")


def test_a_sample_may_have_many_times_the_candidates_of_others(poisoned, screen, lists):
    """Trained ones do. Lists are a block's: what one sample does not need is another's."""
    problem, near = (GEOMETRIES[geometry](40, 400, 64) for geometry in ("random", "collapsed"))
    x, w = problem.x, problem.w
    x[3] = x[29] = near.x[3] / near.x[3].norm()
    w[::2] = F.normalize(w[::2]) + 0.7 * x[3]
    problem = problem._replace(x=x, w=w)
    active = truth(*problem, filter_eps=FAST).active.sum(1)
    assert active[3] > 8 * active.double().median()
    room = 100 if screen == "int8" else 24  # for so many candidates of each sample
    assert active[3] > 2 * room
    lists(1, room)
    result = run(CASE, problem, filter_eps=FAST)
    Judge(problem, filter_eps=FAST).check(result, "triton")
    assert float(result.stats.dense_share) == 0


def test_overflow_of_every_sample_and_of_ignored_ones(poisoned, lists):
    problem = GEOMETRIES["collapsed"](9, 140, 16)
    problem.labels[2] = problem.labels[5] = -100
    lists(1, 1)
    result = run(CASE, problem, filter_eps=FAST)
    Judge(problem, filter_eps=FAST).check(result, "triton")
    assert float(result.stats.dense_share) == 1  # ignored samples have no list that could overflow


@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_lists_and_dense_products_agree(screen, monkeypatch, dtype):
    """What an earlier call's count decides must not show but in the rounding of dense products."""
    problem = GEOMETRIES["trained"](24, 200, 48).to(DEVICE, dtype, f32)
    by_lists = run(CASE, problem, filter_eps=FAST)
    monkeypatch.setattr(plan, "way_of", lambda *_: plan.Way(dense=True))
    dense = run(CASE, problem, filter_eps=FAST)
    assert float(by_lists.stats.dense_share) == 0 and float(dense.stats.dense_share) == 1
    t = truth(*problem, filter_eps=FAST, dtype=f32 if dtype == f32 else f16)
    assert abs(int(dense.stats.active_pairs) - int(by_lists.stats.active_pairs)) <= int(t.borderline.sum())
    stored = torch.finfo(dtype).eps
    for name, bound in (("row_loss", t.worst.loss), ("grad_x", t.worst.x + t.flip_x), ("grad_w", t.worst.w + t.flip_w)):
        ours, theirs = (getattr(r, name).double().cpu() for r in (by_lists, dense))
        difference = (ours - theirs).abs() if ours.dim() == 1 else (ours - theirs).norm(dim=1)
        size = ours.abs() if ours.dim() == 1 else ours.norm(dim=1)
        assert (difference <= 2 * bound + stored * size).all(), name


@pytest.mark.parametrize("way", ["lists", "parts", "dense"])
def test_alike_calls_are_right_with_other_tensors(poisoned, screen, monkeypatch, way):
    """After the first they are launched from a list, in which nothing of the first may be left."""
    if way == "parts":
        monkeypatch.setattr(tiles, "CLASSES_OF_PARTS", 1)
    forget_kinds()
    filter_eps = 0.0 if way == "dense" else FAST
    results = []
    for seed in range(3):
        problem = GEOMETRIES["trained"](21, 300, 24, seed=seed).to(DEVICE, bf16, f32)
        results.append(run(CASE, problem, filter_eps=filter_eps))
        Judge(problem, filter_eps=filter_eps).check(results[-1], "triton")
    again = run(CASE, problem, filter_eps=filter_eps)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again[2:], results[-1][2:], strict=True))


@pytest.mark.parametrize("geometry", ["random", "trained"])
@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_every_class_row_of_an_exact_call_is_right_by_itself(dtype, geometry):
    """Adam divides by the size of each row's gradient, and rows without a sample are 1e-11 of the largest here.

    Half, 1 %: a cosine of fp16 unit rows is off by 2⁻¹¹ √(2/3) / √D, and k = 80 times as much a coefficient: 1.4e-3, of
    which a row that one pair carries takes seven standard deviations. float32: k times 3·2⁻²² by the split, and ten
    times as much by sums that a tensor core truncates.
    """
    problem = GEOMETRIES[geometry](40, 200, 512).to(DEVICE, dtype, f32)
    upstream = problem.upstream.abs() + 0.5
    problem = problem._replace(upstream=upstream)
    ours = run(CASE, problem, filter_eps=0.0).grad_w.double().cpu()
    expected = truth(*problem, filter_eps=0.0).grad_w
    size = expected.norm(dim=1)
    assert size.min() < 1e-9 * size.max()
    assert ((ours - expected).norm(dim=1) <= (6e-4 if dtype == f32 else 0.01) * size).all()


class TestDenseMean:
    """A dense forward of a mean or a sum makes ∂w, which the first backward scales; any other computes it again."""

    def reduced(self, problem, reduction="mean", **options):
        x, w = problem.x.detach().requires_grad_(), problem.w.detach().requires_grad_()
        return x, w, sface_loss(x, w, problem.labels, reduction=reduction, backend="triton", **options)

    def both(self, problem, upstream=1.0, reduction="mean") -> tuple[torch.Tensor, torch.Tensor]:
        """∂w as the forward made it, and computed again."""
        x, w, loss = self.reduced(problem, reduction, filter_eps=0.0)
        factor = torch.full_like(loss, upstream)
        first, again = (torch.autograd.grad(loss, (x, w), factor, retain_graph=True) for _ in range(2))
        assert torch.equal(first[0].nan_to_num(7), again[0].nan_to_num(7))
        return first[1], again[1]

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("dtype, filter_eps", [(f32, 0.0), (f32, FAST), (bf16, 0.0), (f16, 0.0)], ids=str)
    @pytest.mark.parametrize("tile", ["whole", "small"])
    def test_is_right(self, poisoned, monkeypatch, reduction, dtype, filter_eps, tile):
        """In several chunks, and with tiles smaller than everything."""
        monkeypatch.setattr(plan, "way_of", lambda *_: plan.Way(dense=True))
        if tile == "small":
            monkeypatch.setenv("SFACE_TILES", json.dumps({name: SMALL for name in tiles.TABLES}))
            monkeypatch.setattr(buffers, "DENSE_CHUNK_BYTES", 1 << 17)
            monkeypatch.setattr(buffers, "shares", lambda blocks, most, multiprocessors: min(most, 2))
        problem = GEOMETRIES["trained"](35, 300, 24).to(DEVICE, dtype, f32)
        problem = problem._replace(upstream=torch.full_like(problem.upstream, 3 / 35 if reduction == "mean" else 3))
        x, w, loss = self.reduced(problem, reduction, filter_eps=filter_eps)
        (3 * loss).backward()
        rows = run(CASE, problem, filter_eps=filter_eps)
        Judge(problem, filter_eps=filter_eps).check(rows._replace(grad_x=x.grad, grad_w=w.grad), "triton")

    @pytest.mark.parametrize("upstream", [1.0, 3.0, -0.7, 1e-20, 0.0, torch.nan, torch.inf])
    def test_upstream(self, upstream):
        problem = GEOMETRIES["trained"](21, 150, 24).to(DEVICE, bf16, f32)
        problem.labels[4] = -100
        first, again = self.both(problem, upstream)
        if upstream == 0:
            assert not first.any() and not again.any()
        elif upstream - upstream == 0:
            assert ((first - again).norm(dim=1) <= 2.0**-21 * again.norm(dim=1)).all() and first.any(1).all()
        else:
            assert first.isnan().all() and again.isnan().all()

    def test_rows_that_do_not_count(self, monkeypatch):
        """Whatever an ignored row holds changes no bit; a label out of range counts as one of another shard."""
        monkeypatch.setattr(validation, "checks_labels", lambda _: False)
        problem = GEOMETRIES["trained"](21, 150, 24).to(DEVICE, f32, f32)
        problem.labels[4], problem.labels[7] = -100, 150
        first, again = self.both(problem)
        assert ((first - again).norm(dim=1) <= 2.0**-21 * again.norm(dim=1)).all() and first.any(1).all()
        problem.x[4] = torch.nan
        assert torch.equal(self.both(problem)[0], first)
        problem.x[5, 3] = torch.inf
        assert all(grad.isnan().all() for grad in self.both(problem))

    def test_far_classes_beside_rows_that_do_not_count(self):
        """Those, and the rows that a block is padded with, are zeros, of cosine 0: next to what such a coefficient is
        (2⁻³⁹) those of cosines around −0.5 (2⁻⁹⁹) would leave fp16's range. Bound: of float32 as above."""
        problem = GEOMETRIES["random"](2, 256, 64)
        near = torch.nn.functional.normalize(problem.x[0], dim=0)
        problem.w.copy_(torch.nn.functional.normalize(problem.w) - torch.linspace(0.4, 0.7, 256)[:, None] * near)
        problem.labels[0], problem.labels[1] = 0, -100
        problem.upstream.copy_(torch.tensor([1.0, 0.0]))
        expected = truth(*problem, filter_eps=0.0).grad_w
        for grad in self.both(problem.to(DEVICE, f32, f32)):
            size = expected.norm(dim=1)
            far = (size < 1e-20) & (size > 1e-33)  # below, entries are no normal numbers
            error = (grad.double().cpu() - expected).norm(dim=1)
            assert far[128:].sum() > 50 and (error <= 6e-4 * size)[far].all()

    def test_all_rows_ignored(self):
        problem = GEOMETRIES["trained"](5, 40, 20).to(DEVICE, f32, f32)
        problem.labels.fill_(-100)
        assert not any(grad.any() for grad in self.both(problem))

    def test_accumulates(self):
        """Over two losses of one weight, whose graphs are alive together, and beside a weight that wants nothing."""
        problem = GEOMETRIES["trained"](9, 40, 20).to(DEVICE, f32, f32)
        expected, _ = self.both(problem)
        x, w, loss = self.reduced(problem, filter_eps=0.0)
        other = sface_loss(x, w, problem.labels, backend="triton", filter_eps=0.0)
        (loss + other).backward()
        assert torch.equal(w.grad, 2 * expected)
        frozen = sface_loss(x, w.detach(), problem.labels, backend="triton", filter_eps=0.0)
        assert frozen.grad_fn.options.made is None and torch.equal(frozen, loss)

    @pytest.mark.parametrize("weight_dtype, filter_eps", [(bf16, 0.0), (f32, FAST)], ids=["half", "lists"])
    def test_where_none_is_made(self, weight_dtype, filter_eps):
        problem = GEOMETRIES["trained"](9, 40, 20).to(DEVICE, bf16, weight_dtype)
        _, w, loss = self.reduced(problem, filter_eps=filter_eps)
        assert not loss.grad_fn.options.made
        loss.backward()
        assert w.grad.any()


@pytest.mark.parametrize("overflow", [False, True], ids=["lists", "overflow"])
def test_a_mean_has_the_gradients_of_its_rows(monkeypatch, poisoned, lists, overflow):
    """Its upstream gradient is one element; labels are not looked at before the kernels, as on a GPU."""
    monkeypatch.setattr(validation, "checks_labels", lambda _: False)
    if overflow:
        lists(2, 1)
    x, w, labels, _ = GEOMETRIES["trained"](21, 150, 24).to(DEVICE, bf16, f32)
    labels[4] = -100
    x, w = x.requires_grad_(), w.requires_grad_()
    options = {"backend": "triton", "filter_eps": FAST}
    loss, stats = sface_loss(x, w, labels.unsqueeze(1), return_stats=True, **options)
    assert (float(stats.dense_share) > 0) == overflow
    rows = sface_loss(x, w, labels, reduction="none", **options)
    expected = torch.autograd.grad(rows, (x, w), torch.full_like(rows, 3 / 20))
    for ours, theirs in zip(torch.autograd.grad(loss, (x, w), torch.full_like(loss, 3)), expected, strict=True):
        assert torch.equal(ours, theirs) and theirs.any()
    assert torch.equal(loss, rows.sum() / 20)


@pytest.mark.parametrize("k_inter, b", [(20.0, 1.23), (80.0, 1.9), (80.0, 0.3), (300.0, 1.0)])
def test_other_slopes_and_angles(poisoned, k_inter, b):
    """Where the cheap form of the weight below the threshold is not accurate, the call goes dense."""
    options = {"k_inter": k_inter, "b": b, "filter_eps": 2.0**-12}
    problem = GEOMETRIES["trained"](18, 140, 40)
    result = run(CASE, problem, **options)
    Judge(problem, **options).check(result, "triton")
    assert float(result.stats.dense_share) == 1


@pytest.mark.parametrize("first, second", [(False, True), (True, False)], ids=["lists first", "dense first"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_checkpointing_may_recompute_the_other_way(monkeypatch, first, second, reduction):
    """The count that decides may arrive between the forward and its recomputation."""
    from torch.utils.checkpoint import checkpoint

    problem = GEOMETRIES["trained"](24, 200, 48)
    if reduction == "sum":
        problem.upstream.fill_(3)
    ways = [first, second]
    monkeypatch.setattr(plan, "way_of", lambda *_: plan.Way(dense=ways.pop(0)))
    x, w = (t.to(DEVICE, copy=True).requires_grad_() for t in (problem.x, problem.w))

    def rows_of(x, w):
        return sface_loss(x, w, problem.labels.to(DEVICE), reduction=reduction, backend="triton", filter_eps=FAST)

    rows = checkpoint(rows_of, x, w, use_reentrant=False)
    rows.backward(problem.upstream.to(DEVICE, rows.dtype) if reduction == "none" else torch.full_like(rows, 3))
    assert not ways
    expected = run("reference", problem, filter_eps=FAST)
    for ours, theirs in ((x.grad, expected.grad_x), (w.grad, expected.grad_w)):
        assert (ours.cpu() - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_dense_call_whose_lists_were_copied():
    """What takes saved tensors to host memory and back drops their strides, which mark a dense call."""
    problem = GEOMETRIES["trained"](24, 200, 48).to(DEVICE, f32, f32)
    hp = (64.0, 80.0, 80.0, 0.8, 1.23, FAST)
    operands = problem.x, problem.w, problem.labels
    outputs = torch.ops.sface.triton_forward(*operands, -2, -1, hp, True, True, True, 132)
    saved = [t.clone(memory_format=torch.contiguous_format) for t in outputs[5:-3]]
    assert buffers.went_dense(outputs[5:-3]) and not buffers.went_dense(saved)
    grad = backend.grad_weight(*operands, HyperParameters(*hp), problem.upstream.float(), tuple(saved))
    expected = run("reference", problem.to("cpu", f32, f32), filter_eps=FAST).grad_w
    assert (grad.cpu() - expected).norm() <= 1e-4 * expected.norm()
