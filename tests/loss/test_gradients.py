"""The gradient is that of the loss with p and q held constant: equations (7) and (8), by three independent routes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.gradcheck import GradcheckError

from sface_kernels import sface_loss
from tests.support.cases import CASES32, f64
from tests.support.checks import run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, Problem

# D, C small enough for numerical differences; N = 1 and an own class at both ends of the range are among them
SHAPES = {"tiny": (1, 2, 2), "small": (4, 7, 5), "wide": (3, 5, 33)}


def coefficients(problem: Problem) -> torch.Tensor:
    """g_ij of (6) at the problem's point, in fp64."""
    cos = F.normalize(problem.x.double()) @ F.normalize(problem.w.double()).t()
    theta = cos.clamp(-1, 1).acos()
    own = F.one_hot(problem.labels, len(problem.w)).bool()
    return torch.where(own, -64 * torch.sigmoid(80 * (theta - 0.8)), 64 * torch.sigmoid(-80 * (theta - 1.23)))


def frozen_loss(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (g * (F.normalize(x) @ F.normalize(w).t())).sum(1)


class Frozen(torch.autograd.Function):
    """Forward: the loss with the coefficients frozen. Backward: what `sface_loss` says."""

    @staticmethod
    def forward(ctx, x, w, labels, g, backend):
        ctx.save_for_backward(x, w, labels)
        ctx.backend = backend
        return frozen_loss(x, w, g)

    @staticmethod
    def backward(ctx, grad_row):
        x, w, labels = (t.detach() for t in ctx.saved_tensors)
        x.requires_grad_(), w.requires_grad_()
        with torch.enable_grad():
            rows = sface_loss(x, w, labels, reduction="none", filter_eps=0.0, backend=ctx.backend)
        rows.backward(grad_row)
        return x.grad, w.grad, None, None, None


def double(geometry: str, shape: str) -> Problem:
    problem = GEOMETRIES[geometry](*SHAPES[shape])
    return problem._replace(x=problem.x.double(), w=problem.w.double(), upstream=problem.upstream.double())


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_with_frozen_coefficients(backend, geometry, shape):
    problem = double(geometry, shape)
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    assert torch.autograd.gradcheck(Frozen.apply, (x, w, problem.labels, coefficients(problem).detach(), backend))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_gradcheck_of_the_public_loss_fails_by_design(backend):
    """The coefficients do depend on the inputs; if this passes, their gradient is no longer blocked."""
    problem = double("trained", "small")
    x, w = problem.x.requires_grad_(), problem.w.requires_grad_()
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(
            lambda x, w: sface_loss(x, w, problem.labels, filter_eps=0.0, backend=backend),
            (x, w),
            check_undefined_grad=False,
        )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_central_differences(case32, geometry, shape):
    """A float32 backend against fp64 differences of the frozen loss, good to h² and to fp32 rounding of the coefficients."""
    problem = GEOMETRIES[geometry](*SHAPES[shape])
    result = run(case32, problem, filter_eps=0.0)
    g, t = coefficients(problem), truth(*problem)
    points = {"grad_x": problem.x.double(), "grad_w": problem.w.double()}
    for (name, point), rounding in zip(points.items(), (t.worst.x, t.worst.w), strict=True):
        numeric = torch.zeros_like(point)
        h = 1e-4 * point.norm(dim=1).min()
        for entry in range(point.numel()):
            step = torch.zeros_like(point)
            step.view(-1)[entry] = h
            x, w = (p + step if key == name else p for key, p in points.items())
            up = (problem.upstream.double() * frozen_loss(x, w, g)).sum()
            x, w = (p - step if key == name else p for key, p in points.items())
            down = (problem.upstream.double() * frozen_loss(x, w, g)).sum()
            numeric.view(-1)[entry] = (up - down) / (2 * h)
        error = float((getattr(result, name).double().cpu() - numeric).norm())
        # third derivatives of a cosine are at most 15 over the cube of the norm: h² · 15/6 of the coefficients, times √entries
        curvature = 2.5e-8 * point.numel() ** 0.5 * float((problem.upstream.double().unsqueeze(1) * g).abs().sum())
        assert error <= float(rounding.norm()) + curvature / float(point.norm(dim=1).min())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_equations_7_and_8(geometry):
    """The oracle's autograd gradients are the closed forms, so that holding a backend to one holds it to the other."""
    problem = GEOMETRIES[geometry](9, 31, 12)
    x, w, u = problem.x.double(), problem.w.double(), problem.upstream.double().unsqueeze(1)
    g, x_unit, w_unit = coefficients(problem), F.normalize(x), F.normalize(w)
    gc = g * (x_unit @ w_unit.t())
    grad_x = u * (g @ w_unit - gc.sum(1, keepdim=True) * x_unit) / x.norm(dim=1, keepdim=True)
    grad_w = ((u * g).t() @ x_unit - (u * gc).sum(0).unsqueeze(1) * w_unit) / w.norm(dim=1, keepdim=True)
    t = truth(*problem, dtype=f64)
    torch.testing.assert_close(t.row_loss, gc.sum(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(t.full_grad_x, grad_x, rtol=1e-12, atol=1e-12 * float(grad_x.abs().max()))
    torch.testing.assert_close(t.full_grad_w, grad_w, rtol=1e-12, atol=1e-12 * float(grad_w.abs().max()))


def needs(x: bool, w: bool):
    return pytest.param(x, w, id=" and ".join(n for n, on in (("embeddings", x), ("weight", w)) if on) or "nothing")


@pytest.mark.parametrize(
    "need_x, need_w", [needs(True, True), needs(True, False), needs(False, True), needs(False, False)]
)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_only_what_is_needed(case, geometry, need_x, need_w):
    """Frozen head, frozen backbone, neither: the other gradient is the same, the loss is the same, the rest is None."""
    problem = GEOMETRIES[geometry](21, 331, 96).to(case.device, case.dtype, case.weight_dtype)
    both = run(case, problem)
    x, w = problem.x.clone().requires_grad_(need_x), problem.w.clone().requires_grad_(need_w)
    rows = sface_loss(x, w, problem.labels, reduction="none", backend=case.backend)
    assert torch.equal(rows, both.row_loss) and rows.requires_grad == (need_x or need_w)
    if rows.requires_grad:
        rows.backward(problem.upstream.to(rows.dtype))
    for leaf, needed, expected in ((x, need_x, both.grad_x), (w, need_w, both.grad_w)):
        assert torch.equal(leaf.grad, expected) if needed else leaf.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(case, mode):
    problem = GEOMETRIES["trained"](21, 331, 96).to(case.device, case.dtype, case.weight_dtype)
    expected = run(case, problem)
    with mode():
        rows, stats = sface_loss(
            problem.x.requires_grad_(),
            problem.w.requires_grad_(),
            problem.labels,
            reduction="none",
            return_stats=True,
            backend=case.backend,
        )
    assert not rows.requires_grad and torch.equal(rows, expected.row_loss)
    assert int(stats.active_pairs) == int(expected.stats.active_pairs)


def leaves(
    case, geometry: str = "trained", shape=(21, 331, 96)
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, w, labels, upstream = GEOMETRIES[geometry](*shape).to(case.device, case.dtype, case.weight_dtype)
    return x.requires_grad_(), w.requires_grad_(), labels, upstream


def test_gradient_penalty_raises(case32):
    """Beside another term nothing else would complain: a penalty without a gradient must not pass for one."""
    x, w, labels, _ = leaves(case32)
    loss = sface_loss(x, w, labels, backend=case32.backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        (loss + grad.square().sum()).backward()


def test_double_backward_through_the_upstream_gradient_raises(case32):
    x, w, labels, upstream = leaves(case32)
    rows = sface_loss(x, w, labels, reduction="none", backend=case32.backend)
    grads = torch.autograd.grad(rows, (x, w), upstream.requires_grad_(), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="differentiat"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_backward_twice(case, geometry):
    """A retained graph gives the same gradients again, also after a backward with another upstream gradient between."""
    x, w, labels, upstream = leaves(case, geometry)
    rows = sface_loss(x, w, labels, reduction="none", backend=case.backend)
    first = torch.autograd.grad(rows, (x, w), upstream.to(rows.dtype), retain_graph=True)
    kept = [t.clone() for t in first]
    other = torch.autograd.grad(rows, (x, w), torch.ones_like(rows), retain_graph=True)
    second = torch.autograd.grad(rows, (x, w), upstream.to(rows.dtype))
    for a, b, c, d in zip(first, kept, second, other, strict=True):
        assert torch.equal(a, b), "a later backward changed an earlier gradient"
        assert torch.equal(a, c) and not torch.equal(a, d)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_inputs_stay_as_they_are(case, geometry):
    x, w, labels, upstream = leaves(case, geometry)
    tensors = (x, w, labels, upstream)
    before = [t.detach().clone() for t in tensors]
    rows = sface_loss(x, w, labels, reduction="none", backend=case.backend)
    weights = upstream.to(rows.dtype)
    rows.backward(weights)
    assert torch.equal(weights.to(upstream.dtype), upstream)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_outputs_share_no_memory(case):
    x, w, labels, upstream = leaves(case)
    rows, stats = sface_loss(x, w, labels, reduction="none", return_stats=True, backend=case.backend)
    grads = torch.autograd.grad(rows, (x, w), upstream.to(rows.dtype), retain_graph=True)
    again = torch.autograd.grad(rows, (x, w), upstream.to(rows.dtype))
    tensors = [x, w, labels, upstream, rows, *grads, *again]
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(storages)) == len(storages)
    assert not {value.untyped_storage().data_ptr() for value in stats} & set(storages)


def test_an_edited_gradient_does_not_come_back(case32):
    """Clipping edits .grad in place; the next backward must not see it, whatever memory it reuses."""
    x, w, labels, _ = leaves(case32)
    loss = sface_loss(x, w, labels, backend=case32.backend)
    loss.backward(retain_graph=True)
    expected = [x.grad.clone(), w.grad.clone()]
    x.grad.fill_(7.0), w.grad.fill_(torch.nan)
    x.grad = w.grad = None
    loss.backward()
    assert torch.equal(x.grad, expected[0]) and torch.equal(w.grad, expected[1])


def test_changing_the_weight_before_backward_raises(case32):
    """An optimizer step between forward and backward must not go unnoticed."""
    x, w, labels, _ = leaves(case32)
    loss = sface_loss(x, w, labels, backend=case32.backend)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_accumulation_over_batches(case32):
    """.grad after two backwards is the sum of both gradients."""
    a, b = GEOMETRIES["trained"](16, 331, 96, seed=1), GEOMETRIES["trained"](9, 331, 96, seed=2)
    b = b._replace(w=a.w)
    w = a.w.to(case32.device, copy=True).requires_grad_()
    for problem in (a, b):
        rows = sface_loss(
            problem.x.to(case32.device), w, problem.labels.to(case32.device), reduction="none", backend=case32.backend
        )
        rows.backward(problem.upstream.to(case32.device))
    assert torch.equal(w.grad, run(case32, a).grad_w + run(case32, b).grad_w)


def test_one_row_of_a_loss(case32):
    """Indexing a row leaves an upstream gradient of zeros elsewhere; statistics take no part in any gradient."""
    x, w, labels, _ = leaves(case32)
    rows, stats = sface_loss(x, w, labels, reduction="none", return_stats=True, backend=case32.backend)
    assert not any(value.requires_grad for value in stats)
    rows[4].backward()
    assert not x.grad[:4].any() and not x.grad[5:].any() and x.grad[4].any()


def test_every_backend_takes_the_same_step():
    """The same SGD step from the same point, whichever backend runs it."""
    problem = GEOMETRIES["trained"](32, 331, 96)
    steps = {}
    for case in CASES32:
        if case.device == "cpu" and case.reason_to_skip() is None:
            result = run(case, problem, filter_eps=0.0)
            steps[case.backend] = result.grad_w
    assert len(steps) >= 2
    allowed = 2 * truth(*problem).worst.w.norm()
    for name, grad_w in steps.items():
        assert (grad_w - steps["reference"]).norm() <= allowed, name


def test_an_upstream_gradient_cannot_be_differentiated_either():
    """The trick of two backwards, which would else get a gradient of 0."""
    x, w, labels, _ = GEOMETRIES["random"](3, 9, 5)
    w.requires_grad_()
    upstream = torch.tensor(1.0, requires_grad=True)
    (grad,) = torch.autograd.grad(sface_loss(x, w, labels), w, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), upstream)
