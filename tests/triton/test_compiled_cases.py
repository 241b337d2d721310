"""Every kind of call, each in two random orders of programs, warps and lanes: right, and the same bits.

On a GPU, where the order is the scheduler's, or in the PTX emulator: `make test-compiled`. Not in the interpreter, which
has one order and no compiler.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest
import torch

from sface_kernels.backends.triton import plan
from sface_kernels.validation import default_filter_eps
from tests.support.cases import Case, bf16, f16, f32
from tests.support.checks import Judge, Result, assert_rows_within, run, stored_rounding
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, Problem

compiled = sys.modules.get("tests.triton.compiled")
EMULATOR = compiled.emulator if compiled else None
CASE = Case("triton", "cuda" if torch.cuda.is_available() else "cpu", f32, f32)
pytestmark = pytest.mark.skipif(
    EMULATOR is None and not torch.cuda.is_available(), reason="there is neither a GPU nor an emulator"
)
FAST = 2.0**-16


def orders(call: Callable[[], Result]) -> Result:
    """The result of two calls, which have the same bits."""
    results = []
    for seed in (0, 1):  # 0: in order
        torch.manual_seed(0)
        if EMULATOR is not None:
            EMULATOR.options.seed = seed
        results.append(call())
    tensors = [(r.row_loss, r.grad_x, r.grad_w, *r.stats) for r in results]
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(*tensors, strict=True))
    return results[0]


def judged(problem: Problem, half_products: bool = False, **options) -> Result:
    """Within the budgets of every backend, the count of active pairs and the certificate too.

    With `half_products` the a-priori bound is that of products of fp16: what computes samples with an overflow and
    dense calls where the embeddings are half, and only there.
    """
    judge, result = Judge(problem, **options), orders(lambda: run(CASE, problem, **options))
    t = judge.truth
    if half_products and problem.x.dtype != f32:
        t = truth(*problem, dtype=f16, **options)
        for name, bound in (
            ("row_loss", t.worst.loss),
            ("grad_x", t.worst.x + t.flip_x + stored_rounding(t.grad_x, problem.x.dtype)),
            ("grad_w", t.worst.w + t.flip_w + stored_rounding(t.grad_w, problem.w.dtype)),
        ):
            assert_rows_within(name, getattr(result, name).double().cpu() - getattr(t, name), bound)
    else:
        judge.check(result, "triton")
    if options.get("filter_eps") != 0:
        assert abs(int(result.stats.active_pairs) - int(t.active.sum())) <= int(t.borderline.sum())
    counted = max(1, int((problem.labels != options.get("ignore_index", -100)).sum()))
    dropped = float(t.dropped.sum() / counted)
    assert abs(float(result.stats.dropped) - dropped) <= 0.1 * dropped + 64 * 2.0**-16
    return result


def _grid() -> list:
    """Every shape; dtypes, filters and geometries rotate, so that every two of them meet."""
    dtypes = itertools.cycle([(f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f16, f16)])
    filters = itertools.cycle([FAST, None, 0.0])
    geometries = itertools.cycle(list(GEOMETRIES) + list(GEOMETRIES)[:1])
    shapes = itertools.product((1, 3, 33, 130), (1, 17, 129, 1000), (1, 3, 64, 100, 128, 200))
    return [(shape, next(dtypes), next(filters), next(geometries)) for shape in shapes]


@pytest.mark.parametrize("shape, dtypes, filter_eps, geometry", _grid(), ids=str)
def test_grid(shape, dtypes, filter_eps, geometry):
    problem = GEOMETRIES[geometry](*shape).to("cpu", *dtypes)
    judged(problem, filter_eps=default_filter_eps(dtypes[0], shape[2]) if filter_eps is None else filter_eps)


@pytest.mark.parametrize("dtypes", [(f32, f32), (bf16, f32), (f16, f16)], ids=str)
@pytest.mark.parametrize("stripes, capacity", [(1, 1), (3, 2), (2, 24), (5, 128)])
def test_overflow(lists, stripes, capacity, dtypes):
    lists(stripes, capacity)
    judged(GEOMETRIES["trained"](21, 300, 100).to("cpu", *dtypes), half_products=True, filter_eps=FAST)


def test_few_samples_overflow(lists):
    problem, hot = (GEOMETRIES[geometry](130, 1000, 200) for geometry in ("random", "collapsed"))
    x = torch.where((torch.arange(130) % 13 == 5)[:, None], hot.w[7] * 3 + 0.01 * hot.x, problem.x)
    near = hot.w[7] + 0.3 * hot.w.norm(dim=1).mean() * problem.w / problem.w.norm(dim=1, keepdim=True)
    lists(8, 3)  # each of a tile, the first of which needs more, for 400 near pairs and some others
    result = judged(
        problem._replace(x=x, w=torch.where((torch.arange(1000) < 40)[:, None], near, problem.w)), filter_eps=FAST
    )
    assert 0 < float(result.stats.dense_share) < 0.5


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_dense_with_a_filter(monkeypatch, dtype):
    problem = GEOMETRIES["trained"](24, 200, 48).to("cpu", dtype, f32)
    monkeypatch.setattr(plan, "way_of", lambda *_: plan.Way(dense=True))
    result = judged(problem, half_products=True, filter_eps=FAST)
    assert float(result.stats.dense_share) == 1


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
@pytest.mark.parametrize(
    "shape, dtype", [((300, 2087, 512), bf16), ((9, 211, 1031), f32), ((5, 40, 4096), f16)], ids=str
)
def test_large_shapes(shape, dtype, filter_eps):
    judged(GEOMETRIES["trained"](*shape).to("cpu", dtype, f32), filter_eps=filter_eps)


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
class TestOddRows:
    def test_ignored_ones(self, filter_eps):
        """What they hold changes nothing."""
        problem = GEOMETRIES["trained"](33, 129, 64)
        problem.labels[::4] = -100
        clean = judged(problem, filter_eps=filter_eps)
        problem.x[4], problem.x[8, 3] = torch.nan, torch.inf
        result = run(CASE, problem, filter_eps=filter_eps)
        assert all(
            torch.equal(getattr(clean, name), getattr(result, name)) for name in ("row_loss", "grad_x", "grad_w")
        )

    def test_all_of_them_ignored(self, filter_eps):
        problem = GEOMETRIES["trained"](5, 40, 20)
        problem.labels[:] = -100
        result = orders(lambda: run(CASE, problem, filter_eps=filter_eps))
        assert not (result.row_loss.any() or result.grad_x.any() or result.grad_w.any())

    def test_nan_and_infinity(self, filter_eps):
        """NaN just where the reference has it, and near it elsewhere."""
        problem = GEOMETRIES["trained"](12, 60, 24)
        problem.x[3, 5], problem.x[7] = torch.nan, torch.inf
        theirs = run("reference", problem.to("cpu", torch.float64, torch.float64), filter_eps=filter_eps)
        result = orders(lambda: run(CASE, problem, filter_eps=filter_eps))
        for name in ("row_loss", "grad_x", "grad_w"):
            a, b = getattr(result, name).double().cpu(), getattr(theirs, name).double()
            assert torch.equal(a.isnan(), b.isnan()), name
            assert (a - b).nan_to_num(0).abs().max() <= 2e-3 * b.nan_to_num(0).abs().max(), name

    def test_nan_in_a_row_of_w(self, filter_eps):
        problem = GEOMETRIES["trained"](12, 60, 24)
        problem.w[59, 5] = torch.nan
        result = orders(lambda: run(CASE, problem, filter_eps=filter_eps))
        assert result.row_loss.isnan().all() and result.grad_x.isnan().all()

    def test_copies_and_opposites(self, filter_eps):
        """Cosines of 1 and −1."""
        problem = GEOMETRIES["random"](20, 60, 33)
        problem.w[30:] = problem.w[:30] * 2
        problem.x[:10] = problem.w[problem.labels[:10]] * 3
        problem.x[10:] = -problem.w[problem.labels[10:]] * 0.5
        judged(problem, filter_eps=filter_eps)

    def test_zeros_tiny_and_huge(self, filter_eps):
        problem = GEOMETRIES["random"](12, 40, 48)
        problem.x[1], problem.w[5] = 0, 0
        problem.x[2] *= 1e30
        problem.x[3] *= 1e-30
        problem.w[6] *= 1e28
        problem.w[7] *= 1e-25
        theirs = run("reference", problem.to("cpu", torch.float64, torch.float64), filter_eps=filter_eps)
        ours = orders(lambda: run(CASE, problem, filter_eps=filter_eps))
        for name in ("row_loss", "grad_x", "grad_w"):
            a, b = getattr(ours, name).double().cpu(), getattr(theirs, name).double()
            size = b.reshape(len(b), -1).norm(dim=1)
            if name == "grad_w":  # sums are fixed-point, to 2⁻³⁹ of the largest coefficient
                size = size + 2.0**-30 / problem.w.double().norm(dim=1).clamp_min(1e-12)
            assert ((a - b).reshape(len(a), -1).norm(dim=1) <= 2e-2 * size.clamp_min(1e-300)).all(), name


@pytest.mark.parametrize("filter_eps", [FAST, 0.0])
@pytest.mark.parametrize("need_x, need_w", [(True, False), (False, True), (False, False)])
def test_which_gradients_are_wanted_changes_no_bit(need_x, need_w, filter_eps):
    from sface_kernels import sface_loss

    problem = GEOMETRIES["trained"](33, 129, 64).to(CASE.device, f32, f32)
    x, w = problem.x.clone().requires_grad_(need_x), problem.w.clone().requires_grad_(need_w)
    whole = run(CASE, problem, filter_eps=filter_eps)
    rows = sface_loss(x, w, problem.labels, reduction="none", backend="triton", filter_eps=filter_eps)
    if need_x or need_w:
        rows.backward(problem.upstream)
    assert torch.equal(rows.detach(), whole.row_loss)
    assert not need_x or torch.equal(x.grad, whole.grad_x)
    assert not need_w or torch.equal(w.grad, whole.grad_w)
