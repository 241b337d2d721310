"""Which way a call goes: the threshold of the screen, and what an earlier call's counts decide. No kernel runs."""

from __future__ import annotations

import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sface_kernels.backends import triton as backend
from sface_kernels.backends.triton import device, plan, tiles
from sface_kernels.backends.triton.plan import FIRST_PAUSE, NOT_YET, threshold_of
from sface_kernels.types import HyperParameters

FAST = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, 2.0**-16)
EXACT = FAST._replace(filter_eps=0.0)


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
            true_threshold = math.cos(1.23 + math.log(2.0**16 - 1) / 80.0)
            assert abs(float(screened) - 1) < true_threshold - threshold_of(FAST, d)

    def test_nothing_to_screen_for(self):
        assert threshold_of(EXACT, 512) is None
        assert threshold_of(FAST._replace(k_inter=2.0), 512) is None

    @pytest.mark.parametrize("k_inter, b", [(20.0, 1.23), (80.0, 1.9), (80.0, 0.3), (300.0, 1.0)])
    def test_where_the_cheap_form_is_not_accurate_calls_go_dense(self, k_inter, b):
        hp = FAST._replace(k_inter=k_inter, b=b, filter_eps=2.0**-12)
        assert (
            threshold_of(hp, 40) is None and plan.way_of(torch.empty(10, 40), torch.empty(1000, 40), hp, "sm_90").dense
        )


class TestInt8:
    """Which calls are screened in int8."""

    @pytest.mark.parametrize("family, expected", [("sm_80", True), ("sm_89", True), ("sm_90", True), ("sm_100", False), ("sm_120", False), ("gfx942", False)])  # fmt: skip
    def test_where_it_is_fast(self, family, expected):
        assert plan.screens_int8(FAST, 512, family) is expected

    def test_where_it_leaves_few_candidates(self):
        """Half embeddings at their default, not float32; not few features, nor slopes that make much of an error."""
        chosen = [d for d in (128, 256, 372, 512, 1024, 4096) if plan.screens_int8(FAST, d, "sm_90")]
        assert chosen == [372, 512, 1024, 4096]
        for fields in ({"filter_eps": 2.0**-24}, {"filter_eps": 0.0}, {"k_inter": 161.0}, {"b": 1.9}):
            assert not plan.screens_int8(FAST._replace(**fields), 1024, "sm_90"), fields

    def test_every_family_of_capabilities(self):
        found = {c: tiles.family(c, None) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))}
        assert list(found.values()) == ["sm_80", "sm_89", "sm_89", "sm_90", "sm_100", "sm_120"]


class Host:
    """Host memory that a copy reaches when the test says so."""

    def __init__(self):
        self.values, self.coming = [0, 0], None

    def fill_(self, value):
        self.values = [value, value]

    def copy_(self, counts, non_blocking):
        assert non_blocking, "a copy that waits"
        self.coming = counts.tolist()

    def tolist(self):
        return self.values


class TestWatch:
    """The choice by an earlier count."""

    @pytest.fixture(autouse=True)
    def _without_a_gpu(self, monkeypatch):
        self.hosts, self.captured = [], False
        monkeypatch.setattr(plan, "_watches", {})
        monkeypatch.setattr(plan, "_varies", lambda x: True)
        monkeypatch.setattr(plan, "_capturing", lambda x: self.captured)
        monkeypatch.setattr(plan, "_host_counts", self._host)
        self.x, self.w = torch.empty(10, 4), torch.empty(1000, 4)  # 10,000 pairs, 25 of them are DENSE_SHARE

    def _host(self):
        self.hosts.append(Host())
        return self.hosts[-1]

    def _arrive(self):
        for host in self.hosts:
            if host.coming is not None:
                host.values, host.coming = host.coming, None

    def _call(self, active: int, overflowed: int = 0, overflowed_int8: int | None = None, arrive: bool = True) -> str:
        """A call, and that it ends before the next. Returns its way; so many samples overflow if that is by lists."""
        way = plan.way_of(self.x, self.w, FAST, "sm_90")
        if way.int8 and overflowed_int8 is not None:
            overflowed = overflowed_int8
        plan.learn(way, torch.tensor([active, 10_000 if way.dense else overflowed * 1000]), 10_000)
        if arrive:
            self._arrive()
        return "dense" if way.dense else "int8" if way.int8 else "fp16"

    def _step(self, active: int, overflowed: int = 0, arrive: bool = True) -> bool:
        """Whether that call went by dense products."""
        return self._call(active, overflowed, arrive=arrive) == "dense"

    def test_it_does_not_wait(self):
        assert not self._step(5000, arrive=False)
        assert not self._step(5, arrive=False)  # not sent: the buffer is in use
        self._arrive()
        assert self._step(5)
        assert not self._step(5)

    def test_half_a_copy_has_not_arrived(self):
        self._step(5000, arrive=False)
        self.hosts[0].values = [5000, NOT_YET]
        assert not plan.way_of(self.x, self.w, FAST, "sm_90").dense
        self.hosts[0].values = [5000, 0]
        assert plan.way_of(self.x, self.w, FAST, "sm_90").dense

    def test_lists_that_always_overflow_are_given_up(self):
        """Few pairs are active, and yet no list holds them: the slowest way there is, were it taken again and again."""
        ways = [self._step(10, overflowed=10) for _ in range(2000)]
        assert not ways[0] and ways[1]
        tries = [at for at, dense in enumerate(ways) if not dense]
        assert len(tries) <= 2 + math.log2(2000 / FIRST_PAUSE)
        # a try is one call, even if its counts take a while
        assert all(later - earlier > FIRST_PAUSE for earlier, later in itertools.pairwise(tries))

    def test_one_try_at_a_time(self):
        assert not self._step(10, overflowed=10)
        while self._step(10, overflowed=10):
            pass
        # that was a try; its counts have arrived, so it pauses again, and the next try's do not come
        while self._step(10, overflowed=10):
            pass
        self.hosts[0].values = [NOT_YET, NOT_YET]
        plan._watches[next(iter(plan._watches))].under_way = True
        assert all(self._step(10, overflowed=10, arrive=False) for _ in range(300))

    def test_lists_come_back_where_they_suffice_again(self):
        ways = [self._step(10, overflowed=10 if at < 100 else 0) for at in range(400)]
        assert sum(ways[:100]) > 80
        assert not any(ways[-100:])

    def test_int8_only_where_a_count_said_that_few_are_active(self, monkeypatch):
        """Of trained rows it takes several times as many for candidates, and a first call may be of such."""
        monkeypatch.setattr(plan, "INT8_ACTIVE", 1e-3)  # 10 pairs
        monkeypatch.setattr(plan, "screens_int8", lambda *_: True)
        assert [self._call(active) for active in (10, 10, 11, 10, 5000, 10, 10)] == [
            "fp16", "int8", "int8", "fp16", "int8", "dense", "int8",
        ]  # fmt: skip

    def test_where_int8_overflows_fp16_goes_on(self, monkeypatch):
        monkeypatch.setattr(plan, "INT8_ACTIVE", 1e-3)
        monkeypatch.setattr(plan, "screens_int8", lambda *_: True)
        ways = [self._call(5, overflowed_int8=3) for _ in range(500)]
        assert "dense" not in ways and 2 < ways.count("int8") <= 2 + math.log2(500 / FIRST_PAUSE)
        ways = [self._call(5) for _ in range(1200)]
        assert set(ways[-100:]) == {"int8"} and "dense" not in ways

    def test_which_calls_may_be_screened_in_int8(self, monkeypatch):
        x, w = torch.empty(10, 512), torch.empty(100_000, 512)
        first = plan.way_of(x, w, FAST, "sm_90")
        assert not first.int8
        plan.learn(first, torch.tensor([3, 0]), 1_000_000)
        self._arrive()
        assert [plan.way_of(x, w, FAST, family).int8 for family in ("sm_90", "sm_120", "sm_80")] == [True, False, True]
        monkeypatch.setattr(plan, "_varies", lambda x: False)
        assert plan.way_of(x, w, FAST, "sm_90") == plan.Way()

    def test_pairs_are_those_of_the_call_that_was_counted(self):
        self._step(20)
        assert not plan.way_of(self.x[:1], self.w, FAST, "sm_90").dense  # a last batch of one sample, 1000 pairs

    def test_kinds_of_calls_do_not_mix(self):
        self._step(5000)
        assert not plan.way_of(self.x, self.w, FAST._replace(filter_eps=2.0**-8), "sm_90").dense
        assert not plan.way_of(self.x, self.w[:500], FAST, "sm_90").dense
        assert plan.way_of(self.x[:7], self.w, FAST, "sm_90").dense  # the last batch of an epoch is of the same kind
        assert plan.way_of(
            self.x, self.w, FAST._replace(s=32.0, b=1.2), "sm_90"
        ).dense  # and so is the next step of a schedule

    def test_a_capture_takes_the_counts_that_have_arrived(self, monkeypatch):
        """They may have after the last call; and what a graph repeats is no try of lists that overflowed."""
        monkeypatch.setattr(plan, "screens_int8", lambda *_: True)
        assert self._call(0) == "fp16" and self._call(0, arrive=False) == "int8"
        self._arrive()
        self.captured = True
        assert self._call(0) == "int8" == self._call(0)
        self.captured = False
        assert self._call(0, overflowed=3) == "int8"
        self.captured = True
        assert {self._call(0) for _ in range(3 * FIRST_PAUSE)} == {"fp16"}
        self.captured = False
        while self._call(0, overflowed=3) != "dense":
            pass
        self.captured = True
        assert {self._call(0) for _ in range(3 * FIRST_PAUSE)} == {"dense"}

    @pytest.mark.parametrize("active, way", [(0, "int8"), (5000, "dense")])
    def test_a_capture_goes_no_way_whose_kernels_are_not_loaded(self, monkeypatch, active, way):
        """CUDA refuses to load them then, and a capture begins with a wait, in which counts arrive."""
        monkeypatch.setattr(plan, "screens_int8", lambda *_: True)
        for expected in ("fp16", way):
            assert self._call(active) == expected
            self.captured = True
            assert self._call(active) == expected
            self.captured = False

    def test_a_capture_keeps_the_way_and_touches_nothing(self):
        """What a graph fixes is what the steps before it asked for; no memory is allocated and no copy is sent."""
        self._step(5000)
        assert self._step(5000)
        before = self.hosts[0].values
        self.captured = True
        assert self._step(5, arrive=False)
        assert self.hosts[0].values == before and self.hosts[0].coming is None
        plan.learn(plan.way_of(self.x, self.w[:500], FAST, "sm_90"), torch.tensor([5, 0]), 5000)
        assert len(self.hosts) == 1

    def test_without_a_filter_nothing_is_watched(self):
        assert plan.way_of(self.x, self.w, EXACT, "sm_90").dense
        plan.learn(plan.way_of(self.x, self.w, EXACT, "sm_90"), torch.tensor([10_000, 10_000]), 10_000)
        assert not plan._watches

    def test_no_event_and_one_allocation(self, monkeypatch):
        """In another thread a graph may be captured, which neither survives."""

        def forbidden(*_, **__):
            raise AssertionError("an event")

        made = []
        monkeypatch.undo()
        monkeypatch.setattr(plan, "_watches", {})
        monkeypatch.setattr(plan, "_host", None)
        monkeypatch.setattr(plan, "_varies", lambda x: True)
        monkeypatch.setattr(plan, "_capturing", lambda x: False)
        monkeypatch.setattr(torch.cuda, "Event", forbidden)
        empty = torch.empty

        def counted(*size, pin_memory, **kw):
            made.append(size)
            return empty(*size, **kw)

        monkeypatch.setattr(plan.torch, "empty", counted)
        weights = [empty(1000 + kind, 4) for kind in range(plan.KINDS + 3)]
        for w in weights:
            plan.learn(plan.way_of(self.x, w, FAST, "sm_90"), torch.tensor([5000, 0]), 10_000)
        assert len(made) == 1 and len(plan._watches) == plan.KINDS
        assert [plan.way_of(self.x, w, FAST, "sm_90").dense for w in weights] == [True] * plan.KINDS + [False] * 3

    def test_threads_that_begin_at_once_have_counts_of_their_own(self, monkeypatch):
        """One of each of two kinds, and two of the same."""
        rows = torch.zeros(plan.KINDS, 2, dtype=torch.int64)

        def slow_host():
            row = rows[len(plan._watches)]
            time.sleep(0.02)  # for another thread
            return row

        monkeypatch.setattr(plan, "_host_counts", slow_host)
        with ThreadPoolExecutor(4) as pool:
            ways = list(pool.map(lambda w: plan.way_of(self.x, w, FAST, "sm_90"), [self.w, self.w[:500]] * 2))
        assert ways[0].watch is ways[2].watch and ways[1].watch is ways[3].watch
        assert len({way.watch.host.data_ptr() for way in ways}) == 2


@pytest.mark.parametrize("where", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "device"])
def test_counts_reach_the_host_wherever_the_first_call_was_made(monkeypatch, where):
    """An evaluation may come before a training, and tensors may have another default device."""
    monkeypatch.setattr(plan, "_host", None)
    monkeypatch.setattr(plan, "_watches", {})
    empty = torch.empty
    with where():
        empty(0)  # PyTorch looks up once which functions take a default device
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **kw: empty(*size, **kw))
        rows = plan._host_counts(), plan._host_counts()  # the one that allocates them all, and a later one
        monkeypatch.undo()
    for host in rows:
        plan.Watch(host).send(torch.tensor([5, 0]), 1000, plan.Way())
        assert host.tolist() == [5, 0]


def test_the_way_follows_nothing_where_it_must_not_vary():
    on_gpu = SimpleNamespace(is_cuda=True)
    assert plan._varies(on_gpu) and not plan._varies(torch.empty(1))
    with FakeTensorMode():
        fake = torch.empty(3, 4, device="cuda")
    assert fake.is_cuda and not plan._varies(fake)
    try:
        torch.use_deterministic_algorithms(True)
        assert not plan._varies(on_gpu)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_call_on_fake_tensors_leaves_nothing_behind(monkeypatch):
    """FakeTensorMode without a compiler: the next real call of that kind must not meet a fake count."""
    monkeypatch.setattr(plan, "_watches", {})
    with FakeTensorMode():
        x, w = torch.empty(10, 4, device="cuda"), torch.empty(100, 4, device="cuda")
        target = torch.empty(10, dtype=torch.int64, device="cuda")
        with device.pretend((9, 0)):
            result = backend.forward(x, w, target, FAST, True, True)
        assert result.row_loss.shape == (10,) and not plan._watches
