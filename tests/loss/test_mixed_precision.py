"""Half precision in every combination that training loops have: autocast, dtypes, GradScaler."""

from __future__ import annotations

import itertools

import pytest
import torch

from sface_kernels import SFaceLoss, sface_loss
from sface_kernels.dispatch import BACKENDS
from sface_kernels.ops import compute_dtype
from tests.support.cases import DEVICES, Case, bf16, f16, f32, f64
from tests.support.checks import Judge, Result, assert_rows_within
from tests.support.problems import GEOMETRIES, Problem, trained_problem

N, C, D = 16, 331, 96
SCALE = 65536.0  # GradScaler's first
WHERE = list(itertools.product(BACKENDS, DEVICES))
DTYPES = [(f64, f64), (f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f16, f16), (f32, bf16), (f32, f16)]


def needed(backend: str, device: str, dtypes: tuple[torch.dtype, torch.dtype]) -> Case:
    case = Case(backend, device, *dtypes)
    if reason := case.reason_to_skip():
        pytest.skip(f"{case}: {reason}")
    return case


def scaled_step(case: Case, problem: Problem, autocast: torch.dtype | None, scale: float) -> Result:
    """Gradients of scale times the mean loss, divided by the scale in float64 again."""
    x, w = (t.to(case.device, copy=True).requires_grad_() for t in (problem.x, problem.w))
    scaler = torch.amp.GradScaler(case.device, init_scale=scale)
    with torch.autocast(case.device, autocast, enabled=autocast is not None):
        labels = problem.labels.to(case.device)
        rows = sface_loss(x, w, labels, reduction="none", backend=case.backend, filter_eps=2.0**-16)
        loss = rows.mean()
    scaler.scale(loss).backward()
    assert loss.dtype == rows.dtype == compute_dtype(problem.x, problem.w)
    assert x.grad.dtype == problem.x.dtype and w.grad.dtype == problem.w.dtype
    return Result(rows.detach(), None, x.grad.double() / scale, w.grad.double() / scale)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(t).removeprefix("torch.") for t in pair))
@pytest.mark.parametrize("backend, device", WHERE)
@pytest.mark.parametrize("geometry", ["trained", "collapsed"])
def test_matrix(backend, device, dtypes, geometry):
    """Under every autocast and scale: the dtypes that a loop expects, and the gradients of float64 within the budget.

    No autocast changes a bit, nor does a scale that is a power of two where the dtype holds the scaled gradient.
    """
    case = needed(backend, device, dtypes)
    settings = list(itertools.product((None, bf16, f16), (1.0, SCALE)))
    shape = (N, C, D)
    if case.emulated:
        settings, shape = [settings[0], settings[2], settings[5]], (9, 70, 32)
    problem = GEOMETRIES[geometry](*shape)
    # so long that SCALE times any gradient is a float16, as loops arrange it by lowering the scale
    problem = problem._replace(x=problem.x * 30, w=problem.w * 300, upstream=torch.full(shape[:1], 1 / shape[0]))
    problem = problem.to("cpu", *dtypes)
    mixed = dtypes[1] not in (f32, dtypes[0])
    values = problem._replace(w=problem.w.float()) if mixed else problem  # what F.linear would cast, taken as it is
    judge = Judge(values, filter_eps=2.0**-16)
    judge.problem = problem  # whose dtypes say how gradients are stored
    results = {}
    for autocast, scale in settings:
        if mixed and autocast is None:
            with pytest.raises(TypeError, match="weight: expected float32 or the dtype of the embeddings"):
                scaled_step(case, problem, autocast, scale)
            continue
        result = results[autocast, scale] = scaled_step(case, problem, autocast, scale)
        assert all(t.isfinite().all() for t in (result.row_loss, result.grad_x, result.grad_w))
        judge.check(result, backend)
    first = next(iter(results.values()))
    for (_, scale), result in results.items():
        assert torch.equal(result.row_loss, first.row_loss)
        for name, dtype in (("grad_x", dtypes[0]), ("grad_w", dtypes[1])):
            ours, theirs = getattr(result, name), getattr(first, name)
            # below these a float16 that is not scaled has fewer bits, or none
            exact = theirs.abs() > torch.finfo(dtype).tiny
            assert torch.equal(ours[exact], theirs[exact]), f"{name} under a scale of {scale}"


@pytest.mark.parametrize("weight_dtype", [f32, f16])
@pytest.mark.parametrize("backend, device", WHERE)
def test_an_overflow_is_seen_where_it_is(backend, device, weight_dtype):
    """Infinite exactly where SCALE times the true gradient is no float16; nothing overflows on the way to the others."""
    case = needed(backend, device, (f16, weight_dtype))
    problem = trained_problem(N, C, D)._replace(upstream=torch.full((N,), 1 / N))
    x = torch.nn.functional.normalize(problem.x) * torch.logspace(-1, 2, N).unsqueeze(1)
    problem = problem._replace(x=x, w=problem.w * 30).to("cpu", f16, weight_dtype)
    exact = Judge(problem, filter_eps=2.0**-16).truth
    ours = scaled_step(case, problem, None, SCALE)
    limit = torch.finfo(f16).max
    largest = exact.grad_x.abs().amax(1) * SCALE
    surely, safe = largest > 1.01 * limit, largest < 0.99 * limit
    assert surely.any() and safe.any()
    finite = ours.grad_x.cpu().isfinite().all(1)
    assert not finite[surely].any() and finite[safe].all() and ours.grad_w.isfinite().all()
    error = (ours.grad_x.cpu() - exact.grad_x)[safe]
    rounding = exact.grad_x[safe].norm(dim=1) * torch.finfo(f16).eps
    assert_rows_within("grad_x", error, rounding + (exact.worst.x + exact.flip_x)[safe])


@pytest.mark.parametrize("autocast", [bf16, f16], ids=str)
@pytest.mark.parametrize("backend, device", WHERE)
def test_training_with_a_grad_scaler(backend, device, autocast):
    """A backbone under autocast and a head in one loop: a scale that is too large skips steps until it fits, and the
    steps that are taken are those that a fixed small scale takes."""
    emulated = needed(backend, device, (autocast, f32)).emulated
    rows, classes, steps = (5, 40, 2) if emulated else (N, C, 4)
    g = torch.Generator().manual_seed(4)
    batches = [
        (torch.randn(rows, 20, generator=g).to(device), torch.randint(0, classes, (rows,), generator=g).to(device))
        for _ in range(steps)
    ]

    def train(scale: float) -> tuple[int, float, list[torch.Tensor]]:
        torch.manual_seed(5)
        backbone, head = torch.nn.Linear(20, D).to(device), SFaceLoss(D, classes, backend=backend).to(device)
        parameters = [*backbone.parameters(), *head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler(device, init_scale=scale)
        skipped = 0
        for x, labels in batches:
            while True:
                optimizer.zero_grad()
                with torch.autocast(device, autocast):
                    embeddings = backbone(x)
                    assert embeddings.dtype == autocast
                    loss = head(embeddings, labels)
                scaler.scale(loss).backward()
                assert head.weight.grad.dtype == backbone.weight.grad.dtype == f32
                before, old_scale = head.weight.detach().clone(), scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() >= old_scale:
                    assert not torch.equal(head.weight, before)
                    break
                assert torch.equal(head.weight, before), "a step with an overflow was taken"
                skipped += 1
        return skipped, scaler.get_scale(), [p.detach() for p in parameters]

    first = 2.0**22 if autocast == f16 else SCALE  # bfloat16 has the range of float32
    skipped, scale, ours = train(first)
    none_skipped, _, theirs = train(64.0)
    assert none_skipped == 0 and (skipped > 0) == (scale < first) == (autocast == f16)
    for a, b in zip(ours, theirs, strict=True):
        tolerance = torch.finfo(autocast).eps  # of gradients that float16 holds better under a larger scale
        assert (a - b).norm() <= tolerance * b.norm() and torch.isfinite(a).all()
