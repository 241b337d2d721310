"""Interleaved timing: every contestant in turn, in balanced order, medians with quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import machine

MAX_WARM_UP = 8  # runs, and
MAX_WARM_UP_SECONDS = 5.0
STEADY = 0.1  # relative difference of two runs in a row that ends the warm-up
VISIT_SECONDS = 0.05  # a contestant runs this long, or MAX_VISIT times, before the next one's turn
MAX_VISIT = 5
MIN_ROUNDS = 3  # even when the budget is spent


class Timed:
    """A contestant: `prepare` outside the timed region, then `run` inside it."""

    rotates = False  # whether `prepare` changes to other inputs each time, unless `hot`
    hot = False
    rests = False  # whether `rest` gave back what the first run of the next turn must make again

    def prepare(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        raise NotImplementedError

    def rest(self) -> None:
        """At the end of a turn."""


Clock = Callable[[Callable[[], None]], float]  # runs a function and returns its seconds


def wall_clock(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class CudaClock:
    """Time between two events on the current stream, launches that the host is late with included."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device)  # whose stream the events are recorded on
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[], None]) -> float:
        self.start.record()
        run()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else wall_clock


class Samples:
    """Seconds of each run of each contestant, filled as they come, so that an interrupt loses nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.hot: dict[str, list[float]] = {}  # with the same inputs again and again, where they rotate
        self.failures: dict[str, BaseException] = {}
        self.other_busy_cores: float | None = None  # cores that other processes used meanwhile


def summarise(seconds: list[float]) -> dict[str, Any]:
    """Median, quartiles and range in milliseconds, and the number of runs."""
    ms = sorted(1e3 * value for value in seconds)
    q1, median, q3 = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else ms * 3
    return {
        "median": median,
        "q1": q1,
        "q3": q3,
        "min": ms[0],
        "max": ms[-1],
        "repeats": len(ms),
        "samples": [round(1e3 * value, 4) for value in seconds],
    }


def recover_memory() -> None:
    """After a provider ran out of it, so that the others have it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def run_once(contestant: Timed, clock: Clock = wall_clock) -> float:
    """Seconds of one run."""
    contestant.prepare()
    return clock(contestant.run)


def warm_up(contestant: Timed, clock: Clock = wall_clock) -> None:
    """Runs until two times in a row agree within STEADY, or the limits above."""
    begin, last = time.perf_counter(), run_once(contestant, clock)
    for _ in range(MAX_WARM_UP - 1):
        now = run_once(contestant, clock)
        steady, last = abs(now - last) <= STEADY * last, now
        if steady or time.perf_counter() - begin > MAX_WARM_UP_SECONDS:
            return


def balanced_orders(names: list[str]) -> Iterator[list[str]]:
    """Endless orders: rotated by one each round and reversed every other round, so that nobody always follows
    the same neighbour."""
    shift = 0
    while names:
        order = names[shift % len(names) :] + names[: shift % len(names)]
        yield order[::-1] if shift % 2 else order
        shift += 1


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    contestants: dict[str, Timed],
    repeats: int,
    budget_seconds: float,
    samples: Samples | None = None,
    progress: Callable[[str, int], None] = lambda text, steps: None,
    clock: Clock = wall_clock,
) -> Samples:
    """Times every contestant in `repeats` rounds, or fewer (at least MIN_ROUNDS) to keep to the budget. The
    warm-up does not count in it.

    In its turn a contestant that takes less than VISIT_SECONDS runs once untimed, to have its data in the
    caches as it left them, and then up to MAX_VISIT times. One that raises is dropped with its reason; the
    others go on. `progress` gets what comes next and how many of the len(contestants) + repeats steps are done.
    """
    samples = samples or Samples()
    begin, busy, own = time.perf_counter(), machine.busy_seconds(), machine.own_seconds()
    alive = []
    for done, name in enumerate(list(contestants)):
        progress(f"warming up {name}", done)
        try:
            warm_up(contestants[name], clock)
            contestants[name].rest()
            alive.append(name)
        except Exception as error:
            _drop(name, error, contestants, samples)
    orders, rounds_begin = balanced_orders(alive), time.perf_counter()
    with _no_garbage_collection():
        for done in range(repeats if alive else 0):
            spent = time.perf_counter() - rounds_begin
            if done >= MIN_ROUNDS and spent * (done + 1) / done > budget_seconds:
                break
            progress(f"round {done + 1} of {repeats}", len(alive) + done)
            for name in next(orders):
                if name not in contestants:
                    continue
                try:
                    _visit(name, contestants[name], samples, clock)
                except Exception as error:
                    _drop(name, error, contestants, samples)
    wall = time.perf_counter() - begin
    if busy is not None and wall > 0:
        others = (machine.busy_seconds() or busy) - busy - (machine.own_seconds() - own)
        samples.other_busy_cores = round(max(0.0, others / wall), 3)
    return samples


def _drop(name: str, error: Exception, contestants: dict[str, Timed], samples: Samples) -> None:
    # its traceback holds the frames in which its tensors live
    samples.failures[name] = error.with_traceback(None)
    del contestants[name]
    recover_memory()


def _visit(name: str, contestant: Timed, samples: Samples, clock: Clock) -> None:
    seconds = samples.seconds.setdefault(name, [])
    if contestant.rests or (seconds and seconds[-1] < VISIT_SECONDS):
        run_once(contestant, clock)
    _runs(contestant, seconds, clock)
    if contestant.rotates:
        contestant.hot = True
        try:
            run_once(contestant, clock)
            _runs(contestant, samples.hot.setdefault(name, []), clock)
        finally:
            contestant.hot = False
    contestant.rest()


def _runs(contestant: Timed, seconds: list[float], clock: Clock) -> None:
    spent = 0.0
    for _ in range(MAX_VISIT):
        seconds.append(run_once(contestant, clock))
        spent += seconds[-1]
        if spent >= VISIT_SECONDS:
            return
