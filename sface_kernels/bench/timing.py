"""Providers on a workload, and a clock: all take turns in balanced order; medians with quartiles."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..testing.workloads import Workload
from . import machine
from .providers import BARE, OPTIMIZERS, PACKAGE, LossFunction, Provider, build, read, write

MODES = ("forward", "backward", "both", "step", "graph")
CACHE_FACTOR = 4  # rotated inputs are this many times the L2 cache, so that none is still in it
MAX_COPIES = 16
VISIT_SECONDS, MAX_VISIT = 0.05, 5  # a provider runs this long or often before the next one's turn
MIN_ROUNDS = 3  # even when the budget is spent
MOST_KERNELS, NAME_LENGTH = 12, 60  # that are kept of a run

T = TypeVar("T")
Clock = Callable[[Callable[[], object]], float]  # runs a function and returns its seconds


def copies_for(work: Workload) -> int:
    """How many copies of the inputs take turns: 1 on a CPU, and where one alone overflows a GPU's L2 cache."""
    if work.x.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(work.x.device).L2_cache_size
    return min(MAX_COPIES, max(1, math.ceil(CACHE_FACTOR * cache / (work.x.nbytes + work.w.nbytes))))


class TimedLoss:
    """A provider on copies of a workload that take turns: `prepare` before the clock starts, `run`, and at the end of a
    turn `rest`. A bare operation does the same in every mode; of a loss

    "forward" builds the graph and frees it; "backward" is that of a forward made in `prepare`; "both"; "step" adds
    the provider's optimizer on w; "graph" replays both from a CUDA graph, without what launching takes on the host.

    Where there is a backward, the timed region begins with freeing the last gradients (`zero_grad(set_to_none)`), which
    every training step pays for; the upstream gradient is made beforehand. Opponents get half embeddings as a training
    loop hands them over: converted to float32. A `function` that is given is shared, to be compiled once.
    """

    def __init__(
        self, provider: Provider, work: Workload, mode: str, function: LossFunction | None = None, copies: int = 1
    ) -> None:
        self.provider, self.mode, self.y, device = provider, mode, work.y, work.x.device
        self.cuda, self.upstream = device.type == "cuda", torch.ones((), device=device)
        self.function = function or build(provider, device, work.x.dtype)
        # a head in training has a weight to itself, and what a backend learns of its steps goes by the weight's address
        alone = provider.kind == PACKAGE and not self.cuda
        self.leaves = [[t.clone() if i or alone else t.detach() for t in (work.x, work.w)] for i in range(copies)]
        if provider.kind == BARE:
            self.leaves = [[t.to(provider.dtype) for t in pair] for pair in self.leaves]
            n, (c, d) = len(work.x), work.w.shape
            size = (c,) if self.function is read else (c, d) if self.function is write else (n, c)
            # zeros, so that its pages are there before the first run
            self.y = torch.zeros(size, dtype=provider.dtype, device=device)
        else:
            self.leaves = [[x.requires_grad_(), torch.nn.Parameter(w)] for x, w in self.leaves]
        self.turns = itertools.cycle(range(copies))
        steps = mode == "step" and provider.kind != BARE
        self.optimizers = [OPTIMIZERS[provider.optimizer](w) for _, w in self.leaves if steps]  # type: ignore[arg-type]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.ready: tuple[Tensor, Any] | None = None  # the forward of which "backward" times the rest
        self.seconds: list[float] = []  # of each timed run
        self.failure: Exception | None = None

    def prepare(self) -> None:
        torch.set_float32_matmul_precision(self.provider.precision)
        self.turn = next(self.turns)
        self.x, self.w = self.leaves[self.turn]
        if self.provider.kind == BARE:
            return
        if self.mode == "backward":
            self.ready = self._forward()
        if self.mode == "graph" and self.turn not in self.graphs:
            self.graphs[self.turn] = self._capture()

    def run(self) -> Tensor | None:
        """The loss, where there is one."""
        if self.provider.kind == BARE:
            self.function(self.x, self.w, self.y)
            return None
        if self.mode == "graph":
            self.graphs[self.turn].replay()
            return None
        if self.mode == "forward":
            return self._forward()[0]
        loss = self._backward()
        if self.optimizers:
            self.optimizers[self.turn].step()
        return loss

    def rest(self) -> None:
        """On a GPU gives back what it holds between turns: the gradients of every provider together may not fit.

        On a CPU they stay, as freeing them is a cost of every step there (pages go back to the system).
        """
        self.ready = None
        if self.cuda:
            self.graphs.clear()
            for leaf in itertools.chain(*self.leaves):
                leaf.grad = None
            for optimizer in self.optimizers:
                optimizer.state.clear()

    def _forward(self) -> tuple[Tensor, Any]:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.provider.autocast):
            outputs = self.function(self.x if self.provider.kind == PACKAGE else self.x.float(), self.w, self.y)
        return (outputs, None) if isinstance(outputs, Tensor) else (outputs.loss, outputs)

    def _backward(self) -> Tensor:
        """Of the forward that `prepare` made, or of one made here."""
        self.x.grad = self.w.grad = None
        loss, outputs = self.ready or self._forward()
        self.ready = None
        loss.backward(self.upstream)
        del outputs  # which lived as long as in a training loop that reads them after the step
        return loss.detach()

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._backward()
        torch.cuda.current_stream().wait_stream(side)
        self.x.grad = self.w.grad = None  # so that those of the graph come from its own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._backward()
        return graph


def wall_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Callable[[], object]) -> float:
    """Time between two events on the current stream, launches that the host is late with included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summarise(seconds: list[float]) -> dict[str, Any]:
    """Median, quartiles and range in milliseconds, and the number of runs."""
    ms = sorted(1e3 * value for value in seconds)
    q1, median, q3 = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    samples = [round(1e3 * value, 4) for value in seconds]
    return {"median": median, "q1": q1, "q3": q3, "min": ms[0], "max": ms[-1], "repeats": len(ms), "samples": samples}


def recover_memory() -> None:
    """After a provider ran out of it, so that the others have it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run_once(timed: TimedLoss, clock: Clock = wall_clock) -> float:
    """Seconds of one run."""
    timed.prepare()
    return clock(timed.run)


def settle(timed: TimedLoss) -> None:
    """Runs until what is measured next is what a training does: a call on a GPU may go another way once the counts of
    the first have arrived, and the first call of each way is compiled and verified."""
    for _ in range(3 if timed.cuda else 1):
        run_once(timed)
        if timed.cuda:
            torch.cuda.synchronize()
            timed.rest()
            torch.cuda.empty_cache()  # or buffers of another way lie in what was a gradient, and leave it no room


def kernel_times(timed: TimedLoss, runs: int = 5) -> dict[str, float]:
    """Milliseconds of one run by kernel on a GPU, by operation on a CPU, by torch.profiler: the MOST_KERNELS longest,
    by the beginnings of their names, which templates make long, and what the others take together."""
    settle(timed)
    run_once(timed)  # an optimizer's state
    with profile(activities=[ProfilerActivity.CUDA if timed.cuda else ProfilerActivity.CPU]) as trace:
        for _ in range(runs):
            run_once(timed)
        if timed.cuda:
            torch.cuda.synchronize()
    timed.rest()
    micro = "self_device_time_total" if timed.cuda else "self_cpu_time_total"
    found: dict[str, float] = {}
    for event in trace.key_averages():
        name = event.key[:NAME_LENGTH]
        found[name] = found.get(name, 0.0) + getattr(event, micro) / runs / 1e3
    longest = sorted(found.items(), key=lambda pair: -pair[1])
    shown = [*longest[:MOST_KERNELS], ("others", sum(ms for _, ms in longest[MOST_KERNELS:]))]
    return {name: ms for name, ms in shown if ms > 0}


def _visit(timed: TimedLoss, clock: Clock) -> None:
    """One turn. An untimed run before has the data in the caches as the provider leaves them, and on a GPU makes the
    memory that `rest` gave back, an optimizer's state of every copy among it."""
    if timed.cuda or (timed.seconds and timed.seconds[-1] < VISIT_SECONDS):
        for _ in range(max(1, len(timed.optimizers)) if timed.cuda else 1):
            run_once(timed, clock)
    spent = 0.0
    for _ in range(MAX_VISIT):
        if spent < VISIT_SECONDS:
            timed.seconds.append(run_once(timed, clock))
            spent += timed.seconds[-1]
    timed.rest()


def balanced_order(everybody: list[T], turn: int) -> list[T]:
    """Rotated by one each round and reversed every other one, so that nobody always follows the same neighbour."""
    shift = turn % len(everybody)
    order = everybody[shift:] + everybody[:shift]
    return order[::-1] if turn % 2 else order


def interleave(
    everybody: Sequence[TimedLoss],
    repeats: int,
    budget_seconds: float,
    say: Callable[[str], None] = lambda text: None,
    clock: Clock = wall_clock,
) -> float | None:
    """Times everybody in `repeats` rounds, or fewer (at least MIN_ROUNDS) to keep to the budget, after one that does
    not count. One that raises is left out from there; the others go on. `say` gets what comes next.

    Returns the cores that other processes used meanwhile, or None where the system does not say.
    """

    def attempt(one: TimedLoss) -> None:
        try:
            _visit(one, clock)
        except Exception as error:
            # its traceback holds the frames in which its tensors live
            one.failure = error.with_traceback(None)
            one.rest()
            recover_memory()

    begin, busy = time.perf_counter(), machine.others_seconds()
    for one in everybody:
        say(f"warming up {one.provider.name}")
        attempt(one)
        one.seconds.clear()
    rounds_begin = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for done in range(repeats):
            alive, spent = [one for one in everybody if one.failure is None], time.perf_counter() - rounds_begin
            if not alive or (done >= MIN_ROUNDS and spent * (done + 1) / done > budget_seconds):
                break
            say(f"round {done + 1} of {repeats}")
            for one in balanced_order(alive, done):
                attempt(one)
    finally:
        gc.enable()
    if busy is None:
        return None
    now = machine.others_seconds() or busy
    return round(max(0.0, (now - busy) / max(time.perf_counter() - begin, 1e-9)), 3)
