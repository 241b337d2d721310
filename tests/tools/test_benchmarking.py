"""What the benchmarks measure with: the check, interleaved timing, counted work, memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
from unittest import mock

import pytest
import torch

from sface_kernels.bench import memory, providers, runner, timing
from sface_kernels.bench.timing import MODES, TimedLoss
from sface_kernels.testing import budget, selfcheck
from sface_kernels.testing.workloads import Case, Shape, make_workload

SMALL = Case(Shape(4, 30, 16), "trained")


def ran_out(x, w, y):
    raise RuntimeError("can't allocate memory: you tried")


def broken(x, w, y):
    raise RuntimeError("no such luck")


def killed(x, w, y):
    os.kill(os.getpid(), signal.SIGKILL)


def test_peak_memory_of_a_process_of_its_own():
    # 4·N·C bytes = 8 MB: the reference makes 21 such tensors and holds 9 at its peak. What the allocator keeps of the
    # others varies from process to process (8 to 15 in all were seen), so the middle of three.
    found = [memory.measure(providers.resolve("reference"), Case(Shape(100, 20_000, 8)), threads=1) for _ in range(3)]
    if found[0].get("error", "").startswith("FileNotFoundError"):
        pytest.skip("this system has no /proc")
    assert 5 * 8e6 < sorted(measured["peak_extra_bytes"] for measured in found)[1] < 21 * 8e6


@pytest.mark.parametrize("optimizer, states", [("sgd", 1), ("head-sgd", 1), ("adamw", 2), ("head-adamw", 2)])
def test_gradients_and_states_are_no_extra_memory_of_a_gpu(monkeypatch, optimizer, states):
    timed = TimedLoss(providers.resolve(f"chunked+{optimizer}"), make_workload(SMALL, "cpu", torch.float32), "step")
    ((x, w),) = timed.leaves
    kept = x.nbytes + w.nbytes * (states + (not optimizer.startswith("head-")))
    for name, value in {"memory_allocated": 100, "max_memory_allocated": 1100 + kept}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert memory.cuda_peak(timed)["peak_extra_bytes"] == pytest.approx(1000, abs=8)  # a counter of steps


def test_kernels_shares_are_of_all():
    timed = TimedLoss(providers.resolve("reference"), make_workload(SMALL, "cpu", torch.float32), "both")
    found = timing.kernel_times(timed)
    assert len(found) == timing.MOST_KERNELS + 1 and found["others"] > 0


@pytest.mark.parametrize("function, out_of_memory", [(ran_out, True), (killed, True), (broken, False)])
def test_memory_that_ran_out_in_the_process_is_told_from_other_failures(function, out_of_memory):
    found = memory.measure(providers.Provider("fake", providers.OPPONENT, "", function), SMALL, threads=1)
    assert found["out_of_memory"] == out_of_memory and ("luck" in found["error"]) != out_of_memory


class Recorder(TimedLoss):
    """On a made-up clock; `seen` are its runs and the ends of its turns."""

    def __init__(self, cuda=False, fails_at=None):
        self.provider, self.cuda, self.fails_at = providers.resolve("reference"), cuda, fails_at
        self.seen, self.seconds, self.failure, self.optimizers = [], [], None, []

    def prepare(self):
        pass

    def run(self):
        if len(self.seen) == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append("run")

    def rest(self):
        self.seen.append("rest")


def clock(run):
    run()
    return 0.001


@pytest.mark.parametrize("copies", [0, 3])
def test_what_gave_back_its_memory_runs_once_untimed(copies):
    """As on a GPU: after the warm-up and after every turn it rests, and the next turn makes its memory again, with
    optimizers that of each copy of the inputs."""
    one = Recorder(cuda=True)
    one.optimizers = [None] * copies
    timing.interleave([one], repeats=4, budget_seconds=60, clock=clock)
    assert one.seconds == [0.001] * 4 * timing.MAX_VISIT
    turn = ["run"] * (max(1, copies) + timing.MAX_VISIT) + ["rest"]
    assert one.seen == turn * (1 + 4)


def test_one_that_fails_while_timed_leaves_the_others():
    large, small = Recorder(fails_at=20), Recorder()
    timing.interleave([large, small], repeats=5, budget_seconds=60, clock=clock)
    assert isinstance(large.failure, torch.OutOfMemoryError) and small.failure is None
    assert len(small.seconds) == 5 * timing.MAX_VISIT


def test_the_budget_ends_the_rounds():
    slow = Recorder()
    timing.interleave([slow], repeats=100, budget_seconds=0.0, clock=clock)
    assert len(slow.seconds) == timing.MIN_ROUNDS * timing.MAX_VISIT


@pytest.mark.parametrize("name", ["careful", "mm-fp32"])
def test_copies_of_the_inputs_take_turns(name):
    data = make_workload(SMALL)
    one, seen = TimedLoss(providers.resolve(name), data, "both", copies=2), []
    for _ in range(3):
        one.prepare()
        one.run()
        seen.append(one.w.data_ptr())
        assert torch.equal(one.w, data.w)
    assert seen[0] == seen[2] != seen[1]


def test_a_graph_is_captured_before_the_clock_starts_and_replayed(monkeypatch):
    """With a stub for CUDA: captured once for each copy of the inputs, again after a rest, gradients not reused."""
    events = []

    @contextlib.contextmanager
    def graph(graph):
        assert one.x.grad is None and one.w.grad is None
        events.append("capture")
        yield

    replayed = functools.partial(mock.Mock, replay=lambda: events.append("replay"))
    stubs = {"Stream": mock.Mock, "current_stream": mock.Mock, "stream": contextlib.nullcontext}
    for attribute, stub in {**stubs, "CUDAGraph": replayed, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, attribute, stub)
    one = TimedLoss(providers.resolve("careful"), make_workload(SMALL), "graph", copies=2)
    one.cuda = True
    for _ in range(3):
        one.prepare()
        events.append("clock")
        one.run()
    one.rest()
    one.prepare()
    assert events == ["capture", "clock", "replay"] * 2 + ["clock", "replay", "capture"]


@pytest.mark.parametrize("mode", MODES)
def test_work_is_counted_as_stated(mode):
    n, c, d = 3, 50, 8

    def work(name, dtype=torch.float32):
        return providers.count(providers.resolve(name), Shape(n, c, d), mode, dtype)

    ncd, inputs = n * c * d, 2 * n * d + 4 * c * d
    loss = work("native", torch.bfloat16)
    assert loss.flop == {"forward": 2, "backward": 4}.get(mode, 6) * ncd
    assert loss.bytes == inputs * (1 if mode in ("forward", "backward") else 2) + 20 * c * d * (mode == "step")
    assert work("mm-bf16") == (2 * ncd, 2 * (n * d + c * d + n * c))
    assert [work("read-w"), work("write-w")] == [(c * d, 4 * (c * d + c)), (0, 4 * c * d)]
    assert providers.Work(10**12, 10**9).rates(500.0) == {"tflops": 2.0, "gb_per_s": 2.0}


@pytest.mark.parametrize("name", ["mm-fp32", "mm-bf16", "mm3-bf16", "read-w"])
def test_bare_operations_give_what_float64_does(name):
    """Within the a-priori bound of sums of D terms in any order."""
    one = TimedLoss(providers.resolve(name), make_workload(SMALL), "both")
    one.prepare()
    one.run()
    x, w = torch.ones(1, 16) if name == "read-w" else one.x, one.w
    exact, scale = (a.double() @ b.double().t() for a, b in ((x, w), (x.abs(), w.abs())))
    assert ((one.y - exact).abs() <= 16 * torch.finfo(one.y.dtype).eps / 2 * scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_that_runs_here_passes_the_check(dtype):
    checker, checked = runner.Checker(make_workload(Case(Shape(16, 300, 64), "trained"), dtype=dtype)), []
    for provider in providers.PROVIDERS.values():
        # a compiled one is the same arithmetic, and takes minutes
        if provider.compiled or provider.kind not in (providers.OPPONENT, providers.PACKAGE):
            continue
        try:
            found = checker.check(provider)
        except providers.Unavailable as reason:
            assert str(reason)
            continue
        assert found["ok"], (provider.name, found)
        checked.append(provider.name)
    assert {"reference", "careful-bf16", "chunked"} <= set(checked)


def test_large_workloads_are_checked_on_fewer_classes(monkeypatch):
    monkeypatch.setattr(runner, "FULL_CHECK_LIMIT", 8 * 16 * 100)
    work = make_workload(Case(Shape(8, 1000, 16), "trained"))
    part = runner.reduced(work)
    assert 50 < part.case.shape.c < 120 and len(part.w) == part.case.shape.c
    assert torch.equal(part.w[part.y], work.w[work.y])
    found = runner.Checker(work).check(providers.resolve("careful"))
    assert found["ok"] and found["classes"] == part.case.shape.c


def test_small_problems_are_small():
    for _, x, w, _ in selfcheck.problems(torch.device("cpu"), torch.float32, small=True):
        assert all(own <= most for own, most in zip((len(x), *w.shape), selfcheck.SMALL, strict=True))


def check_with(monkeypatch, change, dtype=torch.float32):
    """Outcomes of the self-check, what `change` makes of the errors of "chunked" in the place of its own."""

    def errors(truth, x, w, y, backend, filter_eps):
        found = honest(truth, x, w, y, backend, filter_eps)
        return change(found) if backend == "chunked" else found

    honest = budget.package_errors
    monkeypatch.setattr(budget, "package_errors", errors)
    outcomes = list(selfcheck.run(["chunked", "reference"], torch.device("cpu"), dtype))
    assert all(outcome.ok for outcome in outcomes if outcome.backend == "reference")
    return [outcome for outcome in outcomes if outcome.backend == "chunked"]


@pytest.mark.parametrize("wrong", ["loss", "grad_x", "grad_w"])
def test_the_check_sees_an_error_of_a_ten_thousandth(monkeypatch, wrong):
    """The budget has teeth: each result in turn is off by 1e-4 in a backend that is right otherwise."""
    chunked = check_with(monkeypatch, lambda found: found._replace(**{wrong: 1e-4}))
    seen = [outcome for outcome in chunked if not outcome.ok]
    assert len(seen) > 0.8 * len(chunked), f"{len(seen)} of {len(chunked)}"


def test_a_failing_backend_is_over_its_budget(monkeypatch):
    chunked = check_with(monkeypatch, lambda found: broken(None, None, None))
    assert chunked and not any(outcome.ok for outcome in chunked)
    assert chunked[0].failure == "RuntimeError: no such luck" and chunked[0].errors is None


def test_products_of_half_embeddings_have_the_budget_of_autocast(monkeypatch):
    """A backend that multiplies half embeddings as they are may err as the reference under autocast does, with ignored
    rows too, and no more; in float32 nothing changes."""
    monkeypatch.setattr(budget, "MULTIPLIES_IN_HALF", ("chunked",))
    strict = {o.problem: o for o in selfcheck.run(["chunked"], torch.device("cpu"), torch.float32)}
    wide = {o.problem: o for o in selfcheck.run(["chunked"], torch.device("cpu"), torch.bfloat16)}
    for name in ("random 31×101×61", "half the rows ignored"):
        assert strict[name].limits.grad_w < 1e-4 and 1e-3 < wide[name].limits.grad_w < 1
    assert all(outcome.ok for outcome in wide.values())


def test_orders_are_balanced():
    rounds = [timing.balanced_order(["a", "b", "c", "d"], turn) for turn in range(8)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in rounds)
    assert all(len({order.index(name) for order in rounds}) >= 2 for name in "abcd")
    followers = {(left, right) for order in rounds for left, right in itertools.pairwise(order)}
    assert len(followers) >= 8  # of 12 possible: nobody always comes after the same one
