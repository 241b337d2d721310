"""What a process needs beyond its gradients: at most 64 MiB + 16·C B + 16·N·D B, with C its own classes and N the rows
of all processes."""

from __future__ import annotations

import os

import pytest
import torch

from sface_kernels.bench.memory import resident_peak
from sface_kernels.compat.partial_fc import PartialFCSFace
from sface_kernels.distributed import ClassParallelSFaceLoss
from tests.distributed.pool import Pool
from tests.support.cases import Case, f32

PROCESSES, D = 2, 512
HEADS = {"head": ClassParallelSFaceLoss, "partial_fc": PartialFCSFace}
# (N, C) of all processes: with many rows, of which a few copies break the bound, and with many classes. The loss of the
# two heads is one function: a size between them is enough for the second.
SIZES = [("head", 4096, 2000), ("head", 1024, 40_000), ("head", 256, 60_000), ("partial_fc", 1024, 40_000)]

pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="no /proc/self/clear_refs to reset the peak of a process with",
)


@pytest.fixture(scope="module")
def pool():
    """Processes whose C library gives back what they free: what it keeps, by rules of its own, would count as ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        pool = Pool()
        yield pool
    pool.close()


def extra(name, backend, filter_eps, n, c):
    """Bytes, in each process, after a small step that loads libraries and connects to the others."""

    def step_of(rows, classes):
        head = HEADS[name](D, classes, backend=backend, filter_eps=filter_eps)
        x = torch.randn(rows // PROCESSES, D, requires_grad=True)
        labels = torch.randint(0, classes, (len(x),))

        def step():
            x.grad = head.weight.grad = None
            head(x, labels).backward()

        return step, x, head.weight

    step_of(64, 512)[0]()
    return resident_peak(*step_of(n, c))


@pytest.mark.parametrize("filter_eps", [None, 0.0])
@pytest.mark.parametrize("name, n, c", SIZES)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_peak(pool, name, backend, n, c, filter_eps):
    if reason := Case(backend, "cpu", f32, f32).reason_to_skip():
        pytest.skip(f"{backend}: {reason}")
    allowed = (64 << 20) + 16 * c // PROCESSES + 16 * n * D
    for size in pool.run(PROCESSES, extra, name, backend, filter_eps, n, c):
        assert size <= allowed, f"{size / 2**20:.1f} MiB beyond the gradients, {allowed / 2**20:.1f} allowed"


def test_the_probe_sees_a_tensor_of_all_pairs(pool):
    """The reference makes several; if the probe misses them it proves nothing about the others."""
    for size in pool.run(PROCESSES, extra, "head", "reference", 0.0, 512, 40_000):
        assert size > 3 * 4 * 512 * 40_000 // PROCESSES
