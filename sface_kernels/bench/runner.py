"""One workload through memory, the check against float64, and timing: what the commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..precision import kept
from ..testing import budget
from ..testing.failure import failure_text, out_of_memory
from ..testing.truth import Errors, Truth, compute_truth, measure_errors
from ..testing.workloads import Case, Workload, make_workload
from . import memory, report
from .providers import BARE, CONTEXT, LossFunction, Provider, Unavailable, build, count
from .report import Row
from .timing import TimedLoss, copies_for, cuda_clock, interleave, kernel_times, recover_memory, summarise, wall_clock

FULL_CHECK_LIMIT = 1.5e10  # N·C·D up to which all classes are checked; float64 takes some 10 s there on a CPU
OPPONENT_LIMIT = 1e-4  # relative error of float32 arithmetic as people write it
BF16_LIMIT = 0.5  # products in bf16 move cosines by 1e-3, which k = 80 blows up: it only tells right from wrong


class RunSettings(NamedTuple):
    """How a workload is run. `budget_seconds` holds for each mode's timing, checks and memory not counted."""

    repeats: int = 15
    budget_seconds: float = 60.0
    threads: int = 1
    measure_memory: bool = True
    kernels: bool = False  # whether the time of each kernel is taken
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


def reduced(work: Workload) -> Workload:
    """The workload, or where it is large one with fewer classes: the targets' and evenly spaced others."""
    shape = work.case.shape
    keep = int(FULL_CHECK_LIMIT / (shape.n * shape.d))
    if shape.c <= keep:
        return work
    spaced = torch.arange(0, shape.c, -(-shape.c // keep), device=work.y.device)
    classes = torch.cat([work.y, spaced]).unique()
    case = work.case._replace(shape=shape._replace(c=len(classes)))
    return Workload(case, work.x, work.w[classes], torch.searchsorted(classes, work.y), work.density)


class Checker:
    """Float64 results of a workload, and what the reference makes of it."""

    def __init__(self, work: Workload) -> None:
        self.work = reduced(work)
        self.last: tuple[float, Truth, Errors] | None = None  # for the last filter asked for

    def check(self, provider: Provider, function: LossFunction | None = None) -> dict[str, Any]:
        """`ok`, the number of classes checked, errors against the float64 result with the provider's filter, and their
        limits. Raises what the provider raises."""
        x, w, y = self.work.x, self.work.w, self.work.y
        filter_eps = provider.filter_for(x.dtype, x.shape[1])
        if self.last is None or self.last[0] != filter_eps:
            truth = compute_truth(x, w, y, filter_eps)
            self.last = filter_eps, truth, budget.package_errors(truth, x, w, y, "reference", filter_eps)
        _, truth, reference = self.last
        if provider.backend is not None:
            limits = budget.limits(truth, reference, x, w, y, provider.backend)
        else:
            limit = BF16_LIMIT if provider.autocast or provider.precision == "medium" else OPPONENT_LIMIT
            limits = Errors(limit, limit + torch.finfo(x.dtype).eps, limit)  # ∂x is stored in x's dtype
        timed = TimedLoss(provider, self.work, "both", function)
        timed.prepare()
        found: Any = timed.run(), timed.x.grad, timed.w.grad
        errors = measure_errors(truth, *found)
        ok = all(error <= limit for error, limit in zip(errors, limits, strict=True))
        about = {"classes": self.work.case.shape.c, "errors": errors._asdict(), "limits": limits._asdict()}
        return {"ok": ok, **about}


class _Entry:
    """A provider on a workload, and what its rows say."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.function: LossFunction | None = None
        known = {"provider": provider.name, "what": provider.what, "status": "ok"}
        self.row: Row = {**known, "reason": None, "check": None, "memory": None, "kernels": None}

    @property
    def ok(self) -> bool:
        return self.row["status"] == "ok"

    def fails(self, status: str, reason: str) -> None:
        self.row.update(status=status, reason=reason)

    def raised(self, error: Exception) -> None:
        if self.ok:
            self.fails("out of memory" if out_of_memory(error) else "failed", failure_text(error))
        error.with_traceback(None)  # which holds the frames in which its tensors live
        recover_memory()

    def build(self, case: Case, settings: RunSettings, say: Callable[[str], None]) -> None:
        """Makes what is timed, and measures its memory."""
        provider = self.provider
        try:
            self.function = build(provider, settings.device, settings.dtype)
        except Unavailable as error:
            self.fails("unavailable", str(error))
            return
        if settings.measure_memory and provider.kind != BARE and settings.device.type == "cpu":
            say(f"memory of {provider.name}")
            self.row["memory"] = found = memory.measure(provider, case, settings.threads, settings.dtype)
            if found.get("out_of_memory"):
                # in this process it would take the others with it
                self.fails("out of memory", found["error"])

    def check(self, checker: Checker) -> None:
        """Against float64, where it is an SFace loss: floors and other losses are PyTorch's own operations."""
        if self.provider.kind in (BARE, CONTEXT):
            return
        self.row["check"] = found = checker.check(self.provider, self.function)
        if not found["ok"]:
            errors = ", ".join(f"{name} {value:.1e}" for name, value in found["errors"].items())
            self.fails("wrong", f"errors against float64: {errors}")

    def look_into(self, work: Workload, settings: RunSettings) -> None:
        """Its kernels, and on a GPU its memory; with an optimizer of the head those of a whole step."""
        mode = "step" if self.provider.optimizer.startswith("head-") else "both"
        if settings.kernels:
            self.row["kernels"] = kernel_times(TimedLoss(self.provider, work, mode, self.function))
        if settings.measure_memory and settings.device.type == "cuda" and self.provider.kind != BARE:
            self.row["memory"] = memory.cuda_peak(TimedLoss(self.provider, work, mode, self.function))

    def attempt(self, what: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns; where it raises, the rows say so."""
        try:
            return what(*arguments) if self.ok else None
        except Exception as error:
            self.raised(error)


def run_case(
    case: Case,
    providers: list[Provider],
    modes: list[str],
    settings: RunSettings,
    result: dict[str, Any],
    say: Callable[[str], None] = lambda text: None,
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> None:
    """Appends rows to `result["rows"]`, calling `done` with those of each mode. `say` gets what is done next.

    Beyond what a provider needs, memory holds 8·C·D bytes for the float64 result and, on a CPU, 4·C·D for each
    provider's last gradient (8·C·D with momentum).
    """
    entries, work = [_Entry(provider) for provider in providers], None
    for entry in entries:
        entry.build(case, settings, say)
    try:
        say("making the data and their float64 result")
        work = make_workload(case, settings.device, settings.dtype)
        checker = Checker(work)
        for entry in entries:
            say(f"checking {entry.provider.name}")
            entry.attempt(entry.check, checker)
            entry.attempt(entry.look_into, work, settings)
        del checker
    except Exception as error:
        if not out_of_memory(error):
            raise
        for entry in entries:
            entry.raised(error)
    try:
        for mode in modes:
            with kept():
                rows = _time(entries, work, case, mode, settings, say)
            result["rows"] += rows
            done(rows)
    finally:
        if any(provider.compiled for provider in providers):
            torch.compiler.reset()


def _time(
    entries: list[_Entry],
    work: Workload | None,
    case: Case,
    mode: str,
    settings: RunSettings,
    tell: Callable[[str], None],
) -> list[Row]:
    """A row for each entry."""

    def say(text: str) -> None:
        tell(f"{mode}: {text}")

    copies, clock = copies_for(work) if work else 1, cuda_clock if settings.device.type == "cuda" else wall_clock
    timed = [entry.attempt(TimedLoss, entry.provider, work, mode, entry.function, copies) for entry in entries]
    others = interleave([one for one in timed if one], settings.repeats, settings.budget_seconds, say, clock)
    rows = []
    for entry, one in zip(entries, timed, strict=True):
        if one and one.failure:
            entry.raised(one.failure)
        times = summarise(one.seconds) if entry.ok else None
        stated = count(entry.provider, case.shape, mode, settings.dtype)
        row = {
            **{"workload": case.name, **case.shape._asdict(), "geometry": case.geometry, "seed": case.seed},
            **{"density_requested": case.density, "density": work.density if work else None, "input_copies": copies},
            **{"device": str(settings.device), "dtype": str(settings.dtype).removeprefix("torch."), "mode": mode},
            **{"work": stated._asdict(), "rates": stated.rates(times["median"]) if times else None, "time_ms": times},
        }
        rows.append({**row, **entry.row, "other_busy_cores": others})
    report.add_ratios(rows)
    return rows
