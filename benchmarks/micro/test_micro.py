"""Microbenchmarks on each backend: the public loss with the default filter, and, without autograd and at
filter_eps = 2⁻¹⁶, the parts behind it. Within three minutes on two cores.

forward, backward, both: 2·N·C·D flop forward, 4·N·C·D backward where all pairs count; w is read once (4·C·D bytes), ∂w is
    written once.
screen: the pass over all classes on data without active pairs, no gradient asked for: 2·N·C·D flop, 4·C·D bytes.
screen-rescore: the same pass where about 1e-3 of the pairs are active, with ∂x and the lists for ∂w. What it takes beyond
    the screen is rescoring: 6·D flop for each active pair.
scatter: ∂w from those lists: 2·D flop for each active pair, 4·C·D bytes written.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other where cores are shared

import pytest
import torch

from sface_kernels import available_backends, sface_loss
from sface_kernels.dispatch import BACKENDS
from sface_kernels.testing.workloads import FAST_EPS, A, B, Case, K, S, Shape, Workload, make_workload
from sface_kernels.types import HyperParameters

HYPER = HyperParameters(S, K, K, A, B, FAST_EPS)
SIZES = {"small": Shape(64, 1_000, 128), "medium": Shape(128, 10_575, 512), "large": Shape(128, 85_742, 512)}
ROUNDS = {"small": 40, "medium": 8, "large": 3}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
WHERE = [(backend, device) for device in DEVICES for backend in available_backends(device)]
Run = tuple[Callable[..., object], Callable[[], tuple[Any, ...]]]  # what is timed, and what makes its arguments


@functools.cache
def make(size: str, geometry: str, device: str) -> Workload:
    return make_workload(Case(SIZES[size], geometry), device)


def loss(part: str, size: str, backend: str, device: str) -> Run:
    work = make(size, "trained", device)  # look-alikes, so that what follows the screen has work
    x, w = work.x.detach().requires_grad_(), work.w.detach().requires_grad_()

    def forward() -> torch.Tensor:
        x.grad = w.grad = None
        return sface_loss(x, w, work.y, backend=backend)

    if part == "backward":
        return torch.Tensor.backward, lambda: (forward(),)
    return forward if part == "forward" else lambda: forward().backward(), tuple


def without_autograd(part: str, size: str, backend: str, device: str) -> Run:
    work = make(size, "random" if part == "screen" else "trained", device)
    inputs = work.x, work.w, work.y
    forward, grad_weight = BACKENDS[backend].forward, BACKENDS[backend].grad_weight
    if part == "scatter":
        saved = forward(*inputs, HYPER, False, True).saved
        upstream = torch.full_like(work.y, 1 / len(work.y), dtype=torch.float32)
        return lambda: grad_weight(*inputs, HYPER, upstream, saved), tuple
    gradients = part == "screen-rescore"
    return lambda: forward(*inputs, HYPER, gradients, gradients), tuple


@pytest.mark.parametrize("backend, device", WHERE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("part", ["forward", "backward", "both", "screen", "screen-rescore", "scatter"])
def test_part(benchmark: Any, part: str, size: str, backend: str, device: str) -> None:
    """In rounds of one run, after one round of warm-up."""
    of_loss = part in ("forward", "backward", "both")
    if backend == "reference" and not of_loss:
        pytest.skip("it has no parts")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    benchmark.group = f"{part}, {size}"
    with torch.set_grad_enabled(of_loss):
        run, setup = (loss if of_loss else without_autograd)(part, size, backend, device)

        def prepared() -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments = setup()
            wait()
            return arguments, {}

        benchmark.pedantic(lambda *a: (run(*a), wait()), setup=prepared, rounds=ROUNDS[size], warmup_rounds=1)
