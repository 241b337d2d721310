"""The backends under test: one fixture gives every (backend, device, dtype) case and says why one is skipped."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other where cores are shared

import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from sface_kernels.dispatch import BACKENDS  # noqa: E402

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# (embeddings, weight): the same dtype, and master weights. What a backend cannot take is in test_bad_input, not here.
HALF = [(bf16, f32), (f16, f32), (bf16, bf16), (f16, f16)]
DTYPES = {
    "native": [(f32, f32), *HALF],
    "chunked": [(f32, f32), (f64, f64), (f64, f32), *HALF],
    "reference": [(f32, f32), (f64, f64), (f64, f32), *HALF],
    "triton": [(f32, f32), *HALF],
}


class Case(NamedTuple):
    backend: str
    device: str
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def __str__(self) -> str:
        short = [str(t).removeprefix("torch.") for t in (self.dtype, self.weight_dtype)]
        return "-".join([self.backend, self.device, *dict.fromkeys(short)])

    def reason_to_skip(self) -> str | None:
        return BACKENDS[self.backend].unavailable(torch.device(self.device), self.dtype, self.weight_dtype)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then Triton's kernels run on the CPU, slowly
CASES = [
    Case(name, device, *dtypes)
    for name in BACKENDS
    for device in DEVICES
    for dtypes in DTYPES[name]
    if not (device == "cuda" and name == "native") and not (device == "cpu" and name == "triton" and not INTERPRETED)
]
CASES32 = [case for case in CASES if case.dtype == case.weight_dtype == f32]


def _available(request: pytest.FixtureRequest) -> Case:
    case = request.param
    reason = case.reason_to_skip()
    if reason is not None:
        pytest.skip(f"{case}: {reason}")
    return case


case = pytest.fixture(_available, params=CASES, ids=str, name="case")
case32 = pytest.fixture(_available, params=CASES32, ids=str, name="case32")


def pytest_report_header() -> list[str]:
    lines = [f"{case}: skipped, {case.reason_to_skip()}" for case in CASES32 if case.reason_to_skip()]
    return lines + ([] if torch.cuda.is_available() else ["cuda: no cases, this machine has no CUDA device"])


@pytest.fixture(autouse=True)
def _clean_slate():
    """No test inherits another's seed or autograd mode."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled()


@pytest.fixture
def native() -> Case:
    """The C++ backend in float32, for what only it promises."""
    case = Case("native", "cpu", f32, f32)
    if case.reason_to_skip() is not None:
        pytest.skip(f"{case}: {case.reason_to_skip()}")
    return case
