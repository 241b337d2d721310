"""What only a GPU can show: replayed graphs, races, streams, devices, offsets past 2³¹, memory, no waiting.

The checks stand in benchmarks/gpu/checks.py, which `make gpu` runs on machines without pytest too.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import checks
from sface_kernels.dispatch import BACKENDS
from sface_kernels.types import Request


@pytest.mark.parametrize("name", checks.CHECKS)
def test_cuda(name):
    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    reason = BACKENDS["triton"].unavailable(Request(torch.device("cuda"), torch.bfloat16, torch.float32))
    if reason is not None:
        pytest.skip(reason)
    try:
        checks.CHECKS[name]()
    except checks.Skip as skipped:
        pytest.skip(str(skipped))
    finally:
        torch.cuda.empty_cache()
