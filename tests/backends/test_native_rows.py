"""Rows of embeddings and of the weight of any length, from 1e-12 to the largest float, in the C++ backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import sface_loss
from sface_kernels.backends import native as backend
from tests.support.cases import bf16, f32
from tests.support.checks import assert_rows_within, run
from tests.support.oracle import truth
from tests.support.problems import random_problem, trained_problem


class TestRowsOfAnyLength:
    """Up to the largest float, where fp32 can neither square a component nor hold 1/‖w‖."""

    LARGEST = 3e38

    @pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-24])
    @pytest.mark.parametrize("words", [backend.ARENA_WORDS, 0], ids=["listed", "computed again"])
    def test_as_the_same_directions(self, native, monkeypatch, filter_eps, flush, words):
        monkeypatch.setattr(backend, "ARENA_WORDS", words)
        problem = trained_problem(40, 150, 96)
        x, w = problem.x.clone(), problem.w.clone()
        for rows, places in ((x, (0, 3)), (w, (0, 7, 149))):
            for i in places:
                rows[i] *= 1 / rows[i].abs().max()
                rows[i] *= self.LARGEST
        x[5] *= 2.0**80
        for row, factor in enumerate((2.0**20, 2.0**40, 2.0**57, 2.0**61, 2.0**90, 2.0**120, 2.0**-21, 2.0**-38), 60):
            w[row] *= factor
        assert torch.isfinite(x).all() and torch.isfinite(w).all()
        try:
            torch.set_flush_denormal(flush)
            result = run(native, problem._replace(x=x, w=w), filter_eps=filter_eps)
        finally:
            torch.set_flush_denormal(False)
        t = truth(x, w, problem.labels, problem.upstream, filter_eps=filter_eps)
        assert_rows_within("row_loss", result.row_loss.double() - t.row_loss, t.worst.loss + t.screen_loss["native"])
        # a gradient that fp32 cannot hold as a normal number may be 0 when denormals are flushed
        lost = torch.finfo(f32).tiny * 96**0.5 * 64 if flush else torch.finfo(f32).tiny * 2.0**-22 * 96**0.5
        assert_rows_within("grad_x", result.grad_x.double() - t.grad_x, t.worst.x + t.flip_x + lost)
        # 1 % of far pairs' rows where they have coarse products (docs/math.md, 3), which a tile computed again has not
        coarse = 0.01 * t.grad_w.norm(dim=1) if filter_eps == 0 and words else 0
        assert_rows_within("grad_w", result.grad_w.double() - t.grad_w, t.worst.w + t.flip_w + lost + coarse)

    def test_near_the_longest(self, native):
        """Whether a row is longer is asked of two sums; here the last of each block is, and the others may be by either."""
        directions = torch.randn(100, 48, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        w = (F.normalize(directions, dim=2) * 2.0**60).float()
        w[:, 47] *= 1000
        own = torch.arange(4800).view(100, 48)[:, :44].flatten()
        w = w.view(4800, 64)
        options = dict(filter_eps=2.0**-24, backend="native", return_stats="rows")
        _, stats = sface_loss(w[own] * 2.0**-60, w, own, reduction="none", **options)
        assert (stats.cos_target > 0.999).all()

    @pytest.mark.parametrize("norm, upstream", [(1.5e-12, 1e16), (1e18, 1.0)])
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-24])
    def test_every_class_by_itself(self, native, norm, upstream, filter_eps):
        """Coefficients of 1/‖w‖² leave float32 here; the gradient does not."""
        problem = random_problem(40, 150, 96)
        w = F.normalize(problem.w) * norm
        scaled = problem._replace(w=w, upstream=problem.upstream * upstream)
        t = truth(*scaled, filter_eps=filter_eps)
        result = run(native, scaled, filter_eps=filter_eps)
        clear = (t.grad_w.norm(dim=1) > 0) & (t.flip_w.flatten() == 0)
        off = (result.grad_w.double() - t.grad_w).norm(dim=1) / t.grad_w.norm(dim=1)
        assert int(clear.sum()) > 20 and float(off[clear].max()) < 0.01

    def test_bfloat16(self, native):
        """The only half that reaches so far."""
        problem = trained_problem(20, 100, 64).to("cpu", bf16, bf16)
        x, w = problem.x.clone(), problem.w.clone()
        for row in (x[1], w[7]):
            row *= 1 / row.abs().max()
            row *= self.LARGEST
        result = run(native, problem._replace(x=x, w=w), filter_eps=2.0**-12)
        t = truth(x, w, problem.labels, problem.upstream, filter_eps=2.0**-12)
        assert_rows_within("row_loss", result.row_loss.double() - t.row_loss, t.worst.loss + t.screen_loss["native"])
