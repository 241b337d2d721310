"""What only the Triton backend has: lists that overflow, tiles and chunks of any size, two ways to the same result.

Without a GPU these run in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/triton/test_triton.py
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from sface_kernels import available_backends, ops, sface_loss
from sface_kernels.backends import triton as backend
from sface_kernels.backends.triton import density, tiles
from sface_kernels.backends.triton.rules import make_rules
from sface_kernels.types import HyperParameters, Request
from tests.support.cases import BACKENDS, Case, bf16, f16, f32
from tests.support.checks import Judge, Result, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASE = Case("triton", DEVICE, f32, f32)
pytestmark = pytest.mark.skipif(
    CASE.reason_to_skip() is not None, reason=f"{CASE}: {CASE.reason_to_skip()}; on a CPU set TRITON_INTERPRET=1"
)
FAST = 2.0**-16


def same_bits(a: Result, b: Result) -> bool:
    pairs = zip((a.row_loss, a.grad_x, a.grad_w, *a.stats), (b.row_loss, b.grad_x, b.grad_w, *b.stats), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer that a launch gets starts as NaN (or a wild integer): what is not written shows."""
    from sface_kernels.backends.triton import launch

    def empty(call, *shape, dtype=f32):
        buffer = torch.empty(shape, dtype=dtype, device=call.device)
        return buffer.fill_(torch.nan if dtype.is_floating_point else 0x3FFFFFFF)

    monkeypatch.setattr(launch.Call, "empty", empty)


@pytest.fixture
def lists(monkeypatch):
    """Sets the number and capacity of the parts of a list."""

    def set_to(stripes: int, capacity: int) -> None:
        monkeypatch.setattr(ops, "triton_lists", lambda n, c, d, dense: (1, 0) if dense else (stripes, capacity))

    return set_to


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
def test_nothing_is_left_unwritten(poisoned, geometry, filter_eps):
    problem = GEOMETRIES[geometry](19, 141, 37)
    Judge(problem, filter_eps=filter_eps).check(run(CASE, problem, filter_eps=filter_eps), "triton")


# One part of one entry overflows in almost every sample, several parts in some of them, the last in none.
@pytest.mark.parametrize("stripes, capacity", [(1, 1), (3, 2), (2, 24), (5, 128)])
@pytest.mark.parametrize("geometry", ["random", "trained"])
def test_overflow(poisoned, lists, geometry, stripes, capacity):
    """A sample whose list is too small goes the dense way, the others by their lists, in one call and one ∂w."""
    problem = GEOMETRIES[geometry](21, 300, 32)
    expected = run(CASE, problem, filter_eps=FAST).stats
    lists(stripes, capacity)
    result = run(CASE, problem, filter_eps=FAST)
    Judge(problem, filter_eps=FAST).check(result, "triton")
    assert int(result.stats.active_pairs) == int(expected.active_pairs) > 21 * 2
    dense = round(21 * float(result.stats.dense_share))  # samples
    assert float(expected.dense_share) == 0
    if capacity == 128:
        assert dense == 0
    elif capacity == 24:
        assert 0 < dense < 21
    else:
        assert dense > 15


def test_overflow_of_every_sample_and_of_ignored_ones(poisoned, lists):
    problem = GEOMETRIES["collapsed"](9, 140, 16)
    problem.labels[2] = problem.labels[5] = -100
    lists(2, 4)
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
    monkeypatch.setattr(tiles, "GRADIENT_FEATURES", 16)
    lists(2, 64)
    problem = GEOMETRIES["trained"](n, c, d)
    Judge(problem, filter_eps=filter_eps).check(run(CASE, problem, filter_eps=filter_eps), "triton")


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
def test_chunks(poisoned, monkeypatch, filter_eps):
    """Classes in several chunks, the last of them short: sums, lists and gradients go on across them."""
    problem = GEOMETRIES["trained"](20, 400, 24)
    whole = run(CASE, problem, filter_eps=filter_eps)
    monkeypatch.setattr(ops, "TRITON_CHUNK_BYTES", 1 << 17)
    monkeypatch.setattr(ops, "TRITON_PROGRAMS", 2)
    result = run(CASE, problem, filter_eps=filter_eps)
    Judge(problem, filter_eps=filter_eps).check(result, "triton")
    assert int(result.stats.active_pairs) == int(whole.stats.active_pairs)


@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_lists_and_dense_products_agree(monkeypatch, dtype):
    """What an earlier call's count decides must not show but in the rounding of dense products."""
    problem = GEOMETRIES["trained"](24, 200, 48).to(DEVICE, dtype, f32)
    by_lists = run(CASE, problem, filter_eps=FAST)
    monkeypatch.setattr(density, "expects_dense", lambda *_: True)
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


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
def test_a_hub_class(poisoned, filter_eps):
    """Every sample has the same class: one list of links, one row of ∂w from all of them."""
    problem = GEOMETRIES["random"](70, 150, 24)
    problem.labels.fill_(149)
    Judge(problem, filter_eps=filter_eps).check(run(CASE, problem, filter_eps=filter_eps), "triton")


def test_sums_do_not_depend_on_the_order_of_links(monkeypatch):
    """∂w has the same bits whichever way the links were made, reversed here."""
    from sface_kernels.backends.triton import launch_backward

    problem = GEOMETRIES["collapsed"](40, 60, 16)
    expected = run(CASE, problem, filter_eps=FAST)
    launch = launch_backward.launch
    reversed_lists = []

    def reverse(head: torch.Tensor, following: torch.Tensor) -> None:
        for j, link in enumerate(head.tolist()):
            before = -1
            while link >= 0:
                after = int(following[link])
                following[link] = before
                before, link = link, after
            head[j] = before
            reversed_lists.append(before)

    def launch_and_reverse(kernel, grid, **arguments):
        launch(kernel, grid, **arguments)
        if "head_ptr" in arguments and "grad_w_ptr" not in arguments:
            reverse(arguments["head_ptr"], arguments["next_ptr"])

    monkeypatch.setattr(launch_backward, "launch", launch_and_reverse)
    assert same_bits(run(CASE, problem, filter_eps=FAST), expected)
    assert len(reversed_lists) == 60


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
def test_the_full_form_of_the_screen(poisoned, k_inter, b):
    """Where the cheap form of what is no candidate is not accurate, the screen evaluates arccos and the sigmoid."""
    options = {"k_inter": k_inter, "b": b, "filter_eps": 2.0**-12}
    rules = make_rules(HyperParameters(64.0, 80.0, k_inter, 0.8, b, 2.0**-12), 40)
    assert rules.screens and not rules.cheap
    problem = GEOMETRIES["trained"](18, 140, 40)
    Judge(problem, **options).check(run(CASE, problem, **options), "triton")


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


class TestRules:
    """The threshold of the screen, against what rounding to fp16 can do at worst."""

    @pytest.mark.parametrize("d", [2, 16, 128, 512, 4096])
    def test_the_bound_holds_for_adversarial_rows(self, d):
        """Rows whose every component is rounded the same way, by all but half a unit in the last place."""
        g = torch.Generator().manual_seed(d)
        for _ in range(20):
            x = torch.randn(d, generator=g, dtype=torch.float64).abs().float().half().double()
            x = x + 0.499 * (torch.nextafter(x.half(), torch.tensor(torch.inf).half()).double() - x)
            unit = x / x.norm()
            screened = unit.half().double() @ unit.half().double()
            rules = make_rules(HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, FAST), d)
            true_threshold = math.cos(1.23 + math.log(2.0**16 - 1) / 80.0)
            assert abs(float(screened) - 1) < true_threshold - rules.threshold

    def test_nothing_to_screen_for(self):
        assert not make_rules(HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, 0.0), 512).screens
        assert not make_rules(HyperParameters(64.0, 80.0, 2.0, 0.8, 1.23, FAST), 512).screens


class TestTiles:
    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"scren": {}}', '{"screen": {"block": 1}}', '{"screen": {"warps": "8"}}', '{"screen": {"warps": 0}}', '{"screen": {"block_c": 256}}']
    )  # fmt: skip
    def test_a_wrong_override_says_what_was_expected(self, monkeypatch, text):
        monkeypatch.setenv("SFACE_TILES", text)
        with pytest.raises(ValueError, match="SFACE_TILES: expected a JSON object"):
            tiles.tile("screen", "sm_90", "half", 1024)

    def test_an_override_reaches_the_tile(self, monkeypatch):
        monkeypatch.setenv("SFACE_TILES", '{"screen": {"warps": 4}}')
        assert tiles.tile("screen", "sm_90", "half", 1024) == tiles.SCREEN["sm_90"]._replace(warps=4)

    @pytest.mark.parametrize("family", tiles.FAMILIES)
    @pytest.mark.parametrize("kernel", tiles.TABLES)
    def test_every_block_divides_what_buffers_are_padded_to(self, kernel, family):
        for samples in (1, 17, 64, 128, 4096):
            for precision in ("half", "tf32x3"):
                t = tiles.tile(kernel, family, precision, samples)
                assert all(ops.TRITON_ROWS % block == 0 and block >= 16 for block in t[:3]), t


class TestDispatch:
    def test_auto_does_not_take_the_interpreter(self):
        assert "triton" in available_backends(DEVICE)
        from sface_kernels.dispatch import select

        if DEVICE == "cpu":
            assert select("auto", Request(torch.device("cpu"), f32, f32)) != "triton"

    def test_too_many_features(self):
        x, w = torch.randn(2, 5000, device=DEVICE), torch.randn(3, 5000, device=DEVICE)
        with pytest.raises(RuntimeError, match="'triton' cannot run here: it takes at most 4096 features, got 5000"):
            sface_loss(x, w, torch.tensor([0, 1], device=DEVICE), backend="triton")

    def test_a_gpu_that_cannot_takes_chunked_and_says_so_once(self, monkeypatch, recwarn):
        from sface_kernels import dispatch

        entry = BACKENDS["triton"]._replace(unavailable=lambda *_: "it is made of cheese")
        monkeypatch.setitem(dispatch.BACKENDS, "triton", entry)
        for _ in range(2):
            assert dispatch.select("auto", Request(torch.device("cuda"), f32, f32)) == "chunked"
        said = [str(w.message) for w in recwarn if "cheese" in str(w.message)]
        assert len(said) == 1 and "'chunked' runs on cuda, as 'triton' cannot" in said[0]

    @pytest.mark.parametrize(
        "version, capability, reason",
        [((3, 3), (9, 0), "needs Triton ≥ 3.4, found 3.3"), ((3, 6), (7, 5), "compute capability ≥ 8.0"), (None, (9, 0), "not installed")],
    )  # fmt: skip
    def test_too_old(self, monkeypatch, version, capability, reason):
        monkeypatch.setattr(backend, "_installed_triton", lambda: version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert reason in backend.unavailable(Request(torch.device("cuda"), f32, f32))


class TestDensity:
    """The choice by an earlier count, with an event that arrives when the test says so."""

    @pytest.fixture(autouse=True)
    def _without_a_gpu(self, monkeypatch):
        class Event:
            arrived = False

            def record(self):
                pass

            def query(self):
                return Event.arrived

        self.event = Event
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(density, "_host_buffer", torch.zeros_like)
        monkeypatch.setattr(density, "_watches", {})
        monkeypatch.setattr(density, "_readable", lambda x: True)
        self.kind = torch.empty(10, 4), torch.empty(1000, 4), HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, FAST)

    def test_it_does_not_wait(self):
        x, w, hp = self.kind
        many, few = torch.tensor([5000, 0]), torch.tensor([5, 0])
        assert not density.expects_dense(x, w, hp)
        density.learn(many, x, w, hp)
        assert not density.expects_dense(x, w, hp)  # the count has not arrived
        density.learn(few, x, w, hp)  # not sent: the buffer is in use
        self.event.arrived = True
        assert density.expects_dense(x, w, hp)
        density.learn(few, x, w, hp)
        assert not density.expects_dense(x, w, hp)

    def test_kinds_of_calls_do_not_mix(self):
        x, w, hp = self.kind
        self.event.arrived = True
        density.learn(torch.tensor([5000, 0]), x, w, hp)
        assert not density.expects_dense(x, w, hp._replace(filter_eps=2.0**-8))
        assert not density.expects_dense(x, w[:500], hp)
        assert density.expects_dense(x[:7], w, hp)  # the last batch of an epoch is of the same kind
        assert density.expects_dense(x, w, hp._replace(s=32.0, b=1.2))  # and so is the next step of a schedule


@pytest.mark.parametrize("reason", ["deterministic", "cpu"])
def test_a_count_is_not_read_where_the_way_must_not_vary(reason):
    torch.use_deterministic_algorithms(reason == "deterministic")
    try:
        assert not density._readable(torch.empty(1))
    finally:
        torch.use_deterministic_algorithms(False)


def test_no_samples():
    x, w = (torch.randn(size, 8, device=DEVICE).requires_grad_() for size in (0, 5))
    loss = sface_loss(x, w, torch.zeros(0, dtype=torch.int64, device=DEVICE), backend="triton")
    loss.backward()
    assert float(loss.detach()) == 0 and x.grad.shape == (0, 8) and torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU has no pages that cost nothing until they are touched")
def test_offsets_beyond_32_bits():
    """A weight whose rows lie so far apart that their offsets do not fit 32 bits."""
    problem = GEOMETRIES["trained"](3, 9, 8)
    stride = (1 << 31) // 8 + 1000
    far = torch.empty(9 * stride).as_strided((9, 8), (stride, 1)).copy_(problem.w)
    assert far.stride(0) * 8 > 2**31
    for filter_eps in (FAST, 0.0):
        options = {"reduction": "none", "backend": "triton", "filter_eps": filter_eps}
        rows = sface_loss(problem.x, far, problem.labels, **options)
        assert torch.equal(rows, sface_loss(problem.x, problem.w, problem.labels, **options))
