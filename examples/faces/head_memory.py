"""Peak memory of one step of a head, measured in a process of its own.

What is measured on a CPU: how far the process's resident memory rises (VmHWM, reset just before, minus VmRSS) during
forward and backward of the head with these embeddings and this weight, after a small step has started the threads.
It counts the gradients that come back, and no weight or embedding. On a GPU: the same rise of
`torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from sface_kernels import SFaceLoss

# Every larger block comes from the system and returns to it, so that no freed one hides what a step takes.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TOP_PAD_": "0"}
SETTINGS = {**ALLOCATOR, "SFACE_VERIFY": "0"}  # on a GPU the first calls are checked, which takes memory of its own


def measure(
    backend: str, weight: Tensor, embeddings: Tensor, labels: Tensor, constants: dict[str, float]
) -> float | None:
    """Peak memory of a head step in MiB, or None where it cannot be measured (no /proc, or no room for the process).

    Args:
        backend: as in `SFaceLoss`.
        weight: `[C, D]` class centres.
        embeddings: `[N, D]`, on the device to measure.
        labels: `[N]`.
        constants: s, k, a, b.
    """
    problem = {
        "backend": backend,
        "weight": weight.detach().cpu(),
        "embeddings": embeddings.detach().cpu(),
        "labels": labels.cpu(),
        "device": str(embeddings.device),
        "threads": torch.get_num_threads(),
        "constants": constants,
    }
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "problem.pt"
            torch.save(problem, file)
            done = subprocess.run(
                [sys.executable, __file__, str(file)], env=environment, capture_output=True, check=True
            )
        return float(done.stdout.split()[-1])  # the last word: the user's Python may greet first
    except (OSError, RuntimeError, subprocess.CalledProcessError, ValueError):  # RuntimeError: torch.save's full disk
        return None


def _step(problem: dict, rows: slice, classes: slice) -> tuple[SFaceLoss, Tensor, Tensor]:
    weight = problem["weight"][classes]
    head = SFaceLoss(weight.shape[1], weight.shape[0], backend=problem["backend"], **problem["constants"])
    head.load_state_dict({"weight": weight})
    device = torch.device(problem["device"])
    embeddings = problem["embeddings"][rows].to(device).requires_grad_()  # [N, D]
    return head.to(device), embeddings, problem["labels"][rows].to(device).clamp(max=weight.shape[0] - 1)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024  # kB → MiB
    raise OSError(field)


def _rise_on_cpu(head: SFaceLoss, embeddings: Tensor, labels: Tensor) -> float | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak so far
        before = _status("VmRSS")
        head(embeddings, labels).backward()
        return max(0.0, _status("VmHWM") - before)
    except OSError:
        return None


def _rise_on_gpu(head: SFaceLoss, embeddings: Tensor, labels: Tensor) -> float:
    torch.cuda.reset_peak_memory_stats(embeddings.device)
    before = torch.cuda.memory_allocated(embeddings.device)
    head(embeddings, labels).backward()
    torch.cuda.synchronize(embeddings.device)
    return (torch.cuda.max_memory_allocated(embeddings.device) - before) / 2**20


def main(file: str) -> None:
    problem = torch.load(file, weights_only=True)
    torch.set_num_threads(problem["threads"])
    small = _step(problem, slice(8), slice(64))
    small[0](*small[1:]).backward()
    whole = _step(problem, slice(None), slice(None))
    rise = _rise_on_cpu(*whole) if problem["device"] == "cpu" else _rise_on_gpu(*whole)
    print("unknown" if rise is None else rise)


if __name__ == "__main__":
    main(sys.argv[1])
