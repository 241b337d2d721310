"""Memory beyond the returned gradients does not grow with N·C: at most 64 MiB + 16·C B + 16·N·D B."""

from __future__ import annotations

import os

import pytest
import torch

from sface_kernels.bench.memory import measure
from sface_kernels.bench.providers import resolve
from sface_kernels.testing.workloads import Case as Workload
from sface_kernels.testing.workloads import Shape
from tests.support.cases import Case, f32

D = 512
# Two sizes of C and two of N show that nothing grows faster than stated. N×C would be 10, 44 and 82 MB for each of several
# tensors; exact mode has every pair active, the most that the lists of pairs can be asked to hold.
SIZES = [(128, 20_000), (128, 85_742), (1024, 20_000)]

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="no /proc/self/clear_refs to reset the peak of a process with",
)


def extra(provider: str, n: int, c: int) -> int:
    found = measure(resolve(provider), Workload(Shape(n, c, D)), torch.get_num_threads())
    assert "error" not in found, found["error"]
    return found["peak_extra_bytes"]


@pytest.mark.parametrize("filter_eps", ["2^-24", "0"])
@pytest.mark.parametrize("n, c", SIZES)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_peak(backend, n, c, filter_eps):
    if reason := Case(backend, "cpu", f32, f32).reason_to_skip():
        pytest.skip(f"{backend}: {reason}")
    allowed = (64 << 20) + 16 * c + 16 * n * D
    size = extra(f"{backend}@{filter_eps}", n, c)
    assert size <= allowed, f"{size / 2**20:.1f} MiB beyond the gradients, {allowed / 2**20:.1f} allowed"


def test_the_probe_sees_a_tensor_of_all_pairs():
    """The reference makes several; if the probe misses them it proves nothing about the others."""
    assert extra("reference", 128, 20_000) > 3 * 4 * 128 * 20_000
