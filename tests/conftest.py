"""Fixtures: one gives every (backend, device, dtype) case and says why one is skipped."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other where cores are shared
# The compiler's cache knows an operator by its schema: after a change of its fake it would answer for the old one.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("SFACE_VERIFY", "0")  # test_verify.py sets it

import torch

from sface_kernels.backends.triton import plan
from sface_kernels.precision import kept
from tests.support.cases import CASES, CASES32, Case, f32


def _patch_once() -> None:
    """Triton's interpreter puts itself in place of tl's functions again at each call of a device function, by looking
    through all that tl has: two fifths of its time. Where it stands there already, it need not."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    tl: Any = importlib.import_module("triton.language")
    patch = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        here = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if not here or any(tl.core.is_builtin(module.load) for module in here):
            return patch(function)
        return interpreter._LangPatchScope()  # nothing to put back

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _patch_once()


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
    """No test inherits another's seed, autograd mode or precision of products."""
    torch.manual_seed(0)
    with kept():
        yield
    assert torch.is_grad_enabled()


@pytest.fixture(autouse=True)
def _one_way(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU the way of a Triton call follows what earlier calls counted, so equal calls may differ by rounding, half
    embeddings by much. Tests compare calls to the bit; what only a GPU shows of the ways is in tests/gpu."""
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available() and request.path.parent.name != "gpu" and request.path.name != "test_plan.py":
            patch.setattr(plan, "_varies", lambda x: False)
        yield


@pytest.fixture
def native() -> Case:
    """The C++ backend in float32, for what only it promises."""
    case = Case("native", "cpu", f32, f32)
    if case.reason_to_skip() is not None:
        pytest.skip(f"{case}: {case.reason_to_skip()}")
    return case
