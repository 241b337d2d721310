"""What the benchmarks measure with: the check, interleaved timing, counted work, memory."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from sface_kernels.bench import memory, providers, timing, work
from sface_kernels.bench.checking import Checker
from sface_kernels.bench.contestant import MODES, enter
from sface_kernels.testing import failure, selfcheck
from sface_kernels.testing.workloads import (
    Case,
    Shape,
    make_workload,
)


def test_opponents_alone_get_bf16_products():
    work = make_workload(Case(Shape(4, 30, 16)))
    for name, expected in (("careful", "medium"), ("mm-fp32", "medium"), ("chunked", "highest")):
        assert enter(providers.resolve(name), work, "both", True).precision == expected


def test_peak_memory_of_a_process_of_its_own():
    # 4·N·C bytes = 8 MB: the reference makes 21 such tensors and holds 9 at its peak. What the allocator keeps of the
    # others varies from process to process (8 to 15 in all were seen), so the middle of three.
    case, setting = Case(Shape(100, 20_000, 8)), memory.Setting(threads=1)
    found = [memory.measure(providers.resolve("reference"), case, setting) for _ in range(3)]
    assert all(measured.get("error") is None for measured in found)
    if found[0]["method"].startswith("VmHWM"):
        assert 5 * 8e6 < sorted(measured["peak_extra_bytes"] for measured in found)[1] < 21 * 8e6


def test_a_killed_process_counts_as_out_of_memory(monkeypatch):
    class Done:
        returncode, stdout, stderr = memory.KILLED, "", ""

    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: Done)
    found = memory.measure(providers.resolve("reference"), Case(Shape(4, 30, 16)), memory.Setting(threads=1))
    assert found["out_of_memory"]


def test_memory_that_ran_out_in_the_process_is_told_from_other_failures(monkeypatch):
    case, setting = Case(Shape(4, 30, 16)), memory.Setting(threads=1)
    for error, expected in ((RuntimeError("can't allocate memory: you tried"), True), (RuntimeError("broken"), False)):
        monkeypatch.setattr(memory, "_measure_here", lambda *args, error=error: (_ for _ in ()).throw(error))
        described = {"provider": "careful", "case": [list(case.shape), *case[1:]], "setting": list(setting)}
        status = memory.main([json.dumps(described)])
        assert (status == memory.OUT_OF_MEMORY) == expected and status != 0
    assert failure.out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and failure.out_of_memory(MemoryError())


class Recorder(timing.Timed):
    """A contestant on a made-up clock, that notes which inputs each run had and whether its turn had ended."""

    def __init__(self, copies=3, fails_at=None):
        self.rotates, self.rests = copies > 1, copies > 1
        self.turns, self.at, self.seen, self.fails_at = itertools.cycle(range(copies)), 0, [], fails_at

    def prepare(self):
        self.at = self.at if self.hot else next(self.turns)

    def run(self):
        if len(self.seen) == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append((self.at, self.hot))

    def rest(self):
        self.seen.append("rest")


def test_inputs_rotate_and_hot_runs_stand_beside():
    """As on a GPU, with a clock of its own: cold runs never have the inputs of the run before, hot ones always do."""
    one = Recorder()

    def clock(run):
        run()
        return 0.001 if one.hot else 0.002

    samples = timing.interleave({"one": one}, repeats=4, budget_seconds=60, clock=clock)
    assert set(samples.seconds["one"]) == {0.002} and set(samples.hot["one"]) == {0.001}
    for before, after in itertools.pairwise(one.seen):
        if "rest" in (before, after) or before[1] != after[1]:
            continue
        assert (before[0] == after[0]) == after[1]
    assert one.seen.count("rest") == 1 + 4  # after the warm-up and after every turn


def test_memory_that_runs_out_while_timing_leaves_the_others():
    def clock(run):
        run()
        return 0.001

    contestants = {"large": Recorder(fails_at=20), "small": Recorder()}
    samples = timing.interleave(contestants, repeats=5, budget_seconds=60, clock=clock)
    assert failure.out_of_memory(samples.failures["large"]) and list(samples.failures) == ["large"]
    assert len(samples.seconds["small"]) == 5 * timing.MAX_VISIT


def test_contestants_rotate_their_own_copies():
    data = make_workload(Case(Shape(4, 30, 16), "trained"))
    for name in ("careful", "mm-fp32"):
        one = enter(providers.resolve(name), data, "both", copies=2)
        seen = []
        for hot in (False, False, True, False):
            one.hot = hot
            one.prepare()
            one.run()
            seen.append(one.now[1] if name == "mm-fp32" else one.now.w)
        pointers = [w.data_ptr() for w in seen]
        assert pointers[0] != pointers[1] == pointers[2] != pointers[3] == pointers[0]
        assert all(torch.equal(w, data.w) for w in seen)


@pytest.mark.parametrize("mode", MODES)
def test_work_is_counted_as_stated(mode):
    n, c, d = 3, 50, 8
    loss = work.count(providers.resolve("native"), Shape(n, c, d), mode, torch.bfloat16)
    product = work.count(providers.resolve("mm-bf16"), Shape(n, c, d), mode, torch.bfloat16)
    ncd, inputs = n * c * d, 2 * n * d + 4 * c * d
    assert loss.flop == {"forward": 2, "backward": 4, "both": 6, "step": 6}[mode] * ncd
    assert loss.bytes == inputs * (1 if mode in ("forward", "backward") else 2) + 20 * c * d * (mode == "step")
    assert product == (2 * ncd, 2 * (n * d + c * d + n * c))
    bare = [work.count(providers.resolve(name), Shape(n, c, d), mode, torch.float32) for name in ("read-w", "write-w")]
    assert bare == [(c * d, 4 * (c * d + c)), (0, 4 * c * d)]
    assert work.rates(work.Work(10**12, 10**9), 500.0) == {"tflops": 2.0, "gb_per_s": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_that_runs_here_passes_the_check(dtype):
    data = make_workload(Case(Shape(16, 300, 64), "trained"), dtype=dtype)
    checker = Checker(data)
    checked = []
    for provider in providers.PROVIDERS.values():
        if provider.compiled:  # the same arithmetic, and minutes of compiling
            continue
        try:
            function = providers.build(provider, torch.device("cpu"), dtype)
        except providers.Unavailable as reason:
            assert str(reason)
            continue
        found = checker.check(provider, function)
        assert found["ok"], (provider.name, found)
        checked.append(provider.name)
    assert {"reference", "careful-bf16", "chunked", "mm-fp32", "mm-bf16", "read-w", "write-w"} <= set(checked)


@pytest.mark.parametrize("wrong", ["loss", "grad_x", "grad_w"])
def test_the_check_sees_an_error_of_a_ten_thousandth(monkeypatch, wrong):
    """The budget has teeth: each result in turn is off by 1e-4 in a backend that is right otherwise."""

    def errors(truth, x, w, y, backend, filter_eps):
        found = honest(truth, x, w, y, backend, filter_eps)
        return found._replace(**{wrong: 1e-4}) if backend == "chunked" else found

    honest = selfcheck.package_errors
    monkeypatch.setattr(selfcheck, "package_errors", errors)
    outcomes = list(selfcheck.run(["chunked", "reference"], torch.device("cpu"), torch.float32))
    chunked, others = ([o for o in outcomes if (o.backend == "chunked") == own] for own in (True, False))
    assert all(outcome.ok for outcome in others)
    seen = [outcome for outcome in chunked if not outcome.ok]
    assert len(seen) > 0.8 * len(chunked), f"{len(seen)} of {len(chunked)}"


def test_products_of_half_embeddings_have_the_budget_of_autocast(monkeypatch):
    """A backend that multiplies half embeddings as they are may err as the reference under autocast does, with ignored
    rows too, and no more; in float32 nothing changes."""
    monkeypatch.setattr(selfcheck, "HALF_PRODUCTS", ("chunked",))
    strict = {o.problem: o for o in selfcheck.run(["chunked"], torch.device("cpu"), torch.float32)}
    wide = {o.problem: o for o in selfcheck.run(["chunked"], torch.device("cpu"), torch.bfloat16)}
    for name in ("random 31×101×61", "half the rows ignored"):
        assert strict[name].limits.grad_w < 1e-4 and 1e-3 < wide[name].limits.grad_w < 1
    assert all(outcome.ok for outcome in wide.values())


def test_a_failing_backend_is_over_its_budget(monkeypatch):
    def errors(truth, x, w, y, backend, filter_eps):
        if backend == "chunked":
            raise RuntimeError("no such luck")
        return honest(truth, x, w, y, backend, filter_eps)

    honest = selfcheck.package_errors
    monkeypatch.setattr(selfcheck, "package_errors", errors)
    outcomes = list(selfcheck.run(["chunked"], torch.device("cpu"), torch.float32))
    assert outcomes and not any(outcome.ok for outcome in outcomes)
    assert outcomes[0].failure == "RuntimeError: no such luck" and outcomes[0].as_json()["errors"] is None


def test_small_problems_are_small():
    for problem in selfcheck.problems(torch.device("cpu"), torch.float32, small=True):
        assert len(problem.x) <= selfcheck.SMALL.n and problem.w.numel() <= selfcheck.SMALL.c * selfcheck.SMALL.d


def test_orders_are_balanced():
    names = ["a", "b", "c", "d"]
    rounds = list(itertools.islice(timing.balanced_orders(names), 8))
    assert all(sorted(order) == names for order in rounds)
    for name in names:
        assert len({order.index(name) for order in rounds}) >= 2
    followers = {(left, right) for order in rounds for left, right in itertools.pairwise(order)}
    assert len(followers) >= 8  # of 12 possible: nobody always comes after the same one


def test_summary_in_milliseconds():
    summary = timing.summarise([0.004, 0.001, 0.002, 0.003, 0.005])
    assert [summary[key] for key in ("min", "q1", "median", "q3", "max")] == pytest.approx([1, 2, 3, 4, 5])
    assert timing.summarise([0.002])["median"] == pytest.approx(2)


def test_the_budget_ends_the_rounds():
    class Slow(timing.Timed):
        def prepare(self):
            pass

        def run(self):
            timing.time.sleep(0.06)

    samples = timing.interleave({"slow": Slow()}, repeats=100, budget_seconds=0.1)
    assert len(samples.seconds["slow"]) == timing.MIN_ROUNDS
