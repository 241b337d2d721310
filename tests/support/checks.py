"""Running a backend on a problem, and the budget its result must keep.

Every tolerance is measured or derived. With u the unit roundoff of what is computed in:

    |ours − fp64| ≤ 2·(|same-dtype reference − fp64| + one rounding of each cosine, angle and term)

plus what the filter is allowed, in the norm of a whole tensor and in its largest entry, and, row by row, the a-priori bound of D-term inner products,
which needs no luck of the reference. The reference backend itself is held to the a-priori bound alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sface_kernels import SFaceStats, sface_loss
from sface_kernels.ops import compute_dtype
from tests.support.cases import Case
from tests.support.oracle import Truth, truth
from tests.support.problems import Problem


class Result(NamedTuple):
    row_loss: Tensor  # [N]
    stats: SFaceStats
    grad_x: Tensor  # [N, D]
    grad_w: Tensor  # [C, D]


def run(case: Case | str, problem: Problem, **options) -> Result:
    """Row losses, statistics and the gradients of Σ_i upstream_i l_i, by a case on its device or a backend on the CPU."""
    backend, device = (case, "cpu") if isinstance(case, str) else (case.backend, case.device)
    x, w = (t.detach().to(device, copy=True).requires_grad_() for t in (problem.x, problem.w))
    labels = problem.labels.to(device)
    rows, stats = sface_loss(x, w, labels, reduction="none", return_stats=True, backend=backend, **options)
    rows.backward(problem.upstream.to(device, rows.dtype))
    return Result(rows.detach(), stats, x.grad, w.grad)


def norm(t: Tensor) -> float:
    return float(t.norm()) if t.numel() else 0.0


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def stored_rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What storing each row of `value` in `dtype` may cost in norm: half an ulp, or half a subnormal step, per entry."""
    info = torch.finfo(dtype)
    step = info.tiny * info.eps / 2
    return value.norm(dim=1) * info.eps / 2 + step * value.shape[1] ** 0.5


def assert_rows_within(name: str, error: Tensor, bound: Tensor) -> None:
    """Every row of `error` is finite and no longer than its `bound`."""
    size = error.norm(dim=1) if error.dim() == 2 else error.abs()
    failed = ~(size <= bound)
    if failed.any():
        row = int(failed.nonzero()[0])
        raise AssertionError(
            f"{name}: {int(failed.sum())} of {len(size)} rows are past their bound, the first is row {row} with an error "
            f"of {float(size[row]):.3g} where {float(bound[row]):.3g} is allowed"
        )


def plain(problem: Problem, autocast: torch.dtype) -> Result:
    """What users of half precision have now: the unfiltered loss in plain PyTorch under autocast."""
    x, w = (t.detach().cpu().clone().requires_grad_() for t in (problem.x, problem.w))
    with torch.autocast("cpu", autocast):
        cos = F.normalize(x) @ F.normalize(w).t()
        theta = cos.detach().float().clamp(-1, 1).acos()
        own = F.one_hot(problem.labels.cpu(), len(w)).bool()
        g = torch.where(own, -64 * torch.sigmoid(80 * (theta - 0.8)), 64 * torch.sigmoid(-80 * (theta - 1.23)))
        rows = (g * cos).sum(1)
    scale = 2.0**-8  # every pair of a collapsed batch overflows float16 without it
    rows.backward(problem.upstream.cpu() * scale)
    return Result(rows.detach(), None, x.grad.double() / scale, w.grad.double() / scale)


class Judge:
    """Truth and reference of one problem, and the comparison of results with them."""

    def __init__(self, problem: Problem, **options):
        self.problem, self.options = problem, options
        self.dtype = compute_dtype(problem.x, problem.w)
        self.truth = self._truth(self.dtype)
        self.reference = run("reference", problem, **options)

    def _truth(self, dtype: torch.dtype) -> Truth:
        arguments = (self.problem.x, self.problem.w, self.problem.labels, self.problem.upstream)
        return truth(*arguments, dtype=dtype, **self.options)

    def _yardstick(self, backend: str) -> tuple[Truth, Result]:
        """Truth with its bounds, and the reference in the same dtype: for dense half products that under autocast."""
        half = self.problem.x.dtype in (torch.float16, torch.bfloat16)
        if backend == "triton" and half and self.options.get("filter_eps") == 0:
            return self._truth(torch.float16), plain(self.problem, torch.float16)
        return self.truth, self.reference

    def _tail(self, rows: Tensor, backend: str) -> Tensor:
        """What exact calls may lack in each row of ∂w where far pairs have coarse products (docs/math.md, 3): of each of
        its N terms 2⁻²⁴ of the largest row, and of the row itself 1 %, at most."""
        length = rows.norm(dim=1)
        if backend != "native" or self.options.get("filter_eps") != 0:
            return torch.zeros_like(length)
        return torch.minimum(0.01 * length, len(self.problem.x) * 2.0**-24 * length.max())

    def check(self, result: Result, backend: str) -> None:
        """The a-priori budget for all; the measured one too, but for the reference, which cannot be its own measure, and
        in fp64, where the truth errs as much as what it judges, and in the same places as the reference."""
        t, theirs = self._yardstick(backend)
        one, worst = t.one_rounding, t.worst
        x_stored = stored_rounding(t.grad_x, self.problem.x.dtype)
        w_stored = stored_rounding(t.grad_w, self.problem.w.dtype)
        for name, exact, rounding, bound, filtered in (
            ("row_loss", t.row_loss, one.loss, worst.loss, t.screen_loss.get(backend, torch.zeros_like(t.row_loss))),
            ("grad_x", t.grad_x, one.x + x_stored, worst.x + x_stored, t.flip_x),
            ("grad_w", t.grad_w, one.w + w_stored, worst.w + w_stored, t.flip_w),
        ):
            ours, reference = getattr(result, name), getattr(theirs, name)
            error, their_error = ours.double().cpu() - exact, reference.double().cpu() - exact
            bound = bound * (1 + (self.dtype == torch.float64)) + filtered
            if name == "grad_w":
                bound = bound + self._tail(exact, backend)
            assert_rows_within(name, error, bound)
            if backend != "reference" and self.dtype != torch.float64:
                for size in (norm, largest):
                    budget = 2 * (size(their_error) + size(rounding)) + size(filtered)
                    assert size(error) <= budget, (
                        f"{name}: {size.__name__} of the error {size(error):.3g} beside {size(exact):.3g} exceeds "
                        f"{budget:.3g} (reference {size(their_error):.3g}, one rounding {size(rounding):.3g}, "
                        f"the filter {size(filtered):.3g})"
                    )

    def check_filter_bound(self, result: Result, backend: str) -> None:
        """Against the gradient of every pair: no further off than rounding and the dropped coefficients allow."""
        (t, _), x, w = self._yardstick(backend), self.problem.x, self.problem.w
        bound = t.missing_x + t.flip_x + t.worst.x + stored_rounding(t.full_grad_x, x.dtype)
        assert_rows_within("grad_x beside the unfiltered one", result.grad_x.double().cpu() - t.full_grad_x, bound)
        bound = t.missing_w + t.flip_w + t.worst.w + stored_rounding(t.full_grad_w, w.dtype)
        bound = bound + self._tail(t.full_grad_w, backend)
        assert_rows_within("grad_w beside the unfiltered one", result.grad_w.double().cpu() - t.full_grad_w, bound)


@functools.cache
def cached_judge(make, shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype, **options) -> Judge:
    return Judge(make(*shape).to("cpu", dtype, weight_dtype), **options)


def active_pairs(case: Case, problem: Problem, **options) -> Tensor:
    """Which pairs `[N, C]` have a gradient: the rows of ∂w that differ from 0 under each one-hot upstream gradient."""
    x, w, labels, _ = (t.detach().to(case.device) for t in problem)
    w.requires_grad_()
    rows = sface_loss(x, w, labels, reduction="none", backend=case.backend, **options)
    found = torch.zeros(len(rows), len(w), dtype=torch.bool)
    for i in range(len(rows)):
        (grad,) = torch.autograd.grad(rows[i], w, retain_graph=True)
        found[i] = (grad != 0).any(1).cpu()
    return found


def assert_same(ours: Result, theirs: Result) -> None:
    for name in ("row_loss", "grad_x", "grad_w"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def assert_same_for_threads(case: Case | str, problem: Problem, counts: Sequence[int], **options: Any) -> None:
    """A run with each of these numbers of threads gives the same bits and counts."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            results.append(run(case, problem, **options))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])
        assert result.stats == results[0].stats


def check(case, problem: Problem, **options) -> Result:
    result = run(case, problem, **options)
    Judge(problem, **options).check(result, case.backend)
    return result
