"""The check against float64 that every provider passes before it is timed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..testing.budget import HALF, HALF_PRODUCTS, budget, half_budget, package_errors
from ..testing.truth import NOTHING, Errors, Truth, compute_truth, measure_errors
from ..testing.workloads import Workload
from .contestant import Bare, enter
from .providers import CONTEXT, OPPONENT, PACKAGE, LossFunction, Provider, multiply, read

FULL_CHECK_LIMIT = 1.5e10  # N·C·D up to which all classes are checked; float64 takes some 10 s there on a CPU
OPPONENT_LIMIT = 1e-4  # relative error of float32 arithmetic as people write it
BF16_LIMIT = 0.5  # products in bf16 move cosines by 1e-3, which k = 80 blows up: it only tells right from wrong


def reduced(work: Workload) -> Workload:
    """The workload, or where it is large one with fewer classes: the targets' and evenly spaced others."""
    shape = work.case.shape
    keep = int(FULL_CHECK_LIMIT / (shape.n * shape.d))
    if shape.c <= keep:
        return work
    spaced = torch.arange(0, shape.c, -(-shape.c // keep), device=work.y.device)
    classes = torch.cat([work.y, spaced]).unique()
    case = work.case._replace(shape=shape._replace(c=len(classes)))
    return Workload(case, work.x, work.w[classes], torch.searchsorted(classes, work.y), work.density)


class Checker:
    """Holds the float64 results of a workload, and what the reference makes of it."""

    def __init__(self, work: Workload, bf16_products: bool = False) -> None:
        self.work, self.bf16_products = reduced(work), bf16_products
        self.exact = compute_truth(self.work.x, self.work.w, self.work.y)
        self.filtered: tuple[float, Truth, Errors] | None = None  # of the last filter asked for
        self.half: Errors | None = None  # half_budget, which is slow

    def check(self, provider: Provider, function: LossFunction | None = None) -> dict[str, Any]:
        """`ok`, the number of classes checked, errors against the exact float64 result and against the one
        with the provider's filter, and the limits of the latter. Raises what the provider raises."""
        contestant = enter(provider, self.work, "both", self.bf16_products, function)
        if isinstance(contestant, Bare):
            return self._check_bare(contestant)
        found = contestant.results()
        if provider.kind == CONTEXT:
            errors = exact = self._cross_entropy_errors(*found)
            limits = self._opponent_limits(provider)
        else:
            meant, limits = self._meant(provider)
            errors, exact = measure_errors(meant, *found), measure_errors(self.exact, *found)
        return {
            "ok": all(error <= limit for error, limit in zip(errors, limits, strict=True)),
            "classes": self.work.case.shape.c,
            "errors": exact._asdict(),
            "errors_beyond_filter": errors._asdict(),
            "limits": limits._asdict(),
        }

    def _meant(self, provider: Provider) -> tuple[Truth, Errors]:
        """What the provider is meant to return, and how far off it may be."""
        if provider.kind == OPPONENT:
            return self.exact, self._opponent_limits(provider)
        assert provider.kind == PACKAGE and provider.backend is not None
        x, w, y = self.work.x, self.work.w, self.work.y
        filter_eps = provider.filter_for(x.dtype, x.shape[1])
        if self.filtered is None or self.filtered[0] != filter_eps:
            truth = compute_truth(x, w, y, filter_eps) if filter_eps else self.exact
            self.filtered = filter_eps, truth, package_errors(truth, x, w, y, "reference", filter_eps)
        _, truth, reference = self.filtered
        limits = budget(truth, reference, provider.backend)
        if x.dtype in HALF and provider.backend in HALF_PRODUCTS:
            self.half = self.half or half_budget(self.exact, x, w, y)
            limits = Errors(*map(max, limits, self.half))
        return truth, limits

    def _opponent_limits(self, provider: Provider) -> Errors:
        half = self.bf16_products or provider.autocast
        rounding = torch.finfo(self.work.x.dtype).eps  # of ∂x, which is stored in the embeddings' dtype
        limit = BF16_LIMIT if half else OPPONENT_LIMIT
        return Errors(limit, limit + rounding, limit)

    def _cross_entropy_errors(self, loss: Tensor, grad_x: Tensor, grad_w: Tensor) -> Errors:
        x, w = (t.double().requires_grad_() for t in (self.work.x, self.work.w))
        truth = F.cross_entropy(x @ w.t(), self.work.y)
        truth.backward()
        assert x.grad is not None and w.grad is not None
        value = float(truth.detach())
        meant = self.exact._replace(loss=value, magnitude=abs(value), grad_x=x.grad, grad_w=w.grad)
        return measure_errors(meant, loss, grad_x, grad_w)

    def _check_bare(self, contestant: Bare) -> dict[str, Any]:
        contestant.prepare()
        contestant.run()
        step = max(1, len(self.work.w) // 4096)
        x, w = self.work.x.double(), self.work.w[::step].double()
        found, limit = contestant.out, 1e-5
        if contestant.operation is multiply:
            found, truth = found[:, ::step], x @ w.t()
            if found.dtype != torch.float32 or contestant.precision != "highest":
                limit = 2e-2
        else:
            found, truth = found[::step], w.sum(1) if contestant.operation is read else torch.zeros_like(w)
        error = float((found.double() - truth).norm() / truth.norm().clamp_min(NOTHING))
        return {
            "ok": error <= limit,
            "classes": len(w),
            "errors": {"result": error},
            "errors_beyond_filter": {"result": error},
            "limits": {"result": limit},
        }
