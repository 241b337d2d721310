"""Peak memory of one forward and backward, each provider in a process of its own.

Reported: the highest resident memory during two runs, less what was resident before them (code and inputs),
less the two gradients that are returned (4·(N + C)·D bytes); at least 0. On Linux the kernel's own
high-water mark is reset before the runs (`/proc/self/clear_refs`), so short peaks count; elsewhere the
process's all-time peak is the only one there is, and the method says so. Before the measurement the
provider runs once on a small problem, so that libraries are loaded; a compiled one runs once in full size,
because a compiler's memory is not the loss's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .providers import Contestant, Provider, resolve
from .timing import failure_text
from .workloads import Case, Shape, make_workload

CHILD_SECONDS = 600
KILLED = -9  # by the kernel, when memory runs out


def measure(
    provider: Provider, case: Case, threads: int, bf16_products: bool = False, mode: str = "both"
) -> dict[str, Any]:
    """Starts the process; returns `peak_extra_bytes`, `method`, `mode`, or `error` and `out_of_memory`."""
    settings = {
        "provider": provider.name,
        "case": [list(case.shape), case.geometry, case.density, case.seed],
        "threads": threads,
        "bf16_products": bf16_products,
        "mode": mode,
    }
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(settings)]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {CHILD_SECONDS} s", "out_of_memory": False}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if done.returncode == KILLED:
        return {"error": "killed, most likely out of memory", "out_of_memory": True}
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    return {"error": reason, "out_of_memory": "alloc" in reason.lower()}


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def _trim_heap() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _all_time_peak() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run(contestant: Contestant, times: int) -> None:
    for _ in range(times):
        contestant.prepare()
        contestant.run()


def _measure_here(provider: Provider, case: Case, mode: str, bf16_products: bool) -> dict[str, Any]:
    small = case._replace(shape=Shape(min(case.shape.n, 64), min(case.shape.c, 512), case.shape.d))
    function = provider.make() if provider.make is not None else None
    if not provider.compiled:
        _run(Contestant(provider, make_workload(small), mode, bf16_products, function), 1)
    work = make_workload(case)
    contestant = Contestant(provider, work, mode, bf16_products, function)
    if provider.compiled:
        _run(contestant, 1)
        contestant.x.grad = contestant.w.grad = None
    _trim_heap()

    method = "VmHWM reset before two runs"
    before = _status_bytes("VmRSS")
    if before is None or not _reset_high_water_mark():
        method, before = "ru_maxrss, a lower bound", _all_time_peak()
    _run(contestant, 2)
    peak = _status_bytes("VmHWM") if method.startswith("VmHWM") else _all_time_peak()
    assert peak is not None
    returned = 0
    if provider.make is not None and mode != "forward":
        returned = sum(t.numel() * t.element_size() for t in (work.x, work.w))
    return {"peak_extra_bytes": max(0, peak - before - returned), "method": method, "mode": mode}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Internal: measures one provider and prints JSON.")
    parser.add_argument("settings", type=json.loads)
    settings = parser.parse_args(arguments).settings
    torch.set_num_threads(settings["threads"])
    shape, geometry, density, seed = settings["case"]
    case = Case(Shape(*shape), geometry, density, seed)
    try:
        found = _measure_here(resolve(settings["provider"]), case, settings["mode"], settings["bf16_products"])
    except Exception as error:
        print(failure_text(error), file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
