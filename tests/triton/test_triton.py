"""What only the Triton backend has: tiles and chunks of any size, links, labels and offsets as its kernels take them.

Without a GPU these run in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/triton/test_triton.py
"""

from __future__ import annotations

import contextlib
import importlib
import json

import pytest
import torch

from sface_kernels import available_backends, ops, sface_loss, verify
from sface_kernels.backends import triton as backend
from sface_kernels.backends.triton import buffers, device, tiles
from sface_kernels.dispatch import choose
from sface_kernels.ops import prepare_labels
from sface_kernels.types import IGNORED, HyperParameters, Request
from tests.support.cases import Case, bf16, f32
from tests.support.checks import Judge, Result, run
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


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("geometry", ["random", "trained", "collapsed"])
def test_candidates_in_parts(poisoned, monkeypatch, geometry, dtype):
    """As with many classes: more parts than turns for most samples, several turns a part for others and without lists."""
    problem = GEOMETRIES[geometry](21, 300, 24).to(DEVICE, dtype, f32)
    problem.labels[4] = -100
    given = problem.x, problem.w, problem.labels, HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, FAST), True, True
    whole = backend.forward(*given, ignore_index=-100)
    monkeypatch.setattr(tiles, "CLASSES_OF_PARTS", 1)
    monkeypatch.setattr(tiles, "INTERPRETER_BLOCK", 16)
    forget_kinds()
    kind_of = importlib.import_module("sface_kernels.backends.triton.kinds").kind_of
    assert kind_of(*given[:2], given[3], False, False, device.MULTIPROCESSORS).list_parts > 1
    Judge(problem, filter_eps=FAST).check(run(CASE, problem, filter_eps=FAST), "triton")
    parts = backend.forward(*given, ignore_index=-100)
    assert torch.equal(parts.hardest_class, whole.hardest_class) and torch.equal(parts.counts, whole.counts)


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
def test_a_hub_class(poisoned, filter_eps):
    """Every sample has the same class: one list of links, one row of ∂w from all of them."""
    problem = GEOMETRIES["random"](70, 150, 24)
    problem.labels.fill_(149)
    Judge(problem, filter_eps=filter_eps).check(run(CASE, problem, filter_eps=filter_eps), "triton")


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
