"""Exact calls of the C++ backend whose far pairs go through int16 products (docs/math.md, 3): AVX-512 with VNNI. On
other instruction sets the same calls go through dense products and have to keep the same."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from sface_kernels.backends import native as backend
from tests.support.checks import Judge, Result, assert_same, run
from tests.support.problems import Problem, random_problem

HYPER = (64.0, 80.0, 80.0, 0.8, 1.23)
N, C, D = 40, 331, 200
DENSE, AGAIN, FAR = -1, -2, -3  # kDenseStored, kRecompute and kFar of csrc/cpu/kernels.h


@pytest.fixture
def has_far(native) -> bool:
    return os.environ.get("SFACE_CPU_ISA", torch.ops.sface.native_instruction_sets()[0]) == "avx512_vnni"


def records(problem: Problem, hyper=HYPER, filter_eps=0.0, words=12 << 20) -> torch.Tensor:
    """The count of each record, by groups of samples and blocks of classes."""
    arguments = (problem.x, problem.w, problem.labels, *hyper, filter_eps, True, True, words)
    return torch.ops.sface.native_forward(*arguments)[-2].view(-1, 2)[:, 1]


def on_their_centres(problem: Problem) -> Problem:
    return problem._replace(x=problem.w[problem.labels].clone())


@pytest.mark.parametrize(
    "far, problem, options",
    [
        (True, random_problem(N, C, D), {}),
        (True, random_problem(N, C, D), dict(filter_eps=2.0**-126)),
        (True, random_problem(N, C, D), dict(hyper=(64.0, 80.0, 160.0, 0.8, 1.23))),
        (False, random_problem(N, C, D), dict(hyper=(64.0, 80.0, 161.0, 0.8, 1.23))),
        (False, random_problem(N, C, D), dict(hyper=(64.0, 80.0, 5.0, 0.8, 1.23))),  # every pair is near
        (False, random_problem(N, C, 127), {}),
        (False, random_problem(31, C, D), {}),
        (False, on_their_centres(random_problem(N, C, D)), {}),  # nothing is small beside the own coefficients
    ],
)
def test_when(has_far, far, problem, options):
    found = records(problem, **options)
    assert (found <= FAR).all() if far and has_far else (found == DENSE).all()


def test_a_small_second_group_is_dense(has_far):
    found = records(random_problem(257, C, D)).view(2, -1)
    assert (found[1] == DENSE).all() and ((found[0] <= FAR).all() if has_far else (found[0] == DENSE).all())


def test_no_room_is_computed_again(has_far):
    n, c = 33, 150 * 48  # of more blocks than tasks, each of which has its part of the arena
    problem = random_problem(n, c, 128)
    assert (records(problem, words=0) == AGAIN).all()
    found = records(problem, words=n * c // 2)
    assert (found == AGAIN).any() and ((found <= FAR).any() if has_far else (found == DENSE).any())
    assert not (records(problem) == AGAIN).any()


@pytest.mark.parametrize("n", [31, 70, 300])
def test_what_is_computed_again_is_the_same(native, monkeypatch, n):
    problem = random_problem(n, C, D)
    kept = run("native", problem, filter_eps=0.0)
    monkeypatch.setattr(backend, "ARENA_WORDS", n * C // 3)
    assert_same(run("native", problem, filter_eps=0.0), kept)


def beside_a_far_block() -> Problem:
    """Samples that are near every class of the second block and far from the others'."""
    problem = random_problem(N, 3 * 48, D)
    common = torch.ones(D) / D**0.5
    x = F.normalize(problem.x) + 1.0 * common
    w = F.normalize(problem.w - (problem.w @ common).unsqueeze(1) * common)
    w[48:96] += 0.6 * common
    return problem._replace(x=x, w=w, labels=torch.arange(N) % 48)


def test_a_block_of_near_pairs_is_dense(has_far):
    """And so are the next ones of its task, without a look: here each block is a task of its own."""
    problem = beside_a_far_block()
    found = records(problem)
    assert found[1] == DENSE and ((found[[0, 2]] <= FAR).all() if has_far else (found == DENSE).all())
    Judge(problem, filter_eps=0.0).check(run("native", problem, filter_eps=0.0), "native")


def test_near_pairs_are_listed(has_far):
    """Every pair whose coefficient is not small beside the own ones, which are s here; few of the others."""
    problem = random_problem(64, 480, 512)
    cosine = F.normalize(problem.x.double()) @ F.normalize(problem.w.double()).t()
    cosine[torch.arange(64), problem.labels] = -1
    share = torch.sigmoid(-80 * (cosine.acos() - 1.23))
    shortest, longest = problem.x.norm(dim=1).min(), problem.x.norm(dim=1).max()
    least = int((share > 2.0**-20).sum())
    most = int((share > 2.0**-21 * shortest / longest).sum())
    listed = int((FAR - records(problem)).sum())
    assert 0 < least < most
    if has_far:
        assert least <= listed <= most


@pytest.fixture
def problem() -> Problem:
    return random_problem(70, C, D)


@pytest.fixture
def result(native, problem) -> Result:
    return run("native", problem, filter_eps=0.0)


def test_every_pair_counts_as_active(native, problem, result):
    assert result.stats.active_pairs == len(problem.x) * (C - 1)
    assert result.stats.dense_share == 1 and result.stats.dropped == 0


@pytest.mark.parametrize("exponent", [-60, -20, 30, 60])
def test_scaled_upstream(native, problem, result, exponent):
    """Coefficients are scaled by their sum, so a power of two goes through to the last bit."""
    scaled = run("native", problem._replace(upstream=problem.upstream * 2.0**exponent), filter_eps=0.0)
    assert torch.equal(scaled.grad_w, result.grad_w * 2.0**exponent)
    assert torch.equal(scaled.grad_x, result.grad_x * 2.0**exponent)


def test_no_upstream_at_all(native, problem):
    none = run("native", problem._replace(upstream=torch.zeros(70)), filter_eps=0.0)
    assert (none.grad_w == 0).all() and (none.grad_x == 0).all()


def test_ignored_samples_add_nothing(native, problem):
    """Among the others in panels and in words of two samples, and whatever they hold."""
    ignored = [0, 3, 16, 19, 40, 69]
    kept = [i for i in range(70) if i not in ignored]
    x, labels = problem.x.clone(), problem.labels.clone()
    labels[ignored] = -100
    x[3], x[40] = 1e30, problem.w[17]
    all_of_them = run("native", problem._replace(x=x, labels=labels), filter_eps=0.0)
    alone = Problem(problem.x[kept], problem.w, problem.labels[kept], problem.upstream[kept])
    Judge(alone, filter_eps=0.0).check(all_of_them._replace(**of_rows(all_of_them, kept)), "native")
    assert (all_of_them.grad_x[ignored] == 0).all()


def of_rows(result: Result, rows: list[int]) -> dict[str, torch.Tensor]:
    return dict(row_loss=result.row_loss[rows], grad_x=result.grad_x[rows])


def test_the_same_bits_again(native, problem, result):
    assert_same(run("native", problem, filter_eps=0.0), result)
