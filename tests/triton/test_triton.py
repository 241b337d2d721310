"""What only the Triton backend has: lists that overflow, tiles and chunks of any size, two ways to the same result.

Without a GPU these run in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/triton/test_triton.py
"""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import available_backends, ops, sface_loss, validation, verify
from sface_kernels.backends import triton as backend
from sface_kernels.backends.triton import buffers, device, plan, tiles
from sface_kernels.dispatch import choose
from sface_kernels.ops import prepare_labels
from sface_kernels.types import IGNORED, HyperParameters, Request
from tests.support.cases import Case, bf16, f16, f32
from tests.support.checks import Judge, Result, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES
from tests.triton.conftest import forget_kinds

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = Case("triton", DEVICE, f32, f32)
pytestmark = pytest.mark.skipif(
    CASE.reason_to_skip() is not None, reason=f"{CASE}: {CASE.reason_to_skip()}; on a CPU set TRITON_INTERPRET=1"
)
FAST = 2.0**-16


def same_bits(a: Result, b: Result) -> bool:
    pairs = zip((a.row_loss, a.grad_x, a.grad_w, *a.stats), (b.row_loss, b.grad_x, b.grad_w, *b.stats), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
def test_nothing_is_left_unwritten(poisoned, geometry, filter_eps):
    problem = GEOMETRIES[geometry](19, 141, 37)
    Judge(problem, filter_eps=filter_eps).check(run(CASE, problem, filter_eps=filter_eps), "triton")


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


SMALL = {"block_n": 16, "block_c": 32, "block_k": 16}


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
@pytest.mark.parametrize("shape", [(33, 129, 33), (1, 31, 17), (16, 128, 16)], ids=str)
def test_small_tiles(poisoned, monkeypatch, lists, shape, filter_eps):
    """Tiles smaller than everything: remainders on every side, several tiles a part, several steps a product."""
    n, c, d = shape
    kernels = {name: SMALL for name in tiles.TABLES}
    monkeypatch.setenv("SFACE_TILES", json.dumps(kernels))
    monkeypatch.setattr(tiles, "SCATTER_FEATURES", 16)
    lists(2, 64)
    problem = GEOMETRIES["trained"](n, c, d)
    Judge(problem, filter_eps=filter_eps).check(run(CASE, problem, filter_eps=filter_eps), "triton")


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
def test_chunks(poisoned, monkeypatch, filter_eps):
    """Classes in several chunks, the last of them short: sums, lists and gradients go on across them."""
    problem = GEOMETRIES["trained"](20, 400, 24)
    whole = run(CASE, problem, filter_eps=filter_eps)
    monkeypatch.setattr(buffers, "CHUNK_BYTES", 1 << 17)
    monkeypatch.setattr(buffers, "DENSE_CHUNK_BYTES", 1 << 17)
    monkeypatch.setattr(buffers, "shares", lambda blocks, most, multiprocessors: min(most, 2))
    forget_kinds()
    result = run(CASE, problem, filter_eps=filter_eps)
    Judge(problem, filter_eps=filter_eps).check(result, "triton")
    assert int(result.stats.active_pairs) == int(whole.stats.active_pairs)


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


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
def test_a_hub_class(poisoned, filter_eps):
    """Every sample has the same class: one list of links, one row of ∂w from all of them."""
    problem = GEOMETRIES["random"](70, 150, 24)
    problem.labels.fill_(149)
    Judge(problem, filter_eps=filter_eps).check(run(CASE, problem, filter_eps=filter_eps), "triton")


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


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_as_they_are(poisoned, dtype):
    """The kernel makes of labels what `ops.prepare_labels` makes of them, and counts them; a column of a matrix too."""
    problem = GEOMETRIES["random"](11, 40, 24).to(DEVICE, f32, f32)
    wild = {0: 40, 3: 255 if dtype == torch.uint8 else -1, 4: 127, 5: 0, 8: 200 if dtype == torch.uint8 else -2}
    labels = problem.labels.to(dtype)
    for row, label in wild.items():
        labels[row] = label
    hp = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, FAST)
    for ignore_index in (-100, int(labels[7]), 255, -1, -2):
        target = prepare_labels(labels, 40, ignore_index, False)
        raw = backend.forward(problem.x, problem.w, labels, hp, True, True, ignore_index=ignore_index)
        given = backend.forward(problem.x, problem.w, target, hp, True, True)
        assert torch.equal(raw.target, target) and torch.equal(given.target, target)
        assert int(raw.counted) == int(given.counted) == int((target != IGNORED).sum())
        assert torch.equal(raw.row_loss.nan_to_num(7), given.row_loss.nan_to_num(7))
    everything = backend.forward(problem.x, problem.w, torch.full_like(labels, 9), hp, True, True, ignore_index=9)
    assert int(everything.counted) == 1 and not everything.row_loss.any()


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


def test_sums_do_not_depend_on_the_order_of_links():
    """∂w has the same bits whichever way the links were made, reversed here."""
    problem = GEOMETRIES["collapsed"](40, 60, 16).to(DEVICE, f32, f32)
    hp = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, FAST)
    operands = problem.x, problem.w, problem.labels
    saved = buffers.Saved(*backend.forward(*operands, hp, True, True).saved)
    expected = backend.grad_weight(*operands, hp, problem.upstream.float(), saved)
    following, longest = saved.links.view(-1), 0
    for j, link in enumerate(saved.head.tolist()):
        before, length = -1, 0
        while link >= 0:
            after = int(following[link])
            following[link] = before
            before, link, length = link, after, length + 1
        saved.head[j], longest = before, max(longest, length)
    assert longest > 5
    assert torch.equal(backend.grad_weight(*operands, hp, problem.upstream.float(), saved), expected)


def test_the_same_bits_every_time():
    problem = GEOMETRIES["trained"](33, 150, 40)
    for filter_eps in (FAST, 0.0):
        assert same_bits(run(CASE, problem, filter_eps=filter_eps), run(CASE, problem, filter_eps=filter_eps))


def test_links_keep_the_range_of_upstream_gradients():
    """Fixed-point sums scale by class: rows 24 orders of magnitude apart are all right where they do not meet."""
    problem = GEOMETRIES["random"](12, 90, 256)
    problem = problem._replace(labels=torch.arange(12) * 7, upstream=torch.tensor([1e-12, 1e12]).repeat(6))
    Judge(problem, filter_eps=FAST).check(run(CASE, problem, filter_eps=FAST), "triton")


@pytest.mark.parametrize("k_inter, b", [(20.0, 1.23), (80.0, 1.9), (80.0, 0.3), (300.0, 1.0)])
def test_other_slopes_and_angles(poisoned, k_inter, b):
    """Where the cheap form of the weight below the threshold is not accurate, the call goes dense."""
    options = {"k_inter": k_inter, "b": b, "filter_eps": 2.0**-12}
    problem = GEOMETRIES["trained"](18, 140, 40)
    result = run(CASE, problem, **options)
    Judge(problem, **options).check(result, "triton")
    assert float(result.stats.dense_share) == 1


def test_labels_out_of_range_without_a_check():
    """On a GPU nothing raises: the row's loss and ∂x are NaN, and the rest is as if its class lay elsewhere."""
    problem = GEOMETRIES["trained"](10, 60, 24)
    x, w = problem.x.to(DEVICE), problem.w.to(DEVICE)
    target = ops.prepare_labels(torch.tensor([0, 1, 60, 3, -7, 5, 2**40, 7, 8, 9]), 60, -100, False).to(DEVICE)
    hp = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, FAST)
    result = backend.forward(x, w, target, hp, True, True)
    bad = torch.tensor([2, 4, 6])
    nan_rows = torch.zeros(10, dtype=torch.bool).index_fill_(0, bad, True)
    assert torch.equal(result.row_loss.isnan().cpu(), nan_rows)
    assert torch.equal(result.row_grad_x.isnan().all(1).cpu(), nan_rows)
    grad = backend.grad_weight(x, w, target, hp, torch.ones(10, device=DEVICE), result.saved)
    elsewhere = torch.where(target == -3, -1, target)  # a shard that does not hold the class
    other = backend.forward(x, w, elsewhere, hp, True, True)
    assert torch.equal(grad, backend.grad_weight(x, w, elsewhere, hp, torch.ones(10, device=DEVICE), other.saved))
    assert not other.row_loss.isnan().any() and not grad.isnan().any()


def test_no_samples():
    x, w = (torch.randn(size, 8, device=DEVICE).requires_grad_() for size in (0, 5))
    loss = sface_loss(x, w, torch.zeros(0, dtype=torch.int64, device=DEVICE), backend="triton")
    loss.backward()
    assert float(loss.detach()) == 0 and x.grad.shape == (0, 8) and torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has no pages that cost nothing until they are touched")
@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
@pytest.mark.parametrize("which", ["rows of w", "columns of w", "columns of x"])
def test_offsets_beyond_32_bits(lists, which, filter_eps):
    """Rows or columns so far apart that their offsets do not fit 32 bits: a transposed weight of many classes has them."""
    problem = GEOMETRIES["trained"](3, 9, 8)
    stride = (1 << 31) // 7 + 1000
    near = problem.w if "w" in which else problem.x
    strides = (stride, 1) if "rows" in which else (1, stride)
    far = torch.empty(9 * stride).as_strided(near.shape, strides).copy_(near)
    assert stride * 7 > 2**31
    w, x = (far, problem.x) if "w" in which else (problem.w, far)
    for capacity in (128, 1):  # of lists that hold everything, and of lists that overflow
        lists(1, capacity)
        ours, theirs = results_of(x, w, problem, filter_eps), results_of(problem.x, problem.w, problem, filter_eps)
        for a, b in zip(ours, theirs, strict=True):  # other strides, another compiled kernel, another order of sums
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def results_of(x: torch.Tensor, w: torch.Tensor, problem, filter_eps: float) -> tuple[torch.Tensor, ...]:
    """Row losses and both gradients, without the public backward, which would make a dense copy of a far gradient."""
    hp = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, filter_eps)
    result = backend.forward(x, w, problem.labels, hp, True, True)
    return (
        result.row_loss,
        result.row_grad_x,
        backend.grad_weight(x, w, problem.labels, hp, problem.upstream, result.saved),
    )


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


@pytest.mark.parametrize("columns, run", [(128, 2), (128, 32), (32, 8)])
def test_the_tag_of_a_column_stays_inside_its_margin(columns, run):
    """A column number replaces the low bits of a cosine; the screen looks that much below its threshold."""
    from tests.triton.small_kernels import tag

    values = torch.rand(16, columns, device=DEVICE) * 2 - 1
    values[0], values[1], values[2] = 0.999999, 1.000001, -1.000001
    nearest, margin = torch.empty(16, 4, device=DEVICE), torch.empty(1, device=DEVICE)
    column = torch.empty(16, 4, dtype=torch.int32, device=DEVICE)
    tag[(1,)](values, nearest, column, margin, ROWS=16, COLUMNS=columns, RUN=run)
    lanes = values.view(16, -1, 4, run)
    taken = (lanes.amax((1, 3)) - nearest).abs().max()
    assert taken <= margin < 1e-4 and taken > 0
    assert (values.gather(1, column.long()) >= lanes.amax((1, 3)) - margin).all()
    assert (column // run % 4 == torch.arange(4, device=DEVICE)).all()


def test_rows_below_the_least_norm():
    """normalize divides them by a constant, so their gradient has no part projected away: also where 1/1e-12 is off.

    What would be projected away is half of it: cosines of 0.5, norms of nine tenths of 1e-12.
    """
    problem = GEOMETRIES["random"](8, 20, 24)
    own = torch.nn.functional.normalize(problem.w[problem.labels])
    other = torch.nn.functional.normalize(problem.x)
    problem.x.copy_(other - (other * own).sum(1, keepdim=True) * own)
    problem.x.copy_(torch.nn.functional.normalize(problem.x) * 0.83 + own * 0.56)
    problem.w[problem.labels[1:]] = own[1:] * 0.9e-12
    problem.x[0] *= 0.9e-12 / problem.x[0].norm()
    for filter_eps in (FAST, 0.0):
        ours, theirs = (run(b, problem, filter_eps=filter_eps) for b in (CASE, "reference"))
        for name in ("grad_x", "grad_w"):
            a, b = (getattr(r, name).double().cpu() for r in (ours, theirs))
            assert ((a - b).norm(dim=1) <= 1e-3 * b.norm(dim=1) + 1e-6 * b.norm()).all(), name


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_is_right_passes_its_verification(monkeypatch, geometry, dtype):
    """As on a GPU, for every call: nothing raises."""
    monkeypatch.setenv("SFACE_VERIFY", "all")
    monkeypatch.setattr(verify, "_calls", {})
    problem = GEOMETRIES[geometry](40, 141, 37).to(DEVICE, dtype, f32)
    as_if = device.pretend(None) if DEVICE == "cpu" and device.pretence() is None else contextlib.nullcontext()
    with as_if:
        for filter_eps in (FAST, 0.0):
            run(CASE, problem, filter_eps=filter_eps)
        w = problem.w.detach().requires_grad_()
        (2 * sface_loss(problem.x, w, problem.labels, backend="triton", filter_eps=0.0)).backward()
    assert any(kind[-3:] == ("dense", False, "backward") for kind in verify._calls)
    assert {kind[-1] for kind in verify._calls} >= {"backward", True}


class TestDispatch:
    def test_auto_does_not_take_the_interpreter(self):
        assert "triton" in available_backends(DEVICE)
        if DEVICE == "cpu":
            assert choose("auto", Request(torch.device("cpu"), f32, f32))[0] != "triton"

    def test_too_many_features(self):
        x, w = torch.randn(2, 5000, device=DEVICE), torch.randn(3, 5000, device=DEVICE)
        with pytest.raises(RuntimeError, match="'triton' cannot run here: it takes at most 4096 features, got 5000"):
            sface_loss(x, w, torch.tensor([0, 1], device=DEVICE), backend="triton")
