"""Microbenchmarks of the parts behind the loss, without autograd, at filter_eps = 2⁻¹⁶.

screen: the pass over all classes on data without active pairs, no gradient asked for: 2·N·C·D flop, 4·C·D bytes.
screen-rescore: the same pass where about 1e-3 of the pairs are active, with ∂x and the lists for ∂w. What it takes beyond
    the screen is rescoring: 6·D flop for each active pair.
scatter: ∂w from those lists: 2·D flop for each active pair, 4·C·D bytes written.
"""

from __future__ import annotations

import pytest
import torch

from sface_kernels.dispatch import BACKENDS
from sface_kernels.testing.workloads import FAST_EPS, A, B, K, S
from sface_kernels.types import HyperParameters

HYPER = HyperParameters(S, K, K, A, B, FAST_EPS)


@pytest.fixture(autouse=True)
def _screened_backends(backend):
    if backend == "reference":
        pytest.skip("it has no parts")
    with torch.no_grad():
        yield


def test_screen(measure, random, backend):
    measure("screen", lambda: BACKENDS[backend].forward(random.x, random.w, random.y, HYPER, False, False))


def test_screen_and_rescore(measure, trained, backend):
    work = trained
    measure("screen-rescore", lambda: BACKENDS[backend].forward(work.x, work.w, work.y, HYPER, True, True))


def test_scatter(measure, trained, backend):
    work = trained
    saved = BACKENDS[backend].forward(work.x, work.w, work.y, HYPER, False, True).saved
    upstream = torch.full_like(work.y, 1 / len(work.y), dtype=torch.float32)
    measure("scatter", lambda: BACKENDS[backend].grad_weight(work.x, work.w, work.y, HYPER, upstream, saved))
