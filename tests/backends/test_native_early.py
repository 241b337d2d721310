"""Rows of ∂w that the C++ forward makes early: bit for bit those of the backward, made only where they will be wanted."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from sface_kernels import sface_loss
from sface_kernels.backends import native as backend
from sface_kernels.backends.native import EarlyRows, UpstreamHistory
from sface_kernels.bench.providers import resolve
from sface_kernels.bench.timing import TimedLoss
from sface_kernels.ops import prepare_labels
from sface_kernels.testing.workloads import Case, Shape, make_workload
from sface_kernels.types import INVALID, NO_TARGET
from tests.backends.test_native_fuzz import size
from tests.support.problems import GEOMETRIES, Problem, trained_problem

LATER, MADE, ZEROS = 0, 1, 2  # Early of csrc/cpu/early_rows.h
HYPER = [64.0, 80.0, 80.0, 0.8, 1.23]
POISON = 12345.0


def both_ways(
    x: Tensor, w: Tensor, target: Tensor, filter_eps: float, upstream: float, mean: bool, words: int = 1 << 20
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂w of the backward alone, what the forward left early, what has become of the rows, and ∂w finished."""
    hyper = (*HYPER, filter_eps)
    *plain, counted = torch.ops.sface.native_forward(x, w, target, *hyper, True, True, words)
    grad_row = torch.tensor(upstream)
    if mean:
        grad_row = grad_row / counted
    grad_row = grad_row.expand(len(x)).contiguous()
    expected = torch.ops.sface.native_grad_weight(x, w, target, grad_row, *hyper, *plain[5:])

    early = torch.full(w.shape, POISON)
    rows = torch.full((len(w),), 77, dtype=torch.uint8)
    *others, _ = torch.ops.sface.native_forward_early(x, w, target, *hyper, True, words, upstream, mean, early, rows)
    for one, other in zip(plain[:7], others[:7], strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    whole = early.clone()
    torch.ops.sface.native_grad_weight_rest(x, w, target, grad_row, *hyper, *others[5:], whole, rows)
    return expected, early, rows, whole


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def check(expected: Tensor, early: Tensor, rows: Tensor, whole: Tensor) -> None:
    assert rows.max() <= ZEROS
    assert (early[rows != MADE] == POISON).all()  # what the backward is to write is left alone
    assert same(early[rows == MADE], expected[rows == MADE])
    assert (expected[rows == ZEROS] == 0).all()
    assert same(whole, expected)


@pytest.mark.parametrize("seed", range(60))
def test_random_calls(seed, native):
    rng = random.Random(seed)
    n, c, d = size(rng, 256), size(rng, 300), size(rng, 300)
    problem = GEOMETRIES[rng.choice(list(GEOMETRIES))](n, c, d, seed=seed)
    labels = problem.labels.clone()
    labels[torch.rand(n) < 0.2] = -100
    target = prepare_labels(labels, c, -100, False)
    target[torch.rand(n) < 0.1] = NO_TARGET
    if rng.random() < 0.3:
        target[torch.rand(n) < 0.1] = INVALID
    w, filter_eps = problem.w.clone(), rng.choice([2.0**-24, 2.0**-16, 0.3, 0.0])
    odd = rng.choice(["none", "none", "nan", "long", "zero", "tiny", "x", "stride"])
    row = rng.randrange(c)
    if odd == "nan":
        w[row] = torch.nan
    elif odd in ("long", "tiny"):
        w[row] *= 2.0**100 if odd == "long" else 2.0**-60
    elif odd == "zero":
        w[row] = 0
    elif odd == "x":
        problem.x[rng.randrange(n), 0] = torch.nan
    elif odd == "stride":
        w = torch.cat([w, w], 1)[:, :d]
    words = rng.choice([1 << 20, 0, 2 * c])
    check(*both_ways(problem.x, w, target, filter_eps, rng.choice([1.0, 0.3, 65536.0]), rng.random() < 0.5, words))


def test_what_is_made(native):
    """Of listed blocks the rows with a gradient; of none where ∂w is not finite, or a row of w in the block is not."""
    problem = trained_problem(32, 300, 64)
    target = prepare_labels(problem.labels, 300, -100, True)
    x, w = problem.x, problem.w
    expected, _, rows, _ = results = both_ways(x, w, target, 2.0**-16, 1.0, True)
    check(*results)
    assert torch.equal(rows == MADE, (expected != 0).any(1)) and {*rows.tolist()} == {MADE, ZEROS}
    for upstream in (torch.inf, torch.nan):
        assert (both_ways(x, w, target, 2.0**-16, upstream, True)[2] == LATER).all()
    w = w.clone()
    w[100] = torch.inf
    check(*(results := both_ways(x, w, target, 2.0**-16, 1.0, True)))
    assert (results[2][96:144] == LATER).all() and (results[2][:96] != LATER).all()


def test_what_it_refuses(native):
    problem = trained_problem(257, 20, 8)
    target = prepare_labels(problem.labels, 20, -100, True)
    with pytest.raises(RuntimeError, match="at most 256 samples"):
        both_ways(problem.x, problem.w, target, 2.0**-16, 1.0, True)
    x, w, rest = problem.x[:4], problem.w, (*HYPER, 2.0**-16, True, 80, 1.0, True)
    for grad_w, rows, text in (
        (torch.empty(20, 9), torch.empty(20, dtype=torch.uint8), "grad_w: expected"),
        (torch.empty(20, 8), torch.empty(20), "rows: expected"),
    ):
        with pytest.raises(RuntimeError, match=text):
            torch.ops.sface.native_forward_early(x, w, target[:4], *rest, grad_w, rows)


def test_history():
    """What came twice, with one forward between, is expected once."""
    history, w, other = UpstreamHistory(), torch.ones(2), torch.ones(2)
    assert history.expect(w) is None
    for upstream, expected in ((1.0, None), (1.0, 1.0), (1.0, 1.0), (0.5, None), (0.5, 0.5), (torch.nan, None)):
        history.learn(w, upstream)
        assert history.expect(other) is None
        assert history.expect(w) == expected
    history.learn(w, torch.nan)
    assert history.expect(w) is None
    for _ in range(3):  # two forwards for each backward
        history.learn(w, 1.0)
        assert history.expect(w) is None and history.expect(w) is None
    history.learn(w, 1.0)  # and two backwards for a forward
    history.learn(w, 1.0)
    assert history.expect(w) is None
    for one in [torch.ones(1) for _ in range(2 * history.WEIGHTS)]:
        history.expect(one)
        history.learn(one, 1.0)
    assert len(history._last) == history.WEIGHTS


class TestSteps:
    """Steps as a training makes them; ∂w is large enough for its memory to be kept (8 MiB)."""

    @pytest.fixture
    def made(self, native, monkeypatch) -> list[int]:
        """Of each forward from now on where it makes rows of ∂w; 0: it makes none."""
        found: list[int] = []

        def watched(*arguments: Tensor) -> EarlyRows | None:
            early = early_rows(*arguments)
            found.append(early.grad_w.data_ptr() if early is not None else 0)
            return early

        early_rows = backend._early_rows
        monkeypatch.setattr(backend, "_early_rows", watched)
        monkeypatch.setattr(backend, "_upstreams", UpstreamHistory())  # a weight may lie where an earlier test's lay
        torch.ops.sface.native_release_memory()
        return found

    @pytest.fixture
    def problem(self) -> Problem:
        return trained_problem(16, 9001, 256)

    @staticmethod
    def loss(problem: Problem, w: Tensor, **options: object) -> Tensor:
        return sface_loss(problem.x, w, problem.labels, backend="native", **options)

    def test_from_the_third_on(self, made, problem):
        w = problem.w.requires_grad_()
        grads = []
        for _ in range(4):
            w.grad = None
            self.loss(problem, w).backward()
            grads.append(w.grad.double().sum())
        assert [address != 0 for address in made] == [False, False, True, True]
        assert made[-1] == w.grad.data_ptr()  # given away, not copied
        assert len({float(total) for total in grads}) == 1

    def test_whatever_the_default_device(self, made, problem):
        w, results = problem.w.requires_grad_(), []
        for device in ("cpu", "cpu", "cpu", "meta", "meta"):
            w.grad = None
            with torch.device(device):
                loss = self.loss(problem, w)
                loss.backward()
            results.append((loss.detach(), w.grad.clone()))
        assert made[-1] != 0
        assert all(torch.equal(*pair) for result in results[1:] for pair in zip(result, results[0], strict=True))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_another_upstream_gradient_than_expected(self, made, problem, reduction):
        w = problem.w.requires_grad_()
        plain = torch.autograd.grad(self.loss(problem, w, reduction=reduction), w)[0].clone()
        for factor, early in ((1.0, False), (1.0, True), (0.5, True), (0.5, False), (0.5, True)):
            (grad,) = torch.autograd.grad(self.loss(problem, w, reduction=reduction) * factor, w)
            assert (made[-1] != 0) == early
            assert torch.equal(grad, plain * factor)
            del grad

    def test_not_where_it_would_take_memory(self, made, problem):
        """A gradient that is still held when the forward begins: zero_grad comes after it."""
        w = problem.w.requires_grad_()
        for _ in range(5):
            loss = self.loss(problem, w)
            w.grad = None
            loss.backward()
        assert made == [0] * 5

    def test_not_where_nothing_is_expected(self, made, problem):
        """A loss of each row, no filter, a float16 weight, more forwards than backwards."""
        w = problem.w.requires_grad_()
        half = problem.to("cpu", torch.float16, torch.float16)
        w16 = half.w.requires_grad_()
        for _ in range(3):
            self.loss(problem, w, reduction="none").sum().backward()
            self.loss(problem, w, filter_eps=0).backward()
            self.loss(half, w16).backward()
            w.grad = w16.grad = None
        for _ in range(3):
            self.loss(problem, w)
            self.loss(problem, w).backward()
            w.grad = None
        assert made == [0] * 9

    def test_a_second_backward(self, made, problem):
        w = problem.w.requires_grad_()
        for _ in range(2):
            self.loss(problem, w).backward()
            w.grad = None
        loss = self.loss(problem, w)
        (first,) = torch.autograd.grad(loss, w, retain_graph=True)
        copy = first.clone()
        (second,) = torch.autograd.grad(loss * 3, w)
        assert first.data_ptr() == made[-1] != second.data_ptr()
        assert torch.equal(first, copy)
        torch.testing.assert_close(second, 3 * first)

    def test_two_heads_and_gradient_accumulation(self, made, problem):
        weights = [problem.w.clone().requires_grad_(), (2 * problem.w).requires_grad_()]
        for step in range(4):
            for w in weights:
                w.grad = None
            for _ in range(2):
                torch.stack([self.loss(problem, w) for w in weights]).mean().backward()
            totals = [w.grad.clone() for w in weights]
            if step == 0:
                expected = totals
            assert all(torch.equal(*pair) for pair in zip(totals, expected, strict=True))
        assert any(made)

    def test_providers_of_a_benchmark_that_take_turns(self, made):
        """Each is timed as the one head of a training: with a weight, and a history of upstream gradients, to itself."""
        work = make_workload(Case(Shape(16, 9001, 256), "trained", None), "cpu", torch.float32)
        turns = [TimedLoss(resolve(name), work, "both") for name in ("native", "native@2^-16")]
        for _ in range(4):
            for one in turns:
                one.prepare()
                one.run()
        assert len(made) == 8 and not any(made[:4]) and all(made[4:])
