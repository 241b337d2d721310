"""Random calls of the C++ backend, and calls at once. `make sanitize` runs a thousand under AddressSanitizer and UBSan."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sface_kernels import sface_loss
from tests.support.cases import bf16, f16, f32
from tests.support.checks import assert_rows_within, assert_same, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, Problem, trained_problem

CALLS = int(os.environ.get("SFACE_FUZZ", "60"))
BATCHES = 4
DTYPES = [(f32, f32), (f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f16, f16)]
TILES = [1, 2, 6, 8, 12, 16, 32, 48, 64, 128, 256, 512]  # sizes of tiles, panels, blocks and groups


def size(rng: random.Random, largest: int) -> int:
    """Mostly a tile's size or one beside it."""
    near = [n + step for n in TILES for step in (-1, 0, 1) if 1 <= n + step <= largest]
    return rng.choice(near) if rng.random() < 0.7 else rng.randint(1, largest)


def random_problem(rng: random.Random) -> tuple[Problem, dict[str, float]]:
    n, c, d = size(rng, 300), size(rng, 600), size(rng, 530)
    make, dtypes = GEOMETRIES[rng.choice(list(GEOMETRIES))], rng.choice(DTYPES)
    problem = make(n, c, d, seed=rng.randrange(1000)).to("cpu", *dtypes)
    if dtypes == (f32, f32) and rng.random() < 0.5:  # a half's gradient of a short row overflows
        for rows in (problem.x, problem.w):
            rows[rng.randrange(len(rows))] *= 2.0 ** rng.choice([-140, -60, 40, 100])
    labels = problem.labels.clone()
    labels[torch.rand(n) < rng.choice([0, 0.2])] = -100
    labels[torch.rand(n) < rng.choice([0, 0.2])] = 0
    options = {
        "filter_eps": rng.choice([0.0, 2.0**-24, 2.0**-16, 2.0**-12, 0.3]),
        "k": rng.choice([80.0, 80.0, 100.0, 8.0]),
        "b": rng.choice([1.23, 1.23, 0.3, 2.5]),
    }
    return problem._replace(labels=labels), options


def odd_view(rng: random.Random, t: Tensor) -> Tensor:
    """A tensor equal to `t` `[rows, D]` with other strides, offset or alignment."""
    rows, d = t.shape
    return rng.choice([
        lambda: t.t().contiguous().t(),
        lambda: t.repeat_interleave(2, 0)[::2],
        lambda: t.repeat_interleave(3, 1)[:, ::3],
        lambda: F.pad(t, (3, 2))[:, 3:-2],
        lambda: F.pad(t.reshape(-1), (1, 0))[1:].view(rows, d),
        lambda: torch.empty_strided((rows, d), (d + rng.randint(0, 40), 1), dtype=t.dtype).copy_(t),
    ])()  # fmt: skip


def run_views(native, x: Tensor, w: Tensor, problem: Problem, options: dict[str, float]):
    """As `run`, but on the very strides that are given: a copy would lose them."""
    x, w = (t.detach().requires_grad_() for t in (x, w))
    rows = sface_loss(x, w, problem.labels, reduction="none", backend=native.backend, **options)
    grads = torch.autograd.grad(rows, (x, w), problem.upstream)
    return rows.detach(), *grads


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_calls(native, batch):
    """Whatever the shape, the strides and the dtypes: the bits of the plain copy's result, and the loss of fp64."""
    for seed in range(batch, CALLS, BATCHES):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        problem, options = random_problem(rng)
        what = f"seed {seed}: {list(problem.x.shape)}, {list(problem.w.shape)}, {problem.w.dtype}, {options}"
        expected = run(native, problem, **options)
        x, w = odd_view(rng, problem.x), odd_view(rng, problem.w)
        assert torch.equal(x, problem.x) and torch.equal(w, problem.w), what
        for ours, plain in zip(run_views(native, x, w, problem, options), expected[:1] + expected[2:], strict=True):
            assert torch.equal(ours, plain), what
            assert torch.isfinite(ours).all(), what
        t = truth(*problem, **options)
        exact = torch.where(problem.labels == -100, 0, t.row_loss)
        assert_rows_within(what, expected.row_loss.double() - exact, t.worst.loss + t.screen_loss["native"])


def test_four_python_threads_at_once(native):
    """The operators release no lock they need: each thread gets the bits that it gets alone."""
    problems = [trained_problem(40 + 90 * i, 700, 96, seed=i) for i in range(4)]
    expected = [run(native, problem) for problem in problems]

    def steps(i: int) -> None:
        for _ in range(15):
            assert_same(run(native, problems[i]), expected[i])

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(steps, i) for i in range(4)]:
            done.result()
