"""What a reader of a result needs: processor, memory, settings, versions, commit, and who else used the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .._version import __version__

ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "bf16", "sve")
# variables that change timings
ENV = ("OMP_", "MKL_", "KMP_", "MALLOC_", "SFACE_", "ONEDNN_", "CUBLAS_", "TRITON_", "THP_", "LD_PRELOAD", "ATEN_")
GPU_STATE = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
TRITON = ("triton", "pytorch-triton", "pytorch-triton-rocm")  # distributions that bring it
BUSY_LIMIT = 0.1  # cores that others may use before a machine counts as not idle
# What a measurement writes, and text: neither changes what is measured.
UNMEASURED = ("benchmarks/results", "docs", "*.md")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _fields(path: str) -> dict[str, str]:
    """The lines `key: value` of a file, the last of each key."""
    parts = (line.partition(":") for line in _read(path).splitlines())
    return {key.strip(): value.strip() for key, _, value in parts}


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """The machine: `memory_bytes` in bytes, `thp` the kernel's setting of transparent huge pages, `gpu` the device
    that is measured, or None for a CPU."""
    cpu = _fields("/proc/cpuinfo")
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    memory = _fields("/proc/meminfo").get("MemTotal", "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "memory_bytes": int(memory[0]) * 1024 if memory else None,
        "thp": _read("/sys/kernel/mm/transparent_hugepage/enabled").partition("[")[2].partition("]")[0] or None,
        "system": f"{platform.system()} {platform.release()}",
        "threads": torch.get_num_threads(),
        "gpu": gpu_facts(device) if device is not None and device.type == "cuda" else None,
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, compute capability, memory and L2 cache in bytes, multiprocessors, the CUDA or HIP version, and `state`:
    what nvidia-smi says of driver, clocks (MHz), power (W) and temperature (°C), or None without it."""
    properties = torch.cuda.get_device_properties(device)
    # by what it is: nvidia-smi counts the GPUs that CUDA_VISIBLE_DEVICES hides
    smi = ["nvidia-smi", f"--query-gpu={GPU_STATE}", "--format=csv,noheader", f"--id=GPU-{properties.uuid}"]
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "runtime": torch.version.cuda or torch.version.hip,
        "state": subprocess.run(smi, capture_output=True, text=True).stdout.strip() if shutil.which(smi[0]) else None,
    }


def title(facts: dict[str, Any]) -> str:
    """One line that names what was measured, from the `machine` of a report."""
    if facts.get("gpu"):
        return facts["gpu"]["name"]
    isa = "AVX-512" if "avx512f" in facts["isa"] else "AVX2" if "avx2" in facts["isa"] else ""
    return ", ".join(filter(None, (facts["cpu"], isa, f"{facts['threads']} threads")))


def versions() -> dict[str, str | None]:
    """Versions of Python, PyTorch and the package; None where something is not installed."""
    there = {found.name: found.version for found in importlib.metadata.distributions()}
    others = {name: there.get(name) for name in ("numpy", "typer", "rich", "matplotlib")}
    triton = next((there[name] for name in TRITON if name in there), None)
    own = {"python": platform.python_version(), "torch": torch.__version__, "sface_kernels": __version__}
    return {**own, "triton": triton, **others}


def commit(where: Path | None = None) -> str | None:
    """The git commit of this checkout, with "-dirty" where code differs from it. None outside a checkout, as where the
    package is installed within some other project's."""
    code = where or Path(__file__).resolve()
    options: Any = {
        "cwd": code if code.is_dir() else code.parent,
        "capture_output": True,
        "text": True,
        "check": True,
    }
    options["env"] = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # reads the checkout, refreshes nothing in it
    # "git status" rather than "git diff": it looks at contents where only a file's time differs
    status = ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/"]
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", "--", code], **options)
        head = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run([*status, *(f":(top,exclude){path}" for path in UNMEASURED)], **options).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "-dirty" * bool(changed)


def others_seconds() -> float | None:
    """Core-seconds that processes other than this one and its ended children have used since boot, or None where the
    system does not say."""
    fields = _read("/proc/stat").split()[:9]
    if fields[:1] != ["cpu"]:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
