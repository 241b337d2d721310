"""The check against float64 that every provider passes before it is timed."""

from __future__ import annotations

import math
from typing import Any

import torch

from .opponents import reference
from .providers import Contestant, LossFunction, Provider
from .truth import Errors, Truth, compute_truth, measure_errors
from .workloads import Workload

FULL_CHECK_LIMIT = 1.5e10  # N·C·D up to which all classes are checked; float64 takes some 10 s there
OPPONENT_LIMIT = 1e-4  # relative error of float32 arithmetic as people write it
BF16_LIMIT = 0.15  # products in bf16 move cosines by 1e-3, which k = 80 blows up


def reduced(work: Workload) -> Workload:
    """The workload, or where it is large one with fewer classes: the targets' and evenly spaced others."""
    shape = work.case.shape
    keep = int(FULL_CHECK_LIMIT / (shape.n * shape.d))
    if shape.c <= keep:
        return work
    spaced = torch.arange(0, shape.c, -(-shape.c // keep))
    classes = torch.cat([work.y, spaced]).unique()
    case = work.case._replace(shape=shape._replace(c=len(classes)))
    return Workload(case, work.x, work.w[classes], torch.searchsorted(classes, work.y), work.density)


class Checker:
    """Holds the float64 results of a workload and the error that the float32 reference makes on it."""

    def __init__(self, work: Workload, bf16_products: bool = False) -> None:
        self.work, self.bf16_products = reduced(work), bf16_products
        self.exact = compute_truth(self.work.x, self.work.w, self.work.y)
        self.filtered: tuple[float, Truth] = (0.0, self.exact)  # the last filter asked for
        own = Contestant(Provider("reference", "", lambda: reference), self.work, "both")
        self.reference = measure_errors(self.exact, *own.results())

    def limits(self, provider: Provider) -> Errors:
        """What still counts as right. The package is held to 4 × the reference's error + 1e-6 against the
        float64 result with the same filter, plus the filter itself: entries on its edge may fall on either
        side."""
        if provider.opponent:
            return Errors(*[BF16_LIMIT if self.bf16_products else OPPONENT_LIMIT] * 3)
        # the reference's arccos has no clamp and may have given NaN
        own = [4 * error + 1e-6 if math.isfinite(error) else OPPONENT_LIMIT for error in self.reference]
        edge = provider.filter_eps or 0.0
        return Errors(own[0], own[1] + edge, own[2] + edge)

    def meant(self, filter_eps: float) -> Truth:
        """The float64 result with this filter."""
        if self.filtered[0] != filter_eps:
            work = self.work
            result = compute_truth(work.x, work.w, work.y, filter_eps) if filter_eps else self.exact
            self.filtered = (filter_eps, result)
        return self.filtered[1]

    def check(self, provider: Provider, function: LossFunction | None = None) -> dict[str, Any]:
        """`ok`, the number of classes checked, errors against the exact float64 result and against the one
        with the provider's filter, and the limits of the latter. Raises what the provider raises."""
        contestant = Contestant(provider, self.work, "both", self.bf16_products, function)
        if provider.make is None:
            return self._check_product(contestant)
        found, limits = contestant.results(), self.limits(provider)
        errors = measure_errors(self.meant(provider.filter_eps or 0.0), *found)
        return {
            "ok": all(error <= limit for error, limit in zip(errors, limits, strict=True)),
            "classes": self.work.case.shape.c,
            "errors": measure_errors(self.exact, *found)._asdict(),
            "errors_beyond_filter": errors._asdict(),
            "limits": limits._asdict(),
        }

    def _check_product(self, contestant: Contestant) -> dict[str, Any]:
        contestant.prepare()
        contestant.run()
        step = max(1, len(self.work.w) // 4096)
        truth = self.work.x.double() @ self.work.w[::step].double().t()
        error = float((contestant.out[:, ::step].double() - truth).norm() / truth.norm())
        limit = 1e-5 if contestant.provider.product == torch.float32 and not self.bf16_products else 2e-2
        return {
            "ok": error <= limit,
            "classes": len(truth[0]),
            "errors": {"product": error},
            "errors_beyond_filter": {"product": error},
            "limits": {"product": limit},
        }
