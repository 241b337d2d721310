"""What a reader of a result needs: processor, memory, settings, versions, commit, and whether it was idle."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "bf16", "sve")
ENV_NAMES = ("THP_MEM_ALLOC_ENABLE", "LD_PRELOAD", "TORCHINDUCTOR_CPP_WRAPPER", "ATEN_CPU_CAPABILITY")
ENV_PREFIXES = ("OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "SFACE_", "DNNL_", "ONEDNN_")
BUSY_LIMIT = 0.1  # cores that others may use before a machine counts as not idle


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpu_info(*names: str) -> str | None:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return None


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """The machine: `memory_bytes` in bytes, `thp` the kernel's setting of transparent huge pages, `gpu` the device
    that is measured, or None for a CPU."""
    flags = set((_cpu_info("flags", "Features") or "").split())
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(f"{index}/type").strip()
        if kind in ("Data", "Unified"):
            caches[f"L{_read(f'{index}/level').strip()}"] = _read(f"{index}/size").strip()
    memory = [line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    thp = _read("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cpu_family_model": [_cpu_info("cpu family"), _cpu_info("model")],
        "cores": os.cpu_count(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "caches": caches,
        "memory_bytes": int(memory[0]) * 1024 if memory else None,
        "thp": thp[thp.find("[") + 1 : thp.find("]")] if "[" in thp else None,
        "system": f"{platform.system()} {platform.release()}",
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16_products_change_fp32_mm": _bf16_products_apply(),
        "gpu": gpu_facts(device) if device is not None and device.type == "cuda" else None,
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, compute capability, memory and L2 cache in bytes, multiprocessors, and the CUDA or HIP version."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "runtime": torch.version.cuda or torch.version.hip,
    }


def title(facts: dict[str, Any]) -> str:
    """One line that names what was measured, from the `machine` of a report."""
    if facts.get("gpu"):
        return facts["gpu"]["name"]
    isa = "AVX-512" if "avx512f" in facts["isa"] else "AVX2" if "avx2" in facts["isa"] else ""
    return ", ".join(filter(None, (facts["cpu"], isa, f"{facts['threads']} threads")))


def _bf16_products_apply() -> bool:
    """Whether `set_float32_matmul_precision("medium")` changes a CPU product: it needs hardware for it."""
    before = torch.get_float32_matmul_precision()
    a = torch.linspace(-1, 1, 256 * 256).view(256, 256).sin()
    try:
        torch.set_float32_matmul_precision("highest")
        exact = a @ a
        torch.set_float32_matmul_precision("medium")
        return not torch.equal(exact, a @ a)
    finally:
        torch.set_float32_matmul_precision(before)


def versions() -> dict[str, str | None]:
    """Versions of Python, PyTorch and the package; None where something is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sface_kernels": __version__,
    }
    for name in ("triton", "numpy", "typer", "rich", "matplotlib"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment() -> dict[str, str]:
    """The environment variables that change timings."""
    return {key: value for key, value in sorted(os.environ.items()) if key in ENV_NAMES or key.startswith(ENV_PREFIXES)}


# What a measurement writes, and text: neither changes what is measured.
UNMEASURED = ("benchmarks/results", "docs", "*.md")


def commit(where: Path | None = None) -> str | None:
    """The git commit of this checkout, with "-dirty" where code differs from it; None outside a checkout."""
    where = where or Path(__file__).resolve().parent
    try:
        head = _git(where, "rev-parse", "HEAD")
        # "git status" rather than "git diff": it looks at contents where only a file's time differs
        changed = _git(
            where,
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ":/",
            *(f":(top,exclude){path}" for path in UNMEASURED),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(where: Path, *command: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # reads the checkout, refreshes nothing in it
    run = subprocess.run(
        ["git", *command], cwd=where, env=environment, capture_output=True, text=True, timeout=10, check=True
    )
    return run.stdout.strip()


def date() -> str:
    """Now, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def busy_seconds() -> float | None:
    """Core-seconds that all processes have used since boot, or None where the system does not say."""
    fields = _read("/proc/stat").splitlines()[:1]
    if not fields or not fields[0].startswith("cpu "):
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(v) for v in fields[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Core-seconds that this process and its ended children have used."""
    return sum(os.times()[:4])


def busy_cores(seconds: float = 0.5) -> float | None:
    """Cores in use by anybody else while this process sleeps for `seconds`."""
    before = busy_seconds()
    if before is None:
        return None
    begin = time.perf_counter()
    time.sleep(seconds)
    return round(max(0.0, ((busy_seconds() or before) - before) / (time.perf_counter() - begin)), 3)


def idle_check() -> dict[str, Any]:
    """`busy_cores`, the load average where known, and a `warning` (or None) when the machine is not idle."""
    busy = busy_cores()
    try:
        load: list[float] | None = [round(value, 2) for value in os.getloadavg()]
    except OSError:
        load = None
    warning = None
    if busy is not None and busy > BUSY_LIMIT:
        warning = f"the machine is not idle: others use {busy:.2f} cores"
    return {"busy_cores": busy, "load_average": load, "warning": warning}
