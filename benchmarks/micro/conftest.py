"""What the microbenchmarks run on: backends that are available here, sizes, and how many rounds a size gets."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other where cores are shared

import pytest
import torch

from sface_kernels import available_backends
from sface_kernels.testing.workloads import Case, Shape, Workload, make_workload

SIZES = {"small": Shape(64, 1_000, 128), "medium": Shape(128, 10_575, 512), "large": Shape(128, 85_742, 512)}
ROUNDS = {"small": 40, "medium": 8, "large": 3}  # all of it within three minutes on two cores
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@functools.cache
def make(size: str, geometry: str, device: str) -> Workload:
    return make_workload(Case(SIZES[size], geometry), device)


@pytest.fixture(params=[f"{name}-{device}" for device in DEVICES for name in available_backends(device)])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param.split("-")[0]


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: str) -> str:
    return request.node.callspec.params["backend"].split("-")[1]


@pytest.fixture(params=list(SIZES))
def size(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def trained(size: str, device: str) -> Workload:
    """Look-alikes, so that what follows the screen has work."""
    return make(size, "trained", device)


@pytest.fixture
def random(size: str, device: str) -> Workload:
    """An untrained head: next to no active pair."""
    return make(size, "random", device)


@pytest.fixture
def measure(benchmark, size: str, device: str) -> Callable[..., None]:
    """Times `run` on what `setup` returns, in rounds of one run, after one round of warm-up."""

    def rounds(name: str, run: Callable[..., object], setup: Callable[[], tuple[object, ...]] = tuple) -> None:
        benchmark.group = f"{name}, {size}"

        def timed(*arguments: object) -> None:
            run(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()

        def prepared() -> tuple[tuple[object, ...], dict[str, object]]:
            arguments = setup()
            if device == "cuda":
                torch.cuda.synchronize()
            return arguments, {}

        benchmark.pedantic(timed, setup=prepared, rounds=ROUNDS[size], warmup_rounds=1)

    return rounds
