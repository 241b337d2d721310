"""One workload through memory, check and timing: what the commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import machine, memory, report
from .checking import Checker
from .providers import Contestant, LossFunction, Provider, Unavailable
from .timing import Samples, Timed, failure_text, interleave, summarise
from .workloads import Case, Workload, make_workload


class Settings(NamedTuple):
    """How a workload is run. `budget_seconds` holds for each mode's timing, checks and memory not counted."""

    repeats: int = 15
    budget_seconds: float = 60.0
    threads: int = 1
    bf16_products: bool = False
    measure_memory: bool = True


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


def run_case(
    case: Case,
    providers: list[Provider],
    modes: list[str],
    settings: Settings,
    result: dict[str, Any],
    progress: Callable[[str], None] = lambda text: None,
    done: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> None:
    """Appends rows to `result["rows"]`, calling `done` with those of each mode.

    On KeyboardInterrupt the rows timed so far are appended first. Beyond what a provider needs, memory holds
    8·C·D bytes for the float64 result and 4·C·D for each provider's last gradient (8·C·D with momentum).
    """
    entries = [_Entry(provider) for provider in providers]
    idle = machine.idle_check()
    result["idle"].append({"workload": case.name, **idle})
    if idle["warning"]:
        progress(f"warning: {idle['warning']}")
    for entry in entries:
        _measure_memory(entry, case, settings, progress)
    progress(f"making {case.name}")
    work = make_workload(case)
    try:
        _check(entries, work, settings, progress)
        for mode in modes:
            rows = _time(entries, work, mode, settings, result, progress)
            done(rows)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.compiler.reset()


def _measure_memory(entry: _Entry, case: Case, settings: Settings, progress: Callable[[str], None]) -> None:
    try:
        if entry.provider.make is not None:
            entry.function = entry.provider.make()
    except Unavailable as error:
        entry.fail("unavailable", str(error))
        return
    if not settings.measure_memory:
        return
    progress(f"memory of {entry.provider.name}")
    entry.memory = memory.measure(entry.provider, case, settings.threads, settings.bf16_products)
    if entry.memory.get("out_of_memory"):
        # in this process it would take the others with it
        entry.fail("out of memory", entry.memory["error"])


def _check(entries: list[_Entry], work: Workload, settings: Settings, progress: Callable[[str], None]) -> None:
    progress("float64 result")
    checker = Checker(work, settings.bf16_products)
    for entry in entries:
        if entry.status != "ok":
            continue
        progress(f"checking {entry.provider.name}")
        try:
            entry.check = checker.check(entry.provider, entry.function)
        except Exception as error:
            entry.fail("failed", failure_text(error))
            continue
        if not entry.check["ok"]:
            errors = ", ".join(f"{name} {value:.1e}" for name, value in entry.check["errors_beyond_filter"].items())
            entry.fail("wrong", f"errors against float64: {errors}")


def _time(
    entries: list[_Entry],
    work: Workload,
    mode: str,
    settings: Settings,
    result: dict[str, Any],
    progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    contestants: dict[str, Timed] = {}
    broken: dict[str, str] = {}
    for entry in entries:
        if entry.status == "ok":
            try:
                contestants[entry.provider.name] = Contestant(
                    entry.provider, work, mode, settings.bf16_products, entry.function
                )
            except Exception as error:
                broken[entry.provider.name] = failure_text(error)
    samples = Samples()
    samples.failures.update(broken)
    try:
        interleave(
            contestants,
            settings.repeats,
            settings.budget_seconds,
            samples,
            lambda text: progress(f"{mode}: {text}"),
        )
    except KeyboardInterrupt:
        result["rows"] += _rows(entries, work, mode, samples, only_timed=True)
        raise
    rows = _rows(entries, work, mode, samples, only_timed=False)
    result["rows"] += rows
    if (samples.other_busy_cores or 0) > machine.BUSY_LIMIT:
        progress(f"warning: others used {samples.other_busy_cores:.2f} cores while {mode} was timed")
    return rows


def _rows(entries: list[_Entry], work: Workload, mode: str, samples: Samples, only_timed: bool) -> list[dict[str, Any]]:
    case, rows = work.case, []
    for entry in entries:
        name = entry.provider.name
        failure, seconds = samples.failures.get(name), samples.seconds.get(name)
        status, reason = (entry.status, entry.reason) if failure is None else ("failed", failure)
        if status == "ok" and not seconds and only_timed:
            continue
        rows.append(
            {
                "workload": case.name,
                **case.shape._asdict(),
                "geometry": case.geometry,
                "seed": case.seed,
                "density_requested": case.density,
                "density": work.density,
                "mode": mode,
                "provider": name,
                "what": entry.provider.what,
                "status": status,
                "reason": reason,
                "check": entry.check,
                "time_ms": summarise(seconds) if status == "ok" and seconds else None,
                "memory": entry.memory,
                "other_busy_cores": samples.other_busy_cores,
            }
        )
    report.add_ratios(rows)
    return rows
