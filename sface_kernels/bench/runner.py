"""One workload through memory, check and timing: what the commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..testing.failure import failure_text, out_of_memory
from ..testing.workloads import Case, Workload, make_workload
from . import machine, memory, report
from .checking import Checker
from .contestant import copies_for, enter
from .providers import BARE, LossFunction, Provider, Unavailable, build
from .timing import Samples, Timed, clock_for, interleave, recover_memory, summarise
from .work import count, rates

OUT_OF_MEMORY = "out of memory"


class Settings(NamedTuple):
    """How a workload is run. `budget_seconds` holds for each mode's timing, checks and memory not counted."""

    repeats: int = 15
    budget_seconds: float = 60.0
    threads: int = 1
    bf16_products: bool = False
    measure_memory: bool = True
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


class Progress:
    """Where the runner says what it is doing. This one says nothing."""

    def at(self, text: str, step: int) -> None:
        """`step` of the `steps_of` this workload are done."""

    def warn(self, text: str) -> None:
        """Something that the reader of the numbers must know."""


def steps_of(providers: list[Provider], modes: list[str], settings: Settings) -> int:
    """Steps of one workload, as `Progress.at` counts them."""
    once = len(providers) * (2 if settings.measure_memory else 1) + 1
    return once + len(modes) * (len(providers) + settings.repeats)


class _Entry:
    """What is known of one provider on this workload so far."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.status = "ok"
        self.reason: str | None = None
        self.check: dict[str, Any] | None = None
        self.memory: dict[str, Any] | None = None
        self.function: LossFunction | None = None

    def fail(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason


def outcome(error: BaseException) -> tuple[str, str]:
    """Status and reason of a row whose provider raised."""
    return OUT_OF_MEMORY if out_of_memory(error) else "failed", failure_text(error)


def run_case(
    case: Case,
    providers: list[Provider],
    modes: list[str],
    settings: Settings,
    result: dict[str, Any],
    progress: Progress | None = None,
    done: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> None:
    """Appends rows to `result["rows"]`, calling `done` with those of each mode.

    On KeyboardInterrupt the rows timed so far are appended first. Beyond what a provider needs, memory holds
    8·C·D bytes for the float64 result and, on a CPU, 4·C·D for each provider's last gradient (8·C·D with momentum).
    """
    _Run(case, providers, settings, result, progress or Progress()).run(modes, done)


class _Run:
    """One workload: its providers, and how far it has come."""

    def __init__(
        self, case: Case, providers: list[Provider], settings: Settings, result: dict[str, Any], progress: Progress
    ) -> None:
        self.case, self.settings, self.result, self.progress = case, settings, result, progress
        self.entries = [_Entry(provider) for provider in providers]
        self.steps = 0

    def run(self, modes: list[str], done: Callable[[list[dict[str, Any]]], None]) -> None:
        idle = machine.idle_check()
        self.result["idle"].append({"workload": self.case.name, **idle})
        if idle["warning"]:
            self.progress.warn(idle["warning"])
        for entry in self.entries:
            self._measure_memory(entry)
        self.progress.at("making the data", self.steps)
        work = make_workload(self.case, self.settings.device, self.settings.dtype)
        try:
            self._check(work)
            for mode in modes:
                done(self._time(work, mode))
        finally:
            torch.set_float32_matmul_precision("highest")
            if any(entry.provider.compiled for entry in self.entries):
                torch.compiler.reset()

    def _measure_memory(self, entry: _Entry) -> None:
        settings, provider = self.settings, entry.provider
        self.steps += settings.measure_memory
        try:
            entry.function = build(provider, settings.device, settings.dtype)
        except Unavailable as error:
            entry.fail("unavailable", str(error))
            return
        if not settings.measure_memory or provider.kind == BARE:
            return
        self.progress.at(f"memory of {provider.name}", self.steps)
        setting = memory.Setting(settings.threads, str(settings.device), settings.dtype_name, settings.bf16_products)
        entry.memory = memory.measure(provider, self.case, setting)
        if entry.memory.get("out_of_memory"):
            # in this process it would take the others with it
            entry.fail(OUT_OF_MEMORY, entry.memory["error"])

    def _check(self, work: Workload) -> None:
        self.progress.at("float64 result", self.steps)
        checker = Checker(work, self.settings.bf16_products)
        self.steps += 1
        for entry in self.entries:
            self.steps += 1
            if entry.status != "ok":
                continue
            self.progress.at(f"checking {entry.provider.name}", self.steps)
            try:
                entry.check = checker.check(entry.provider, entry.function)
            except Exception as error:
                entry.fail(*outcome(error.with_traceback(None)))
                recover_memory()
                continue
            if not entry.check["ok"]:
                errors = ", ".join(f"{name} {value:.1e}" for name, value in entry.check["errors_beyond_filter"].items())
                entry.fail("wrong", f"errors against float64: {errors}")

    def _time(self, work: Workload, mode: str) -> list[dict[str, Any]]:
        settings, samples, copies = self.settings, Samples(), copies_for(work)
        contestants: dict[str, Timed] = {}
        for entry in self.entries:
            if entry.status != "ok":
                continue
            name = entry.provider.name
            try:
                contestants[name] = enter(entry.provider, work, mode, settings.bf16_products, entry.function, copies)
            except Exception as error:
                samples.failures[name] = error.with_traceback(None)
        try:
            interleave(
                contestants,
                settings.repeats,
                settings.budget_seconds,
                samples,
                lambda text, step: self.progress.at(f"{mode}: {text}", self.steps + step),
                clock_for(settings.device),
            )
        except KeyboardInterrupt:
            self.result["rows"] += self._rows(work, mode, samples, copies, only_timed=True)
            raise
        self.steps += len(self.entries) + settings.repeats
        rows = self._rows(work, mode, samples, copies, only_timed=False)
        self.result["rows"] += rows
        if (samples.other_busy_cores or 0) > machine.BUSY_LIMIT:
            self.progress.warn(f"others used {samples.other_busy_cores:.2f} cores while {mode} was timed")
        return rows

    def _rows(self, work: Workload, mode: str, samples: Samples, copies: int, only_timed: bool) -> list[dict[str, Any]]:
        rows = []
        for entry in self.entries:
            name = entry.provider.name
            failure, seconds = samples.failures.get(name), samples.seconds.get(name)
            status, reason = (entry.status, entry.reason) if failure is None else outcome(failure)
            if status == "ok" and not seconds and only_timed:
                continue
            timed = summarise(seconds) if status == "ok" and seconds else None
            rows.append({**self._row(entry, work, mode, timed, samples, copies), "status": status, "reason": reason})
        report.add_ratios(rows)
        return rows

    def _row(
        self, entry: _Entry, work: Workload, mode: str, timed: dict[str, Any] | None, samples: Samples, copies: int
    ) -> dict[str, Any]:
        case, settings, provider = self.case, self.settings, entry.provider
        stated = count(provider, case.shape, mode, settings.dtype)
        hot = samples.hot.get(provider.name)
        return {
            "workload": case.name,
            **case.shape._asdict(),
            "geometry": case.geometry,
            "seed": case.seed,
            "density_requested": case.density,
            "density": work.density,
            "device": str(settings.device),
            "dtype": settings.dtype_name,
            "mode": mode,
            "provider": provider.name,
            "what": provider.what,
            "check": entry.check,
            "time_ms": timed,
            "hot_ms": summarise(hot) if timed and hot else None,
            "input_copies": copies,
            "work": stated._asdict(),
            "rates": rates(stated, timed["median"]) if timed else None,
            "memory": entry.memory,
            "other_busy_cores": samples.other_busy_cores,
        }
