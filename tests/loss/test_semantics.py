"""What the loss means at the edges: ignored rows, degenerate geometry, NaN."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import sface_loss
from sface_kernels.ops import prepare_labels
from sface_kernels.types import IGNORED, INVALID, NO_TARGET
from tests.support.checks import Result, assert_rows_within, assert_same, check, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, Problem, random_problem, trained_problem

nan, inf = math.nan, math.inf


class TestIgnoredRows:
    @pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255, 10**12])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_they_count_nowhere(self, case32, geometry, ignore_index):
        """As if they were not in the batch: the others' losses and gradients are theirs alone, and the mean divides by them."""
        problem = GEOMETRIES[geometry](23, 300, 64)
        kept = torch.tensor([i % 3 != 1 for i in range(23)])
        labels = torch.where(kept, problem.labels, ignore_index)
        labels[kept & (labels == ignore_index)] = 1
        rest = Problem(problem.x[kept], problem.w, labels[kept], problem.upstream[kept])
        ignored = problem._replace(labels=labels)
        result = check(case32, ignored, filter_eps=2.0**-16, ignore_index=ignore_index)
        assert not result.row_loss[~kept].any() and not result.grad_x[~kept].any()
        alone = run(case32, rest, filter_eps=2.0**-16, ignore_index=ignore_index)
        t = truth(*rest, filter_eps=2.0**-16, ignore_index=ignore_index)
        assert ((result.row_loss[kept] - alone.row_loss).abs().cpu() <= 2 * t.worst.loss).all()
        for name in ("cos_target", "cos_other", "accuracy", "intra", "inter"):
            ours, theirs = float(getattr(result.stats, name)), float(getattr(alone.stats, name))
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), name
        assert abs(int(result.stats.active_pairs) - int(alone.stats.active_pairs)) <= int(t.borderline.sum())
        mean = sface_loss(
            problem.x.to(case32.device),
            problem.w.to(case32.device),
            labels.to(case32.device),
            ignore_index=ignore_index,
            backend=case32.backend,
        )
        assert float(mean) == pytest.approx(float(alone.row_loss.mean()), rel=1e-5)

    @pytest.mark.parametrize("poison", [nan, inf, 1e38])
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_what_they_hold_changes_nothing(self, case32, geometry, filter_eps, poison):
        """Padding rows may hold anything."""
        problem = GEOMETRIES[geometry](21, 300, 64)
        problem.labels[[0, 7, 20]] = -100
        clean = run(case32, problem, filter_eps=filter_eps)
        problem.x[[0, 7]] = poison
        problem.x[20, 5] = poison
        assert_same(run(case32, problem, filter_eps=filter_eps), clean)

    @pytest.mark.parametrize("poison", [nan, inf])
    def test_their_upstream_gradient_changes_nothing(self, case32, poison):
        """A weight of 1/0 for an ignored row leaves zeros there, as in `F.cross_entropy`."""
        problem = trained_problem(21, 300, 64)
        problem.labels[[0, 7, 20]] = -100
        clean = run(case32, problem)
        problem.upstream[[0, 7, 20]] = poison
        assert_same(run(case32, problem), clean)

    @pytest.mark.parametrize("poison", [nan, inf])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_the_upstream_gradient_of_all_does_not_reach_them(self, case32, reduction, poison):
        """A loss that overflowed leaves zeros there, as in `F.cross_entropy`, and shows in all other rows."""
        problem = trained_problem(21, 300, 64).to(case32.device, case32.dtype, case32.weight_dtype)
        problem.labels[[0, 7, 20]] = -100
        x = problem.x.clone().requires_grad_()
        loss = sface_loss(x, problem.w, problem.labels, reduction=reduction, backend=case32.backend)
        (loss * poison).backward()
        counted = problem.labels != -100
        assert not x.grad[~counted].any() and not x.grad[counted].isfinite().all(1).any()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("n", [0, 1, 5])
    def test_nothing_left(self, case, n, reduction):
        """All rows ignored, or no rows at all: loss 0, gradients zeros, statistics finite."""
        problem = random_problem(max(n, 1), 70, 24).to(case.device, case.dtype, case.weight_dtype)
        x, w = problem.x[:n].clone().requires_grad_(), problem.w.clone().requires_grad_()
        labels = torch.full((n,), -100, device=case.device)
        loss, stats = sface_loss(x, w, labels, reduction=reduction, return_stats=True, backend=case.backend)
        assert loss.shape == ((n,) if reduction == "none" else ()) and not loss.any()
        loss.sum().backward()
        assert x.grad.shape == x.shape and not x.grad.any()
        assert w.grad.shape == w.shape and not w.grad.any()
        assert all(float(value) == 0 for value in stats)


class TestDegenerateGeometry:
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    def test_cosines_of_exactly_one(self, case32, filter_eps):
        """A sample at its own centre, at another's, opposite to both; centres that are copies of one another."""
        g = torch.Generator().manual_seed(5)
        w = torch.randn(67, 48, generator=g)
        w[40] = w[3]
        w[41] = -w[3]
        w[42] = 2.5 * w[3]
        x = torch.stack([w[5], 3 * w[5], w[6], -w[5], -w[6], w[3], w[40], -w[42], torch.randn(48, generator=g)])
        labels = torch.tensor([5, 5, 5, 5, 5, 3, 3, 41, 42])
        problem = Problem(x, w, labels, torch.tensor([1.0, -2, 0.5, 1, 1, 3, 1, -1, 1]))
        result = check(case32, problem, filter_eps=filter_eps)
        assert all(torch.isfinite(t).all() for t in (result.row_loss, result.grad_x, result.grad_w))

    @pytest.mark.parametrize("d", [1, 2, 3, 16, 31, 512])
    def test_self_products_past_one(self, case32, d):
        """A third of normalised fp32 vectors have a product with themselves above 1, whose arccos is NaN without a clamp."""
        w = torch.randn(400, d, generator=torch.Generator().manual_seed(6))
        if d > 16:
            unit = F.normalize(w)
            assert ((unit @ unit.t()).diagonal() > 1).any()
        for sign in (1, -1):
            problem = Problem(sign * w[:300], w, torch.arange(300), torch.ones(300))
            result = check(case32, problem, filter_eps=2.0**-16)
            assert all(torch.isfinite(t).all() for t in (result.row_loss, result.grad_x, result.grad_w))
            assert float(result.stats.cos_target) == pytest.approx(sign, abs=1e-5)

    @pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e-13, 0.9e-12, 1.1e-12, 1e-6, 1e6, 1e15])
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    @pytest.mark.parametrize("where", ["x", "w"])
    def test_short_and_long_rows(self, case32, where, filter_eps, size):
        """Below 1e-12 `normalize` divides by a constant and projects nothing; above, length is only a factor of 1/‖·‖."""
        problem = trained_problem(20, 120, 64)
        rows = getattr(problem, where)
        some = torch.tensor([0, 7, 15])
        rows[some] = F.normalize(rows[some]) * size
        problem.labels[:2] = torch.tensor([7, 15])
        result = check(case32, problem, filter_eps=filter_eps)
        assert torch.isfinite(result.row_loss).all()
        if size == 0:
            zero_rows = (problem.x if where == "x" else problem.w).norm(dim=1) == 0
            grad = result.grad_x if where == "x" else result.grad_w
            assert torch.isfinite(grad).all() and grad[zero_rows.to(grad.device)].any()

    @pytest.mark.parametrize("where", ["x", "w"])
    def test_rows_whose_square_overflows(self, case32, where):
        """Norms past 1.8e19, whose square is no float32: the truth, or the row of zeros that `normalize` makes; never NaN."""
        problem = trained_problem(20, 120, 64)
        getattr(problem, where)[3] *= 1e20
        zeroed = problem._replace(**{where: getattr(problem, where).clone()})
        getattr(zeroed, where)[3] = 0
        result = run(case32, problem)
        assert all(torch.isfinite(t).all() for t in (result.row_loss, result.grad_x, result.grad_w))
        near = [
            (result.row_loss.cpu() - t.row_loss).norm() <= t.worst.loss.norm()
            for t in (truth(*problem), truth(*zeroed))
        ]
        assert any(near)

    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    def test_rows_whose_inverse_norm_underflows(self, case32, filter_eps):
        """A norm of 2e38 where denormals are flushed: 1/‖w_j‖ is 0, and so is the row, as `normalize` makes it; never NaN."""
        problem = trained_problem(20, 120, 64)
        zeroed = problem._replace(w=problem.w.clone())
        problem.w[3] *= 2e38 / problem.w[3].norm()
        zeroed.w[3] = 0
        if case32.device != "cpu" or not torch.set_flush_denormal(True):
            pytest.skip(f"{case32.device}: denormals cannot be flushed here")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the mode is a thread's own
        try:
            result = run(case32, problem, filter_eps=filter_eps)
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
        t = truth(*zeroed, filter_eps=filter_eps)
        assert all(torch.isfinite(value).all() for value in (result.row_loss, result.grad_x, result.grad_w))
        assert ((result.row_loss - t.row_loss).abs() <= t.worst.loss + t.screen_loss.get(case32.backend, 0)).all()
        assert ((result.grad_x - t.grad_x).norm(dim=1) <= t.worst.x + t.flip_x).all()

    @pytest.mark.parametrize("c", [1, 2])
    @pytest.mark.parametrize("n", [1, 2, 33])
    @pytest.mark.parametrize("d", [1, 2, 17])
    def test_next_to_nothing(self, case32, n, c, d):
        problem = random_problem(n, c, d)
        result = check(case32, problem, filter_eps=0.0)
        assert int(result.stats.active_pairs) <= n * (c - 1)
        if c == 1:
            assert float(result.stats.inter) == 0 and abs(float(result.stats.cos_other)) < 2e-7
            assert float(result.stats.accuracy) == 1

    def test_accuracy_counts_strict_winners_only(self, case32):
        """A tie with a duplicate centre is no hit; a clear winner is one, wherever its class stands."""
        w = torch.eye(100, 128)
        w[50] = w[49]
        x = w[[0, 47, 48, 49, 99, 3]].clone()
        labels = torch.tensor([0, 47, 48, 49, 99, 4])
        stats = run(case32, Problem(x, w, labels, torch.ones(6))).stats
        assert float(stats.accuracy) == pytest.approx(4 / 6)

    def test_label_at_both_ends(self, case32):
        """The first and the last class, on either side of every block of 48 and every chunk, are classes like any other."""
        for c in (47, 48, 49, 96, 97, 255, 256, 257, 8193):
            g = torch.Generator().manual_seed(c)
            labels = torch.tensor([0, c - 1, min(47, c - 1), min(48, c - 1)])
            problem = Problem(torch.randn(4, 20, generator=g), torch.randn(c, 20, generator=g), labels, torch.ones(4))
            check(case32, problem, filter_eps=2.0**-16)


class TestNotFinite:
    """NaN and Inf in the inputs reach the loss and the gradients they touch, as in the plain loss, and no others."""

    @staticmethod
    def masks(result: Result) -> dict[str, torch.Tensor]:
        return {name: torch.isnan(getattr(result, name)).cpu() for name in ("row_loss", "grad_x", "grad_w")}

    @pytest.mark.parametrize("poison", [nan, inf, -inf])
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_embedding(self, case32, geometry, filter_eps, poison):
        problem = GEOMETRIES[geometry](21, 300, 64)
        problem = problem._replace(upstream=torch.ones(21))
        problem.x[4, 9] = poison
        result = run(case32, problem, filter_eps=filter_eps)
        expected = torch.zeros(21, dtype=torch.bool)
        expected[4] = True
        masks = self.masks(result)
        assert torch.equal(masks["row_loss"], expected)
        assert torch.equal(masks["grad_x"], expected.unsqueeze(1).expand(21, 64))
        assert masks["grad_w"].all()
        for name, mask in self.masks(run("reference", problem, filter_eps=filter_eps)).items():
            assert torch.equal(masks[name], mask), name
        clean = GEOMETRIES[geometry](21, 300, 64)._replace(upstream=torch.ones(21))
        others, t = ~expected, truth(*clean, filter_eps=filter_eps)
        errors = (result.row_loss.cpu() - t.row_loss).abs()
        assert (errors <= t.worst.loss)[others].all(), "a row without NaN has another loss than before"

    @pytest.mark.parametrize("poison", [nan, inf, -inf])
    @pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("row", ["target of some", "target of none"])
    def test_weight(self, case32, geometry, filter_eps, poison, row):
        problem = GEOMETRIES[geometry](21, 300, 64)
        problem = problem._replace(upstream=torch.ones(21))
        j = int(problem.labels[2]) if row == "target of some" else 150
        if row == "target of none":
            problem.labels[problem.labels == j] = 0
        problem.w[j, 9] = poison
        result = run(case32, problem, filter_eps=filter_eps)
        masks = self.masks(result)
        expected = torch.zeros(300, dtype=torch.bool)
        expected[j] = True
        assert masks["row_loss"].all() and masks["grad_x"].all()
        assert torch.equal(masks["grad_w"], expected.unsqueeze(1).expand(300, 64))
        for name, mask in self.masks(run("reference", problem, filter_eps=filter_eps)).items():
            assert torch.equal(masks[name], mask), name
        clean = GEOMETRIES[geometry](21, 300, 64)._replace(upstream=problem.upstream, labels=problem.labels)
        t = truth(*clean, filter_eps=filter_eps)
        error, bound = result.grad_w.double().cpu() - t.grad_w, t.worst.w + t.flip_w
        assert_rows_within("grad_w of the other classes", error[~expected], bound[~expected])

    @pytest.mark.parametrize("poison", [nan, inf])
    def test_upstream_gradient(self, case32, poison):
        """An overflowed loss scale must be seen in both gradients, or GradScaler does not skip the step."""
        problem = trained_problem(21, 300, 64)
        problem.upstream[4] = poison
        result = run(case32, problem, filter_eps=2.0**-16)
        bad_x = ~torch.isfinite(result.grad_x).cpu()
        assert bad_x[4].all() and not bad_x[:4].any() and not bad_x[5:].any()
        assert not torch.isfinite(result.grad_w[problem.labels[4]]).any()


def test_a_label_without_a_dimension(case32):
    """One sample with a 0-d label, as cross entropy takes it."""
    x, w, labels, _ = random_problem(1, 70, 24).to(case32.device, torch.float32, torch.float32)
    for reduction, shape in (("mean", ()), ("none", (1,))):
        options = dict(reduction=reduction, backend=case32.backend)
        ours = sface_loss(x, w, labels[0], sample_weight=torch.tensor(2.0, device=x.device), **options)
        factor = 2 if reduction == "none" else 1
        assert ours.shape == shape and torch.equal(ours, factor * sface_loss(x, w, labels, **options))


def test_labels_of_a_range_of_classes():
    """A weight that holds classes [3, 7) of 10: rows of the weight, or codes for what is elsewhere, ignored or invalid."""
    labels = torch.tensor([3, 6, 2, 7, 9, -100, 10, -1], dtype=torch.int32)
    code = prepare_labels(labels, 10, -100, False, first=3, count=4)
    assert code.tolist() == [0, 3, NO_TARGET, NO_TARGET, NO_TARGET, IGNORED, INVALID, INVALID]
    assert prepare_labels(labels, 10, -100, False).tolist() == [3, 6, 2, 7, 9, IGNORED, INVALID, INVALID]
