"""Every backend against float64 on small problems: shapes with remainders, dtypes, and inputs that break kernels.

Budget: `budget.limits`, the rule of the tests. Work: less than a second for each backend and dtype on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import BACKENDS
from ..types import Request
from ..validation import default_filter_eps
from . import budget
from .failure import failure_text
from .truth import Errors, compute_truth
from .workloads import Case, Shape, make_workload

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of the embeddings; weights at least float32
SMALL = Shape(40, 300, 64)  # the most that is bearable in Triton's interpreter
# (N, C, D): nothing to tile, below every tile, primes, one over a tile of 256 rows, the D of face recognition. Three D,
# as on a GPU each is a set of kernels to compile.
SHAPES = (Shape(1, 1, 1), Shape(3, 5, 61), Shape(31, 101, 61), Shape(257, 331, 61), Shape(31, 1009, 512))


class Problem(NamedTuple):
    """Inputs of one check."""

    name: str
    x: Tensor  # [N, D]
    w: Tensor  # [C, D]
    y: Tensor  # [N], −1 where the row is ignored


class Outcome(NamedTuple):
    """One backend on one problem. `failure` is set where it raised, and then there are no errors."""

    backend: str
    dtype: str
    filter_eps: float
    problem: str
    limits: Errors
    errors: Errors | None
    failure: str | None = None

    @property
    def share(self) -> float:
        """Of the budget that the worst of the three errors takes; infinite where it failed or is not a number."""
        if self.errors is None:
            return float("inf")
        # a limit of 0 is a result that every computation gets exactly
        shares = [e / m if m else float("inf") if e else 0.0 for e, m in zip(self.errors, self.limits, strict=True)]
        return max(shares) if all(share == share for share in shares) else float("inf")

    @property
    def ok(self) -> bool:
        return self.share <= 1

    def as_json(self) -> dict[str, Any]:
        errors = self.errors and self.errors._asdict()
        return {**self._asdict(), "limits": self.limits._asdict(), "errors": errors, "ok": self.ok}


def _on_centre(x: Tensor, w: Tensor, y: Tensor) -> None:
    x[0], x[1] = 3 * w[y[0]], -2 * w[y[1]]
    x[2] = w[(y[2] + 1) % len(w)]


def _zero_rows(x: Tensor, w: Tensor, y: Tensor) -> None:
    if x.dtype not in budget.HALF:  # whose range the gradient of such a row exceeds: it is divided by 1e-12
        x[0] = 0
    w[y[1]] = 0


def _collapsed(x: Tensor, w: Tensor, y: Tensor) -> None:
    axis = w[0] / w[0].norm()
    for rows in (x, w):
        length = rows.norm(dim=1, keepdim=True)
        rows.mul_(0.3).add_(length * axis)


def _ignored(x: Tensor, w: Tensor, y: Tensor) -> None:
    x[0] = torch.nan
    y[0::2] = -1


HARD: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "samples on a centre": _on_centre,
    "every centre twice": lambda x, w, y: w[1::2].copy_(w[:-1:2]),
    "zero rows": _zero_rows,
    "all pairs active": _collapsed,
    "half the rows ignored": _ignored,
    "all rows ignored": lambda x, w, y: y.fill_(-1),
    "all of the last class": lambda x, w, y: y.fill_(len(w) - 1),
}


def request(device: torch.device, dtype: torch.dtype) -> Request:
    """What is checked and timed with embeddings of `dtype`: weights are at least float32."""
    return Request(device, dtype, torch.promote_types(dtype, torch.float32))


def unavailable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend cannot run such a request."""
    return BACKENDS[backend].unavailable(request(device, dtype))


def problems(device: torch.device, dtype: torch.dtype, small: bool) -> Iterator[Problem]:
    """The spread; `small` leaves out what is larger than SMALL."""
    weight_dtype = request(device, dtype).weight_dtype
    for shape in SHAPES:
        if small and any(own > most for own, most in zip(shape, SMALL, strict=True)):
            continue
        for geometry in ("random", "trained") if min(shape) > 1 else ("random",):
            work = make_workload(Case(shape, geometry), device, dtype)
            yield Problem(f"{geometry} {'×'.join(map(str, shape))}", work.x, work.w.to(weight_dtype), work.y)
    for name, change in HARD.items():
        work = make_workload(Case(Shape(16, 97, 61), "trained"), device, dtype)
        x, w, y = work.x, work.w.to(weight_dtype), work.y
        change(x, w, y)
        yield Problem(name, x, w, y)


def run(backends: list[str], device: torch.device, dtype: torch.dtype, small: bool = False) -> Iterator[Outcome]:
    """Outcomes of the backends that can run `dtype`, with the default filter and with none."""
    runnable = [backend for backend in backends if unavailable(backend, device, dtype) is None]
    for problem in problems(device, dtype, small) if runnable else ():
        for filter_eps in (default_filter_eps(dtype, problem.x.shape[1]), 0.0):
            for backend in runnable:
                yield judge(problem, backend, filter_eps)


def judge(problem: Problem, backend: str, filter_eps: float) -> Outcome:
    """The errors of one backend beside their limits."""
    name, x, w, y = problem
    judged = budget.has_reference(backend, x.dtype)
    truth = compute_truth(x, w, y, filter_eps, w.dtype, any_order=not judged)
    reference = budget.package_errors(truth, x, w, y, "reference", filter_eps) if judged else None
    limits = budget.limits(truth, reference, x, w, y, backend)
    errors, failure = None, None
    try:
        errors = budget.package_errors(truth, x, w, y, backend, filter_eps)
    except Exception as error:
        failure = failure_text(error)
    return Outcome(backend, str(x.dtype).removeprefix("torch."), filter_eps, name, limits, errors, failure)
