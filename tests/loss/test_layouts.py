"""Odd memory layouts and mixed precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import sface_loss
from tests.support.cases import f32
from tests.support.checks import Result, assert_same, cached_judge, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, trained_problem

nan, inf = math.nan, math.inf


# A view as odd as a user may hold, and the plain tensor that it equals.
LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "columns of a wider tensor": lambda t: F.pad(t, (3, 2))[:, 3:-2],
    "rows of a taller tensor": lambda t: F.pad(t, (0, 0, 1, 1))[1:-1],
    "unaligned": lambda t: F.pad(t.reshape(-1), (1, 0))[1:].view(t.shape),
    "backwards": lambda t: t.flip(0).flip(0),
}


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("geometry", ["trained", "collapsed"])
    def test_views(self, case, geometry, layout):
        """The same from a view, to the last bit but in PyTorch, whose products sum in an order of the strides."""
        shape = (7, 70, 37) if case.emulated else (21, 130, 37)
        plain = GEOMETRIES[geometry](*shape).to(case.device, case.dtype, case.weight_dtype)
        judge = cached_judge(GEOMETRIES[geometry], shape, case.dtype, case.weight_dtype, filter_eps=0.0)
        for where in ("xw",) if case.emulated else ("x", "w"):
            leaf = {"x": plain.x.clone().requires_grad_(), "w": plain.w.clone().requires_grad_()}
            used = {**leaf, **{name: LAYOUTS[layout](leaf[name]) for name in where}}
            assert all(torch.equal(used[name], leaf[name]) for name in where)
            rows = sface_loss(
                used["x"], used["w"], plain.labels, reduction="none", filter_eps=0.0, backend=case.backend
            )
            rows.backward(plain.upstream.to(rows.dtype))
            result = Result(rows.detach(), None, leaf["x"].grad, leaf["w"].grad)
            judge.check(result, case.backend)
            if case.backend == "native":
                assert_same(result, run(case, plain, filter_eps=0.0))

    @pytest.mark.parametrize("where", ["x", "w"])
    def test_expanded_rows(self, case32, where):
        """Stride 0: one row that stands for all."""
        problem = trained_problem(21, 130, 37).to(case32.device, f32, f32)
        rows = getattr(problem, where)
        view = rows[:1].expand_as(rows)
        plain = problem._replace(**{where: view.contiguous()})
        x, w = (view if name == where else getattr(problem, name) for name in ("x", "w"))
        rows = sface_loss(x, w, problem.labels, reduction="none", backend=case32.backend).double().cpu()
        t = truth(*plain)
        assert ((rows - t.row_loss).abs() <= t.worst.loss).all()

    @pytest.mark.parametrize("make", [
        lambda y: y.int(), lambda y: y.short(), lambda y: y.to(torch.uint8), lambda y: y.to(torch.int8), lambda y: y.unsqueeze(1),
        lambda y: torch.cat([y[:1], y])[1:], lambda y: y.repeat_interleave(2)[::2],
        lambda y: torch.stack([y, y], 1)[:, :1],
    ], ids=["int32", "int16", "uint8", "int8", "[N, 1]", "labels[1:]", "labels[::2]", "a column"])  # fmt: skip
    def test_labels(self, case32, make):
        problem = trained_problem(21, 120, 37)
        assert_same(run(case32, problem._replace(labels=make(problem.labels))), run(case32, problem))

    def test_uint8_ignore_index(self, case32):
        """255 marks rows to ignore in uint8 labels; −100 fits no uint8 and must not wrap round to 156."""
        problem = trained_problem(21, 200, 37)
        problem.labels[3], problem.labels[4] = 156, 255
        labels = problem.labels.to(torch.uint8)
        rows = run(case32, problem._replace(labels=labels), ignore_index=255).row_loss
        assert rows[3] != 0 and rows[4] == 0

    @pytest.mark.parametrize("upstream", [
        lambda n: torch.tensor(-1.5).expand(n), lambda n: torch.randn(2 * n)[::2], lambda n: torch.randn(n, 3)[:, 1],
    ], ids=["expanded", "strided", "a column"])  # fmt: skip
    def test_upstream_gradient(self, case32, upstream):
        problem = trained_problem(21, 130, 37)
        view = upstream(21)
        expected = run(case32, problem._replace(upstream=view.contiguous()))
        x, w = (t.to(case32.device, copy=True).requires_grad_() for t in (problem.x, problem.w))
        rows = sface_loss(x, w, problem.labels.to(case32.device), reduction="none", backend=case32.backend)
        grads = torch.autograd.grad(rows, (x, w), view.to(case32.device))
        assert torch.equal(grads[0], expected.grad_x) and torch.equal(grads[1], expected.grad_w)
