"""What is measured and judged with: workloads, the float64 results, the published arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import sface_loss
from sface_kernels.bench import providers
from sface_kernels.testing import published
from sface_kernels.testing.truth import compute_truth, measure_errors
from sface_kernels.testing.workloads import FAST_EPS, Case, Shape, active_cosine, make_workload


@pytest.mark.parametrize("geometry", ["random", "trained", "dense"])
def test_workloads_are_deterministic_by_seed(geometry):
    case = Case(Shape(16, 200, 32), geometry, seed=3)
    first, again, other = make_workload(case), make_workload(case), make_workload(case._replace(seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first[1:4], again[1:4], strict=True))
    assert not torch.equal(first.x, other.x) and not torch.equal(first.w, other.w)
    assert first.x.abs().min(dim=1).values.count_nonzero() == 16


@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("d", [64, 256])
def test_requested_density_is_reached(share, d):
    work = make_workload(Case(Shape(64, 3000, d), "dense", share))
    assert work.density == pytest.approx(share, rel=0.02)
    active = F.normalize(work.x) @ F.normalize(work.w).t() >= active_cosine(FAST_EPS)
    assert active.float().mean() == pytest.approx(share, rel=0.1)  # the targets counted as well
    if share >= 0.05:  # scattered: every hundred classes have some
        assert active.any(0).view(30, 100).any(1).all()


def test_density_is_what_a_backend_counts():
    work = make_workload(Case(Shape(32, 1000, 64), "dense", 0.05))
    _, stats = sface_loss(work.x, work.w, work.y, filter_eps=FAST_EPS, backend="chunked", return_stats=True)
    assert int(stats.active_pairs) == pytest.approx(work.density * 32 * 999, abs=2)  # ties of rounding


def test_trained_geometry_is_like_a_trained_head():
    work = make_workload(Case(Shape(64, 4000, 512), "trained"))
    cos = F.normalize(work.x) @ F.normalize(work.w).t()
    positives = cos[torch.arange(64), work.y]
    assert positives.mean() == pytest.approx(0.70, abs=0.03) and 0.03 < positives.std() < 0.09
    assert cos.std() == pytest.approx(0.062, abs=0.004)
    assert 5e-4 < work.density < 2.5e-3


@pytest.mark.parametrize("shape", [Shape(8, 60, 16), Shape(33, 701, 96)])
@pytest.mark.parametrize("function", [lambda *inputs: published.reference(*inputs).loss, providers.careful])
def test_opponents_agree_with_float64(function, shape):
    work = make_workload(Case(shape, "trained"))
    truth = compute_truth(work.x, work.w, work.y)
    for dtype, limit in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (work.x, work.w))
        loss = function(x, w, work.y)
        loss.backward()
        errors = measure_errors(truth, loss.detach(), x.grad, w.grad)
        assert max(errors) < limit, (dtype, errors)


def test_the_filtered_float64_result_is_the_autograd_of_kept_entries():
    work = make_workload(Case(Shape(8, 200, 16), "trained"))
    x, w = (t.double().requires_grad_() for t in (work.x, work.w))
    cos = F.normalize(x) @ F.normalize(w).t()
    own = F.one_hot(work.y, 200).bool()
    with torch.no_grad():
        p, q = (64 * torch.sigmoid(v) for v in (80 * (cos.acos() - 0.80), -80 * (cos.acos() - 1.23)))
        coef = torch.where(own, -p, torch.where(q < FAST_EPS * 64, 0, q))
    (coef * cos).sum(1).mean().backward()
    filtered = compute_truth(work.x, work.w, work.y, FAST_EPS)
    errors = measure_errors(filtered, torch.tensor(filtered.loss, dtype=torch.float64), x.grad, w.grad)
    assert max(errors) < 1e-12
    exact = compute_truth(work.x, work.w, work.y)
    assert filtered.loss == exact.loss and not torch.equal(filtered.grad_x, exact.grad_x)


def test_reference_returns_the_six_published_values():
    work = make_workload(Case(Shape(8, 60, 16), "trained"))
    outputs = published.reference(work.x, work.w, work.y)
    cos = F.normalize(work.x) @ F.normalize(work.w).t()
    own = cos[torch.arange(8), work.y]
    assert torch.allclose(outputs.logits, 64 * cos, atol=1e-4)
    assert torch.allclose(outputs.loss, outputs.intra + outputs.inter)
    assert torch.allclose(outputs.cos_target, own.mean())
    assert torch.allclose(outputs.cos_other, (cos.sum() - own.sum()) / cos.numel(), atol=1e-6)
