"""`sample_weight`: what each reduction makes of it, and where its gradient goes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import SFaceLoss, sface_loss
from tests.support.cases import f16, f32, f64
from tests.support.problems import trained_problem


def setting(case=None, ignored=True):
    problem = trained_problem(9, 60, 24)
    if ignored:
        problem.labels[[2, 7]] = -100
    weights = torch.tensor([1.0, 0.0, 5.0, 2.5, 0.25, -1.0, 3.0, 2.0, 1.0])
    device = case.device if case else "cpu"
    return (*problem.to(device, f32, f32)[:3], weights.to(device))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(case32, reduction):
    """Weighted row losses, their sum, and Σ v l / Σ v over the rows that are not ignored; with all three gradients."""
    x, w, labels, weights = setting(case32)
    leaves = [t.clone().requires_grad_() for t in (x, w, weights)]
    ours = sface_loss(*leaves[:2], labels, sample_weight=leaves[2], reduction=reduction, backend=case32.backend)
    other_leaves = [t.clone().requires_grad_() for t in (x, w, weights)]
    rows = sface_loss(*other_leaves[:2], labels, reduction="none", backend=case32.backend)
    counted = labels != -100
    expected = rows * other_leaves[2]
    if reduction == "sum":
        expected = expected.sum()
    elif reduction == "mean":
        expected = expected[counted].sum() / other_leaves[2][counted].sum()
    torch.testing.assert_close(ours, expected)
    upstream = torch.linspace(-1, 2, 9, device=x.device) if reduction == "none" else torch.tensor(1.5, device=x.device)
    gradients = (torch.autograd.grad(v, t, upstream) for v, t in ((ours, leaves), (expected, other_leaves)))
    for grad, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_mean_is_that_of_cross_entropy():
    """PyTorch's own weights, given by class, divide by their sum too."""
    x, w, labels, _ = setting()
    by_class = torch.linspace(0.5, 2, len(w))
    own = torch.where(labels < 0, 0, by_class[labels.clamp_min(0)])
    logits = F.normalize(x) @ F.normalize(w).t()
    theirs = F.cross_entropy(logits, labels, weight=by_class)
    rows = F.cross_entropy(logits, labels, reduction="none")
    assert float(theirs) == pytest.approx(float((rows * own).sum() / own.sum()))
    ours = sface_loss(x, w, labels, sample_weight=own)
    rows = sface_loss(x, w, labels, reduction="none")
    assert float(ours) == pytest.approx(float((rows * own).sum() / own.sum()), rel=1e-5)


def test_ones_change_nothing(case32):
    x, w, labels, weights = setting(case32)
    for reduction in ("mean", "sum", "none"):
        options = dict(reduction=reduction, backend=case32.backend)
        assert torch.equal(
            sface_loss(x, w, labels, sample_weight=torch.ones_like(weights), **options),
            sface_loss(x, w, labels, **options),
        )


def test_twice_a_row_is_the_row_twice(case32):
    x, w, labels, _ = setting(case32, ignored=False)
    weights = torch.tensor([1.0, 3.0, 0.0], device=x.device)
    repeated = torch.tensor([0, 1, 1, 1], device=x.device)
    ours = sface_loss(x[:3], w, labels[:3], sample_weight=weights, backend=case32.backend)
    theirs = sface_loss(x[repeated], w, labels[repeated], backend=case32.backend)
    torch.testing.assert_close(ours, theirs)


def test_what_ignored_rows_weigh_changes_nothing(case32):
    x, w, labels, weights = setting(case32)
    results = []
    for poison in (1.0, math.nan, math.inf):
        weights[[2, 7]] = poison
        leaves = [t.clone().requires_grad_() for t in (x, w, weights)]
        loss = sface_loss(*leaves[:2], labels, sample_weight=leaves[2], backend=case32.backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        assert not results[-1][3][[2, 7]].any()
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.parametrize("some", [0.0, 1.5])
def test_weights_that_sum_to_nothing(case32, some):
    """0, as with every row ignored, where cross entropy would say NaN; the gradients are zeros."""
    x, w, labels, weights = setting(case32)
    weights = torch.zeros_like(weights)
    weights[0], weights[1] = some, -some
    leaves = [t.clone().requires_grad_() for t in (x, w, weights)]
    loss = sface_loss(*leaves[:2], labels, sample_weight=leaves[2], backend=case32.backend)
    loss.backward()
    assert float(loss.detach()) == 0 and not any(t.grad.any() for t in leaves)


def test_statistics_count_every_row_alike(case32):
    x, w, labels, weights = setting(case32)
    for kind in (True, "rows"):
        _, weighted = sface_loss(x, w, labels, sample_weight=weights, return_stats=kind, backend=case32.backend)
        _, plain = sface_loss(x, w, labels, return_stats=kind, backend=case32.backend)
        assert all(map(torch.equal, weighted, plain))


@pytest.mark.parametrize("dtype", [f16, torch.bfloat16, f64])
def test_dtypes(dtype):
    """Weights of any float dtype; the loss keeps its own, and half weights are added in float32."""
    x, w, labels, _ = setting(ignored=False)
    x, labels = x[:1].expand(4096, -1), labels[:1].expand(4096)
    weights = torch.ones(4096, dtype=dtype, requires_grad=True)  # in half precision their sum would be off
    loss = sface_loss(x, w, labels, sample_weight=weights)
    loss.backward()
    assert loss.dtype == f32 and weights.grad.dtype == dtype
    torch.testing.assert_close(loss.detach(), sface_loss(x[:1], w, labels[:1]))


def test_on_the_module():
    head = SFaceLoss(24, 60, reduction="sum")
    x, _, labels, weights = setting()
    expected = sface_loss(x, head.weight, labels, sample_weight=weights, reduction="sum")
    assert torch.equal(head(x, labels, sample_weight=weights), expected)
    assert torch.equal(head(x, labels, sample_weight=weights.unsqueeze(1)), expected)
    with pytest.raises(TypeError, match="positional"):
        head(x, labels, weights)
