"""What tests of the Triton backend set: its buffers' first contents, the size of its lists, what a screen multiplies."""

from __future__ import annotations

import sys

import pytest
import torch

from sface_kernels.backends.triton import buffers, plan, tiles
from sface_kernels.types import HyperParameters


def forget_kinds() -> None:
    """What calls have worked out from constants that a test has changed, or has left changed."""
    plan.screens_int8.cache_clear()
    if kinds := sys.modules.get("sface_kernels.backends.triton.kinds"):
        kinds._kind.cache_clear()


def int8_where_it_may(x: torch.Tensor, w: torch.Tensor, hp: HyperParameters, family: str) -> plan.Way:
    """`plan.way_of` after a count of few active pairs."""
    return plan.Way(plan.threshold_of(hp, x.shape[1]) is None, plan.screens_int8(hp, x.shape[1], family))


@pytest.fixture(autouse=True)
def _kinds_are_forgotten():
    yield
    forget_kinds()


@pytest.fixture
def poisoned(monkeypatch):
    """Every buffer that a launch gets starts as NaN (or a wild integer): what is not written shows."""
    before = buffers.empty

    def filled(wanted, device) -> list[torch.Tensor]:
        made = before(wanted, device)
        for buffer in made:
            if buffer.stride() != (0,):
                buffer.fill_(torch.nan if buffer.dtype.is_floating_point else torch.iinfo(buffer.dtype).max >> 1)
        return made

    monkeypatch.setattr(buffers, "empty", filled)


@pytest.fixture
def lists(monkeypatch):
    """Sets the number and capacity of the parts of a list."""

    def set_to(stripes: int, capacity: int) -> None:
        monkeypatch.setattr(buffers, "lists", lambda *_: (stripes, capacity))
        forget_kinds()

    return set_to


@pytest.fixture
def int8(monkeypatch):
    """Every screen in int8, whatever the filter, D and earlier counts."""
    if not tiles.INT8_SCREEN:
        pytest.skip("this emulator does not multiply int8")
    monkeypatch.setattr(plan, "INT8_SHARE", 1.0)
    forget_kinds()
    monkeypatch.setattr(plan, "way_of", int8_where_it_may)


@pytest.fixture(params=["fp16", "int8"])
def screen(request):
    """What every screen multiplies."""
    if request.param == "int8":
        request.getfixturevalue("int8")
    return request.param
