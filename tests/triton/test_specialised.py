"""A screen with specialised warps gives what the plain one does, to the bit. As `test_triton.py`, but as compiled PTX or on a
GPU alone, of sm_90: Triton's interpreter has no Gluon."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sface_kernels.backends.triton import tiles
from sface_kernels.backends.triton.device import gpu_of
from tests.support.cases import Case, bf16, f16, f32
from tests.support.checks import Judge, run
from tests.support.problems import GEOMETRIES
from tests.triton.conftest import forget_kinds
from tests.triton.test_triton import CASE, DEVICE, FAST, pytestmark, same_bits  # noqa: F401

PLAIN = '{"screen": {"warps": 8}}'  # any entry for the screen keeps its warps alike


@pytest.fixture(autouse=True)
def specialised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every screen that can be is; how many steps each one's ring has, 0 without."""
    import triton

    family, rings, ring = gpu_of(torch.device(DEVICE)).family, [], tiles.ring
    if not ring(family, "half", triton.__version__, 128):
        pytest.skip(f"Triton {triton.__version__} specialises no warps on {family}")

    def noted(*arguments: Any) -> int:
        rings.append(ring(*arguments))
        return rings[-1]

    monkeypatch.setattr(tiles, "SPECIALISED_TILES", 0)
    monkeypatch.setattr(tiles, "ring", noted)
    forget_kinds()
    return rings


def check(monkeypatch: pytest.MonkeyPatch, rings: list[int], problem: Any, case: Case, **options: Any) -> Any:
    result = run(case, problem, **options)
    assert rings and all(rings)
    monkeypatch.setenv("SFACE_TILES", PLAIN)
    plain = run(case, problem, **options)
    assert rings[-1] == 0 and same_bits(result, plain)
    return result


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "shape, dtype", [((130, 700, 128), bf16), ((21, 300, 100), f32), ((140, 260, 16), f16), ((9, 500, 200), bf16)]
)
def test_equals_the_plain_screen(poisoned, specialised, monkeypatch, geometry, shape, dtype):
    """One block of samples and two, remainders on every side, fewer tiles than groups of warps."""
    problem = GEOMETRIES[geometry](*shape).to("cpu", dtype, f32)
    case = Case("triton", DEVICE, dtype, f32)
    result = check(monkeypatch, specialised, problem, case, filter_eps=FAST)
    if dtype == f32:
        Judge(problem, filter_eps=FAST).check(result, "triton")


def test_int8(int8, poisoned, specialised, monkeypatch):
    """The steps of rows go through shared memory there."""
    check(monkeypatch, specialised, GEOMETRIES["trained"](130, 900, 512), CASE, filter_eps=FAST)


@pytest.mark.parametrize("stripes, capacity", [(1, 2), (3, 200), (4, 3), (5, 1)])
def test_stripes(poisoned, lists, specialised, monkeypatch, stripes, capacity):
    """An odd number leaves the last group without any; several tiles each; lists with and without room."""
    lists(stripes, capacity)
    check(monkeypatch, specialised, GEOMETRIES["trained"](20, 1500, 64), CASE, filter_eps=FAST)


def test_a_ring_shorter_than_a_tile(poisoned, specialised, monkeypatch):
    """At 512 features in fp16 x takes most of the shared memory: a tile has 8 steps, the ring 5."""
    check(monkeypatch, specialised, GEOMETRIES["trained"](20, 700, 512), CASE, filter_eps=FAST)
    assert specialised[0] == 5


def test_where_warps_are_not_specialised(specialised, monkeypatch):
    """Of 1024 features in fp16 nothing but x fits; another Triton, another GPU, or a tile that SFACE_TILES names."""
    assert tiles.ring("sm_90", "half", "3.7.1", 512) > 0 and tiles.ring("sm_90", "int8", "3.6.0", 1024) > 0
    assert tiles.ring("sm_90", "half", "3.7.1", 1024) == 0
    assert tiles.ring("sm_90", "half", "3.9.0", 512) == tiles.ring("sm_100", "half", "3.7.1", 512) == 0
    monkeypatch.setenv("SFACE_TILES", PLAIN)
    assert tiles.ring("sm_90", "half", "3.7.1", 512) == 0


def test_many_tiles_a_stripe(poisoned, lists, specialised, monkeypatch):
    """More than the bits that say which of them have own classes."""
    lists(1, 4096)
    problem = GEOMETRIES["random"](3, 8960, 16)
    problem.labels[:] = torch.tensor([8959, 63 * 128, 8100])
    check(monkeypatch, specialised, problem, CASE, filter_eps=FAST)
