"""The int8 screen of the C++ backend where its choices show: thresholds, equal cosines. Without that screen (other
instruction sets) the int16 one has to keep the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import sface_loss
from sface_kernels.types import NO_TARGET
from tests.support.checks import assert_same_for_threads
from tests.support.problems import random_problem

N, D = 40, 512  # more than a panel of 32 samples; at least 256 features, which the int8 screen asks for
BLOCK = 48  # classes


def rows_that_round_badly(count: int) -> torch.Tensor:
    """`[count, D]`: one large component, which sets the step of int8, and the others just short of half a step."""
    g = torch.Generator().manual_seed(5)
    rows = 0.0039 * (torch.randint(0, 2, (count, D), generator=g) * 2.0 - 1)
    rows[:, 0] = 1
    return rows


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("last", [1, 4, 13, 47])
def test_a_short_last_block_alone_and_after_another(native, one_thread, last):
    """Rounding errors of the block before, which a thread may have had or not, have no part in its threshold.

    That block's classes are opposite to every sample: its pairs add nothing that float32 holds.
    """
    x, w, labels, _ = random_problem(N, last, D)
    x[:, 0], w[:, 0] = -0.7 * x.norm(dim=1), 0
    target, hyper = torch.full_like(labels, NO_TARGET), (64.0, 80.0, 80.0, 0.8, 1.23, 2.0**-24)
    alone, after = (
        torch.ops.sface.native_forward(x, rows, target, *hyper, False, False, 0)[0]
        for rows in (w, torch.cat([rows_that_round_badly(BLOCK), w]))
    )
    assert (alone != 0).all()
    assert torch.equal(after, alone)


@pytest.mark.parametrize("n, c, d", [(N, BLOCK + 4, D), (300, 3 * BLOCK + 1, 256), (65, 3001, 257)])
@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-24, 2.0**-12])
def test_any_number_of_threads(native, n, c, d, filter_eps):
    problem = random_problem(n, c, d)
    problem.w[4:12, 0] *= 50
    assert_same_for_threads(native, problem, (1, 2, 3, 5, 2, 3, 5), filter_eps=filter_eps)


@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-24])
def test_what_ignored_rows_hold_changes_nothing(native, filter_eps):
    """Neither what the others are computed with, int8 thresholds and products of fewer parts, nor so their last bits."""
    problem = random_problem(N, 300, D)
    problem.labels[3] = -100

    def results() -> list[torch.Tensor]:
        x, w = problem.x.clone().requires_grad_(), problem.w.clone().requires_grad_()
        options = dict(filter_eps=filter_eps, reduction="sum", return_stats="rows", backend="native")
        loss, rows = sface_loss(x, w, problem.labels, **options)
        return [loss.detach(), *rows, *torch.autograd.grad(loss, (x, w))]

    expected = results()
    for held in (rows_that_round_badly(1)[0], problem.w[17], -problem.w[17], torch.full((D,), 1e38)):
        problem.x[3] = held
        for ours, theirs in zip(results(), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_equal_cosines_below_the_threshold(native):
    """Copies of a centre in many places of many blocks, no pair a candidate: the lowest number."""
    x = random_problem(N, 1, D).x
    x[:, 0] = 0.08 * x[:, 1:].norm(dim=1)
    w = -torch.eye(D)[0].repeat(10 * BLOCK, 1)
    copies = list(range(37, len(w), 53))
    w[copies] *= -1
    labels = torch.tensor([0, copies[0]] * (N // 2))
    rows = sface_loss(x, w, labels, backend="native", return_stats="rows")[1]
    assert (rows.cos_hardest < 0.09).all() and (rows.cos_hardest > 0.07).all()
    assert rows.hardest_class.tolist() == [copies[0], copies[1]] * (N // 2)


@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
@pytest.mark.parametrize("d", [16, 100, 512])
def test_a_copy_of_the_own_centre_ties(native, d, filter_eps):
    """Whichever way its cosine was computed: the sums of screens, of rescoring and of products round in other orders."""
    w = random_problem(1, 1000, d).w
    w[100:200] = w[:100]
    x = 0.6 * F.normalize(w[:100]) + 0.8 * F.normalize(random_problem(100, 1, d, seed=1).x)
    options = dict(backend="native", filter_eps=filter_eps)
    stats = sface_loss(x, w, torch.arange(100), return_stats=True, **options)[1]
    rows = sface_loss(x, w, torch.arange(100), return_stats="rows", **options)[1]
    assert float(stats.accuracy) == 0
    nearest = rows.hardest_class == torch.arange(100, 200)
    assert nearest.any() and torch.equal(rows.cos_hardest[nearest], rows.cos_target[nearest])


@pytest.mark.parametrize("n, c", [(3, 1000), (33, 331), (257, 331), (300, 1000)])
def test_an_arena_of_every_pair_holds_every_pair(native, n, c):
    """Then no dense block is computed twice: every part of the arena is as large as its tasks' tiles."""
    x, w, labels, _ = random_problem(n, c, 8)
    hyper = (64.0, 80.0, 80.0, 0.8, 1.23, 0.0)
    segments = torch.ops.sface.native_forward(x, w, labels, *hyper, True, True, n * c)[-2]
    assert (segments.view(-1, 2)[:, 1] == -1).all()
