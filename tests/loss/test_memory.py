"""Memory beyond the returned gradients does not grow with N·C: at most 64 MiB + 16·C B + 16·N·D B."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.cases import ROOT, Case, f32

D = 512
# Two sizes of C and two of N show that nothing grows faster than stated. N×C would be 10, 44 and 82 MB for each of several
# tensors; exact mode has every pair active, the most that the lists of pairs can be asked to hold.
SIZES = [(128, 20_000), (128, 85_742), (1024, 20_000)]
CONFIGURATIONS = [(b, n, c, e) for b in ("native", "chunked") for n, c in SIZES for e in (2.0**-24, 0.0)]
WITNESS = ("reference", 128, 20_000, 0.0)


@pytest.fixture(scope="module")
def extra() -> dict[tuple[str, int, int, float], int]:
    """Bytes for each configuration, from one probe process."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system has no /proc/self/clear_refs to reset the peak of a process with")
    runnable = [c for c in (*CONFIGURATIONS, WITNESS) if Case(c[0], "cpu", f32, f32).reason_to_skip() is None]
    command = [sys.executable, str(ROOT / "tests" / "support" / "memory_probe.py"), str(D)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *(f"{b},{n},{c},{e}" for b, n, c, e in runnable)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {(backend, int(n), int(c), float(eps)): int(size) for backend, n, c, eps, size in lines}


@pytest.mark.parametrize(
    "configuration", CONFIGURATIONS, ids=lambda c: f"{c[0]}, N={c[1]}, C={c[2]}, filter_eps={c[3]:.3g}"
)
def test_peak(extra, configuration):
    backend, n, c, _ = configuration
    if configuration not in extra:
        pytest.skip(f"{backend}: {Case(backend, 'cpu', f32, f32).reason_to_skip()}")
    allowed = (64 << 20) + 16 * c + 16 * n * D
    size = extra[configuration]
    assert size <= allowed, f"{size / 2**20:.1f} MiB beyond the gradients, {allowed / 2**20:.1f} allowed"


def test_the_probe_sees_a_tensor_of_all_pairs(extra):
    """The reference makes several; if the probe misses them it proves nothing about the others."""
    assert extra[WITNESS] > 3 * 4 * 128 * 20_000
