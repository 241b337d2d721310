"""Trainings of a head by its own optimizer and by torch.optim on the dense gradient, in float32 and in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sface_kernels import SFaceLoss
from sface_kernels.optim import HeadAdamW, HeadSGD
from tests.support.cases import f32, f64
from tests.support.problems import Problem

RULES = {"SGD": (HeadSGD, torch.optim.SGD), "AdamW": (HeadAdamW, torch.optim.AdamW)}
# steps of a percent or so of a row's length, for embeddings of any length
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": dict(lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "AdamW": dict(lr=1e-3, weight_decay=0.1),
}
Loop = Callable[[SFaceLoss, torch.optim.Optimizer, Problem], torch.optim.Optimizer | None]  # the last optimizer


def make(problem: Problem, rule: str, ours: bool, options: dict[str, Any], **head_options: Any):
    """A head with the problem's weight, and an optimizer of it."""
    head = make_head(problem, dtype=problem.w.dtype, **head_options)
    kind = RULES[rule][0 if ours else 1]
    return head, kind(head if ours else head.parameters(), **{**OPTIONS[rule], **options})


SHAPE = (30, 205, 17)


def make_head(problem: Problem, **options: Any) -> SFaceLoss:
    head = SFaceLoss(problem.w.shape[1], len(problem.w), **options)
    head.load_state_dict({"weight": problem.w})
    return head.to(problem.w.device)


def waiting(problem: Problem, rule: str = "SGD", **options: Any):
    """A head and its optimizer, with a gradient that waits."""
    head = make_head(problem)
    optimizer = RULES[rule][0](head, **{**OPTIONS[rule], **options})
    head(*batch(problem, 0)).backward()
    return head, optimizer


def batch(problem: Problem, step: int) -> tuple[Tensor, Tensor]:
    """Embeddings and labels near those of the problem, other ones each step."""
    g = torch.Generator().manual_seed(500 + step)
    noise = torch.randn(problem.x.shape, generator=g).to(problem.x)
    rows = torch.randperm(len(problem.x), generator=g).to(problem.x.device)
    x = problem.x + 0.3 * noise * problem.x.norm(dim=1, keepdim=True) / problem.x.shape[1] ** 0.5
    return x[rows], problem.labels[rows]


def train(loop: Loop, problem: Problem, rule: str, options: dict[str, Any] | None = None, **head_options: Any):
    """Weight and state of ours after `loop`, held to those of torch.optim in float32 and float64."""
    results = []
    head_options.setdefault("filter_eps", 2.0**-24)
    same = head_options.get("backend", "auto")
    for ours, dtype, backend in (
        (True, f32, same),
        (False, f32, same),
        (False, f32, "reference"),
        (False, f64, "chunked"),
    ):
        theirs = problem._replace(x=problem.x.to(dtype), w=problem.w.to(dtype))
        head, optimizer = make(theirs, rule, ours, options or {}, **{**head_options, "backend": backend})
        optimizer = loop(head, optimizer, theirs) or optimizer
        (state,) = optimizer.state.values() or [{}]
        results.append({"weight": head.weight.detach(), **state})
    assert_same(problem.w, *results)
    return results[0]


def assert_same(
    start: Tensor, ours: dict[str, Any], theirs: dict[str, Any], reference: dict[str, Any], exact: dict[str, Any]
) -> None:
    """Ours is no further from float64 than twice torch.optim in float32, on the same backend's gradient or on the
    reference's, and one rounding of what was passed through. Either alone may be near by chance: errors grow in a training.
    """
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            assert value == theirs[name], name
            continue
        assert torch.isfinite(exact[name]).all()
        error, *own = (float((t[name].double() - exact[name]).norm()) for t in (ours, theirs, reference))
        size = max(float(exact[name].norm()), float(start.double().norm()) if name == "weight" else 0.0)
        allowed = 2 * max(own) + torch.finfo(f32).eps * size
        assert error <= allowed, f"{name}: {error:.3g} beside {size:.3g}, torch.optim errs by {max(own):.3g}"
    before, after = start.double(), ours["weight"].double()
    moved = float(((after - before).norm(dim=1) / before.norm(dim=1)).max())
    assert moved > 1e-3, f"moved by {moved:.2g} only: nothing was tested"
