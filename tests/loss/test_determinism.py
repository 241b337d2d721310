"""The same bits from run to run, whatever ran before, and whose a gradient is."""

from __future__ import annotations

import math
import os

import pytest
import torch

from sface_kernels import sface_loss
from tests.support.checks import assert_same, assert_same_for_threads, check, run
from tests.support.problems import GEOMETRIES, Problem, collapsed_problem, trained_problem

nan, inf = math.nan, math.inf


class TestDeterminism:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    def test_same_bits_each_time(self, case32, geometry, filter_eps):
        problem = GEOMETRIES[geometry](300, 3001, 64)
        first = run(case32, problem, filter_eps=filter_eps)
        for _ in range(5):
            again = run(case32, problem, filter_eps=filter_eps)
            assert_same(again, first)
            assert again.stats == first.stats

    # many blocks of classes and a last one of 5; two groups of samples; a single task; few samples; few classes
    @pytest.mark.parametrize(
        "n, c, d", [(70, 48 * 16 * 8 + 5, 64), (300, 3001, 64), (5, 40, 8), (3, 30_000, 8), (600, 900, 96)]
    )
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    def test_native_does_not_depend_on_threads(self, geometry, filter_eps, n, c, d, native):
        """Partial sums belong to ranges of classes, not to threads; with 20 they are added in another place."""
        problem = GEOMETRIES[geometry](n, c, d)
        assert_same_for_threads(native, problem, (1, 2, 3, 5, 5, 20), filter_eps=filter_eps)


def test_different_lengths_of_batch_in_turn(case32):
    """Buffers kept from one call to the next must not leak into a smaller, larger or emptier one."""
    for n, geometry in (
        (64, "collapsed"),
        (3, "random"),
        (0, "random"),
        (300, "trained"),
        (1, "collapsed"),
        (17, "random"),
    ):
        problem = GEOMETRIES[geometry](max(n, 1), 331, 64)
        problem = Problem(problem.x[:n], problem.w, problem.labels[:n], problem.upstream[:n])
        check(case32, problem, filter_eps=2.0**-16)


def test_two_losses_alive_at_once(case32):
    """Forward, forward, backward, backward: each backward uses what its own forward saved."""
    problems = [trained_problem(32, 331, 96, seed=3), collapsed_problem(32, 331, 96, seed=4)]
    expected = [run(case32, problem) for problem in problems]
    alive = []
    for problem in problems:
        x, w = (t.to(case32.device, copy=True).requires_grad_() for t in (problem.x, problem.w))
        labels, upstream = problem.labels.to(case32.device), problem.upstream.to(case32.device)
        alive.append((x, w, sface_loss(x, w, labels, reduction="none", backend=case32.backend), upstream))
    for _, _, rows, upstream in alive:
        rows.backward(upstream)
    for (x, w, _, _), result in zip(alive, expected, strict=True):
        assert torch.equal(x.grad, result.grad_x) and torch.equal(w.grad, result.grad_w)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_gradient_belongs_to_its_process(case32):
    """What a forked data loader writes into memory it inherited must not reach the trainer: no shared mappings."""
    if case32.device != "cpu":
        pytest.skip("a forked process has no GPU")
    problem = trained_problem(4, 17_000, 512)  # ∂w of 35 MB, past the sizes from which memory is mapped
    grad = run(case32, problem).grad_w
    expected = grad[:2].clone()
    child = os.fork()
    if child == 0:
        grad[0, 0] += 1
        os._exit(0)
    os.waitpid(child, 0)
    assert torch.equal(grad[:2], expected)
