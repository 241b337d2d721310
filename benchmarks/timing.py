"""Interleaved timing: every contestant in turn, in balanced order, medians with quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from . import machine

MAX_WARM_UP = 8  # runs, and
MAX_WARM_UP_SECONDS = 5.0
STEADY = 0.1  # relative difference of two runs in a row that ends the warm-up
VISIT_SECONDS = 0.05  # a contestant runs this long, or MAX_VISIT times, before the next one's turn
MAX_VISIT = 5
MIN_ROUNDS = 3  # even when the budget is spent


class Timed(Protocol):
    """A contestant: `prepare` outside the timed region, then `run` inside it."""

    def prepare(self) -> None: ...

    def run(self) -> None: ...


class Samples:
    """Seconds of each run of each contestant, filled as they come, so that an interrupt loses nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.failures: dict[str, str] = {}
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


def failure_text(error: BaseException) -> str:
    """One line for a report."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200] if lines else ''}".rstrip(": ")


def run_once(contestant: Timed) -> float:
    """Seconds of one run."""
    contestant.prepare()
    start = time.perf_counter()
    contestant.run()
    return time.perf_counter() - start


def warm_up(contestant: Timed) -> None:
    """Runs until two times in a row agree within STEADY, or the limits above."""
    begin, last = time.perf_counter(), run_once(contestant)
    for _ in range(MAX_WARM_UP - 1):
        now = run_once(contestant)
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
    progress: Callable[[str], None] = lambda text: None,
) -> Samples:
    """Times every contestant in `repeats` rounds, or fewer (at least MIN_ROUNDS) to keep to the budget. The
    warm-up does not count in it.

    In its turn a contestant that takes less than VISIT_SECONDS runs once untimed, to have its data in the
    caches as it left them, and then up to MAX_VISIT times. One that raises is dropped with its reason; the
    others go on.
    """
    samples = samples or Samples()
    begin, busy, own = time.perf_counter(), machine.busy_seconds(), machine.own_seconds()
    alive = []
    for name, contestant in contestants.items():
        progress(f"warming up {name}")
        try:
            warm_up(contestant)
            alive.append(name)
        except Exception as error:
            samples.failures[name] = failure_text(error)
    orders, rounds_begin = balanced_orders(alive), time.perf_counter()
    with _no_garbage_collection():
        for done in range(repeats if alive else 0):
            spent = time.perf_counter() - rounds_begin
            if done >= MIN_ROUNDS and spent * (done + 1) / done > budget_seconds:
                break
            progress(f"round {done + 1} of {repeats}, {spent:.0f} s")
            for name in next(orders):
                if name in samples.failures:
                    continue
                try:
                    _visit(contestants[name], samples.seconds.setdefault(name, []))
                except Exception as error:
                    samples.failures[name] = failure_text(error)
    wall = time.perf_counter() - begin
    if busy is not None and wall > 0:
        others = (machine.busy_seconds() or busy) - busy - (machine.own_seconds() - own)
        samples.other_busy_cores = round(max(0.0, others / wall), 3)
    return samples


def _visit(contestant: Timed, seconds: list[float]) -> None:
    if seconds and seconds[-1] < VISIT_SECONDS:
        run_once(contestant)
    spent = 0.0
    for _ in range(MAX_VISIT):
        seconds.append(run_once(contestant))
        spent += seconds[-1]
        if spent >= VISIT_SECONDS:
            return
