"""Memory beyond the returned gradients does not grow with N·C: at most 64 MiB + 16·C B + 16·N·D B."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT, Case, f32

N, D = 128, 512
# Two sizes of C show that nothing grows faster than stated; at the larger one N×C would be 44 MB for each of several tensors,
# and exact mode has every pair active, the most that the lists of pairs can be asked to hold.
SIZES = (20_000, 85_742)
FILTERS = (2.0**-24, 0.0)
CONFIGURATIONS = [(b, c, e) for b in ("native", "chunked") for c in SIZES for e in FILTERS]
WITNESS = ("reference", SIZES[0], 0.0)


@pytest.fixture(scope="module")
def extra() -> dict[tuple[str, int, float], int]:
    """Bytes for each configuration, from one probe process."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system has no /proc/self/clear_refs to reset the peak of a process with")
    runnable = [c for c in (*CONFIGURATIONS, WITNESS) if Case(c[0], "cpu", f32, f32).reason_to_skip() is None]
    command = [sys.executable, str(ROOT / "tests" / "memory_probe.py"), str(N), str(D)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *(f"{b},{c},{e}" for b, c, e in runnable)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(backend, int(c), float(eps)): int(size) for backend, c, eps, size in lines}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: f"{c[0]}, C={c[1]}, filter_eps={c[2]:.3g}")
def test_peak(extra, configuration):
    backend, c, _ = configuration
    if configuration not in extra:
        pytest.skip(f"{backend}: {Case(backend, 'cpu', f32, f32).reason_to_skip()}")
    allowed = (64 << 20) + 16 * c + 16 * N * D
    size = extra[configuration]
    assert size <= allowed, f"{size / 2**20:.1f} MiB beyond the gradients, {allowed / 2**20:.1f} allowed"


def test_the_probe_sees_a_tensor_of_all_pairs(extra):
    """The reference makes several; if the probe misses them it proves nothing about the others."""
    assert extra[WITNESS] > 3 * 4 * N * SIZES[0]
