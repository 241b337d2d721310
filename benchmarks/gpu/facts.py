"""What the figures were measured on: device, driver, versions, tools."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys

import torch

from .session import record

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "nvidia-smi")
STATE = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> int:
    properties = torch.cuda.get_device_properties(0)
    record(
        device=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_GiB=round(properties.total_memory / 2**30, 1),
        L2_MiB=round(properties.L2_cache_size / 2**20, 1),
        devices=torch.cuda.device_count(),
        torch=torch.__version__,
        cuda=str(torch.version.cuda or torch.version.hip),
        triton=importlib.metadata.version("triton"),
        python=platform.python_version(),
        state=output("nvidia-smi", f"--query-gpu={STATE}", "--format=csv,noheader"),
        nvcc=(output("nvcc", "--version").splitlines() or [""])[-1],
        commit=output("git", "rev-parse", "HEAD"),
        tools=[tool for tool in TOOLS if shutil.which(tool)],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
