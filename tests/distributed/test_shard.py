"""The loss over a range of classes: shards add up to the whole, on every backend, in one process."""

from __future__ import annotations

import itertools

import pytest
import torch

from sface_kernels import sface_loss
from sface_kernels.autograd import row_losses
from sface_kernels.distributed import sface_shard_loss
from sface_kernels.distributed.shard import harder_class
from sface_kernels.ops import compute_dtype
from sface_kernels.types import RowStats
from sface_kernels.validation import make_hyperparameters
from tests.support.cases import f64
from tests.support.checks import cached_judge
from tests.support.problems import GEOMETRIES

N, C, D = 33, 101, 40
CUTS = {"uneven": (0, 7, 60, 101), "an empty shard": (0, 0, 101, 101), "a class a shard": (0, 1, 2, 101)}


def leaves(problem):
    return tuple(t.detach().clone().requires_grad_() for t in (problem.x, problem.w))


def shards(problem, cuts, backend, labels=None, **options):
    """Row losses and gradients of the shards between `cuts`, added up, with each shard's own results."""
    x, w = leaves(problem)
    labels = problem.labels if labels is None else labels
    parts = [
        sface_shard_loss(x, w[low:high], labels, first=low, num_classes=len(w), backend=backend, **options)
        for low, high in itertools.pairwise(cuts)
    ]
    loss = torch.stack([part.loss for part in parts]).sum(0)
    loss.backward(problem.upstream.to(loss.dtype))
    return parts, loss.detach(), x.grad, w.grad


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_shards_add_up(case, geometry, cuts):
    """Losses and gradients within the budget of the whole, with one more rounding a shard where partial sums are stored.
    In float64 the truth errs as the whole does, in the same places: there within the a-priori bound."""
    judge = cached_judge(GEOMETRIES[geometry], (N, C, D), case.dtype, case.weight_dtype, filter_eps=0.0)
    problem = judge.problem.to(case.device, case.dtype, case.weight_dtype)
    _, loss, grad_x, grad_w = shards(problem, cuts, case.backend, filter_eps=0.0)
    x, w = leaves(problem)
    whole = sface_loss(x, w, problem.labels, reduction="none", backend=case.backend, filter_eps=0.0)
    whole.backward(problem.upstream.to(whole.dtype))
    worst = judge.truth.worst
    for name, ours, theirs, exact, bound in (
        ("loss", loss, whole.detach(), judge.truth.row_loss, worst.loss),
        ("grad_x", grad_x, x.grad, judge.truth.grad_x, worst.x),
        ("grad_w", grad_w, w.grad, judge.truth.grad_w, worst.w),
    ):
        error, own = (float((t.double().cpu() - exact).norm()) for t in (ours, theirs))
        allowed = 2 * own + len(cuts) * torch.finfo(ours.dtype).eps * float(exact.norm())
        if case.dtype == torch.float64:
            allowed += 2 * float(bound.norm())
        assert error <= allowed, f"{name}: {error:.3g} where the whole errs by {own:.3g}"


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_statistics_add_up(case, cuts):
    problem = GEOMETRIES["trained"](N, C, D).to(case.device, case.dtype, case.weight_dtype)
    hp = make_hyperparameters(64.0, 80.0, 0.8, 1.23, None, 2.0**-12, case.dtype, D)
    parts, *_ = shards(problem, cuts, case.backend, filter_eps=2.0**-12)
    _, whole, _, counts = row_losses(problem.x, problem.w, problem.labels, case.backend, hp)
    tolerance = 64 * torch.finfo(compute_dtype(problem.x, problem.w)).eps
    if case.backend in ("native", "triton"):  # cosines of dropped pairs come from a 16-bit screen
        tolerance = 2.0**-14 if case.backend == "native" else 2.0**-8
    for name, theirs in zip(RowStats._fields, whole, strict=True):
        stacked = torch.stack([getattr(part.stats, name) for part in parts])
        ours = stacked.amax(0) if name == "hardest" else stacked.sum(0)
        size = C**0.5 if name == "cos_other_sum" else max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) <= tolerance * size, name
    assert int(sum(part.counts[0] for part in parts)) == int(counts[0])


@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-12])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_hardest_class_of_shards(case, cuts, filter_eps):
    """Each shard names a class of its own range by its global number; the hardest of all is the one of the whole."""
    problem = GEOMETRIES["trained"](N, C, D).to(case.device, case.dtype, case.weight_dtype)
    problem.labels[3] = -100
    parts, *_ = shards(problem, cuts, case.backend, filter_eps=filter_eps)
    for part, (low, high) in zip(parts, itertools.pairwise(cuts), strict=True):
        none = part.stats.hardest == -torch.inf
        none[3] = True
        inside = (part.hardest_class >= low) & (part.hardest_class < high)
        assert torch.equal(inside, ~none) and (part.hardest_class[none] == -1).all()
    cosines, classes = (torch.stack(t) for t in zip(*((p.stats.hardest, p.hardest_class) for p in parts), strict=True))
    cosines[:, 3] = -torch.inf  # where shards are added up, ignored rows hold 0
    hardest, hardest_class = harder_class(cosines, classes)
    _, rows = sface_loss(
        problem.x, problem.w, problem.labels, filter_eps=filter_eps, backend=case.backend, return_stats="rows"
    )
    differs = hardest_class != rows.hardest_class
    # other roundings may prefer another class of nearly the same cosine
    multiplied = case.dtype if case.backend == "triton" else compute_dtype(problem.x, problem.w)
    screen = {"native": 2.0**-14, "triton": 2.0**-9}.get(case.backend, 0.0)
    assert ((hardest - rows.cos_hardest).abs()[differs] <= screen + D * torch.finfo(multiplied).eps).all()
    assert int(differs.sum()) <= N // 4 and int(hardest_class[3]) == -1


def test_hardest_class_of_equals():
    cosines = torch.tensor([[0.5, 0.7, -torch.inf, torch.nan], [0.5, 0.2, -torch.inf, 0.1]])
    classes = torch.tensor([[9, 3, -1, -1], [4, 8, -1, 7]])
    hardest, which = harder_class(cosines, classes)
    assert which.tolist() == [4, 3, -1, -1] and hardest[:3].tolist() == [0.5, pytest.approx(0.7), -torch.inf]


def test_a_target_elsewhere_is_no_target(case):
    """Only the inter-class term, cos_target 0, and the hardest class is sought among all classes of the shard."""
    problem = GEOMETRIES["trained"](N, C, D).to(case.device, case.dtype, case.weight_dtype)
    labels = torch.full_like(problem.labels, C)
    part = sface_shard_loss(
        problem.x, problem.w, labels, first=0, num_classes=C + 1, filter_eps=0.0, backend=case.backend
    )
    dtype = compute_dtype(problem.x, problem.w)
    x_unit = torch.nn.functional.normalize(problem.x.to(f64))
    cos = (x_unit @ torch.nn.functional.normalize(problem.w.to(f64)).t()).clamp(-1, 1)  # [N, C]
    inter = (64 * torch.sigmoid(-80 * (cos.acos() - 1.23)) * cos).sum(1)
    # a cosine's D roundings, times the slope k of a coefficient; Triton multiplies half embeddings as they are
    multiplied = case.dtype if case.backend == "triton" else dtype
    tolerance = 80 * D * torch.finfo(multiplied).eps
    assert not part.stats.intra.any() and not part.stats.cos_target.any()
    assert torch.equal(part.loss, part.stats.inter)
    assert float((part.loss - inter).abs().max()) <= tolerance * float(inter.abs().max())
    screen = 2.0**-14 if case.backend == "native" else 0.0  # its hardest cosine comes from 16-bit products
    assert float((part.stats.hardest - cos.amax(1)).abs().max()) <= screen + D * torch.finfo(multiplied).eps


def test_ignored_and_no_rows(case):
    """Ignored rows count nowhere whatever they hold; no rows is no error."""
    problem = GEOMETRIES["collapsed"](N, C, D).to(case.device, case.dtype, case.weight_dtype)
    labels = problem.labels.clone()
    labels[::3] = -100
    problem.x[::3] = torch.nan
    _, loss, grad_x, grad_w = shards(problem, (0, 50, C), case.backend, labels)
    assert not loss[::3].any() and not grad_x[::3].any()
    assert loss.isfinite().all() and grad_x.isfinite().all() and grad_w.isfinite().all()
    nothing = problem._replace(x=problem.x[:0], labels=labels[:0], upstream=problem.upstream[:0])
    _, loss, grad_x, grad_w = shards(nothing, (0, 50, C), case.backend)
    assert len(loss) == 0 and not grad_w.any()


def test_empty_shard_is_differentiable_and_finite():
    x = torch.full((3, 4), torch.nan, requires_grad=True)
    w = torch.empty(0, 4, requires_grad=True)
    part = sface_shard_loss(x, w, torch.tensor([0, 1, -100]), first=5, num_classes=5)
    part.loss.sum().backward()
    assert not part.loss.any() and not x.grad.any() and w.grad.shape == (0, 4)
    assert (part.stats.hardest == -torch.inf).all()


def test_bad_input():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    labels = torch.tensor([0, 1, 9])
    with pytest.raises(ValueError, match=r"first: expected a range of classes within \[0, 9\), got \[5, 10\)"):
        sface_shard_loss(x, w, labels, first=5, num_classes=9)
    with pytest.raises(TypeError, match="first: expected an int, got '0'"):
        sface_shard_loss(x, w, labels, first="0", num_classes=9)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 9\).* got 9 in row 2"):
        sface_shard_loss(x, w, labels, first=0, num_classes=9)
    with pytest.raises(ValueError, match=r"weight: expected \[C, 4\]"):
        sface_shard_loss(x, torch.randn(0, 3), labels, first=0, num_classes=10)
