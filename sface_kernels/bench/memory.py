"""Peak memory of one forward and backward, each provider in a process of its own.

Reported: the most memory during two runs, less what was there before them (code and inputs), less the two gradients
that are returned; at least 0. On a GPU that is what PyTorch's allocator handed out. On a CPU it is resident memory: on
Linux the kernel's own high-water mark is reset before the runs (`/proc/self/clear_refs`), so short peaks count;
elsewhere the process's all-time peak is the only one there is, and the method says so. Before the measurement the
provider runs once on a small problem, so that libraries are loaded; a compiled one runs once in full size, because a
compiler's memory is not the loss's.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..testing.failure import failure_text, out_of_memory
from ..testing.workloads import Case, Shape, make_workload
from .contestant import Contestant
from .providers import Provider, build, resolve

CHILD_SECONDS = 600
KILLED = -9  # by the kernel, when memory runs out
OUT_OF_MEMORY = 3  # exit status of the process


class Setting(NamedTuple):
    """What is measured, besides the provider and the case."""

    threads: int
    device: str = "cpu"
    dtype: str = "float32"
    bf16_products: bool = False
    mode: str = "both"


def measure(provider: Provider, case: Case, setting: Setting) -> dict[str, Any]:
    """Starts the process; returns `peak_extra_bytes`, `method`, `mode`, or `error` and `out_of_memory`."""
    described = {"provider": provider.name, "case": [list(case.shape), *case[1:]], "setting": list(setting)}
    command = [sys.executable, "-m", "sface_kernels.bench.memory", json.dumps(described)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CHILD_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {CHILD_SECONDS} s", "out_of_memory": False}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if done.returncode == KILLED:
        return {"error": "killed, most likely out of memory", "out_of_memory": True}
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
    return {"error": reason, "out_of_memory": done.returncode == OUT_OF_MEMORY}


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


def _measure_here(provider: Provider, case: Case, setting: Setting) -> dict[str, Any]:
    device, dtype, mode = torch.device(setting.device), getattr(torch, setting.dtype), setting.mode
    if device.type == "cuda":
        torch.cuda.set_device(device)
    small = case._replace(shape=Shape(min(case.shape.n, 64), min(case.shape.c, 512), case.shape.d))
    function = build(provider, device, dtype)

    def contestant(case: Case) -> Contestant:
        return Contestant(provider, make_workload(case, device, dtype), mode, setting.bf16_products, function)

    if not provider.compiled:
        _run(contestant(small), 1)
    measured = contestant(case)
    if provider.compiled:
        _run(measured, 1)
        measured.now.x.grad = measured.now.w.grad = None
    returned = 0
    if mode != "forward":
        returned = sum(t.numel() * t.element_size() for t in (measured.now.x, measured.now.w))
    peak, method = (_cuda_peak if device.type == "cuda" else _cpu_peak)(measured)
    return {"peak_extra_bytes": max(0, peak - returned), "method": method, "mode": mode}


def _cuda_peak(contestant: Contestant) -> tuple[int, str]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _run(contestant, 2)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, "max_memory_allocated over two runs"


def _cpu_peak(contestant: Contestant) -> tuple[int, str]:
    _trim_heap()
    method = "VmHWM reset before two runs"
    before = _status_bytes("VmRSS")
    if before is None or not _reset_high_water_mark():
        method, before = "ru_maxrss, a lower bound", _all_time_peak()
    _run(contestant, 2)
    peak = _status_bytes("VmHWM") if method.startswith("VmHWM") else _all_time_peak()
    assert peak is not None
    return peak - before, method


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Internal: measures one provider and prints JSON.")
    parser.add_argument("settings", type=json.loads)
    settings = parser.parse_args(arguments).settings
    setting = Setting(*settings["setting"])
    torch.set_num_threads(setting.threads)
    shape, *others = settings["case"]
    try:
        found = _measure_here(resolve(settings["provider"]), Case(Shape(*shape), *others), setting)
    except Exception as error:
        print(failure_text(error), file=sys.stderr)
        return OUT_OF_MEMORY if out_of_memory(error) else 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
