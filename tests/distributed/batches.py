"""Batches spread over processes, as every rank can make them, and the single process that a group is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sface_kernels import SFaceLoss, SFaceStats
from sface_kernels.distributed import ClassParallelSFaceLoss
from tests.support.problems import GEOMETRIES

OPTIONS = dict(s=30.0, k=60.0, a=0.9, b=1.1, filter_eps=0.0)


def cuts(rows: int, processes: int, kind: str) -> list[int]:
    """Where the rows of a batch are cut, `processes + 1` bounds."""
    if kind == "even":
        return [rank * (rows // processes) for rank in range(processes)] + [rows]
    if kind == "uneven":  # rank 1 has none, the others a third, one row each, and the rest
        return [*(0, rows // 3, rows // 3, rows // 3 + 1)[:processes], rows]
    assert kind == "nothing"
    return [0] * (processes + 1)


class Split(NamedTuple):
    """A whole batch, and the bounds of this process's rows of it."""

    x: Tensor  # [N, D]
    w: Tensor  # [C, D]
    labels: Tensor  # [N]
    low: int
    high: int

    @property
    def mine(self) -> slice:
        return slice(self.low, self.high)


def split(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, geometry: str = "trained", seed: int = 0
) -> Split:
    """The same on every process but for the bounds. Every fifth row is ignored, and holds what must not count."""
    problem = GEOMETRIES[geometry](*shape, seed)
    x, w, labels = problem.x.to(dtype), problem.w.to(dtype), problem.labels.clone()
    labels[4::5] = -100
    x[4::5] = torch.nan
    bounds = cuts(len(x), dist.get_world_size(), kind)
    rank = dist.get_rank()
    x, labels = x[: bounds[-1]], labels[: bounds[-1]]
    return Split(x, w, labels, bounds[rank], bounds[rank + 1])


def make_head(w: Tensor, **options) -> ClassParallelSFaceLoss:
    head = ClassParallelSFaceLoss(w.shape[1], w.shape[0], dtype=w.dtype, **{**OPTIONS, **options})
    head.load_state_dict({"weight": w})
    return head


def single(w: Tensor, **options) -> SFaceLoss:
    head = SFaceLoss(w.shape[1], w.shape[0], dtype=w.dtype, **{**OPTIONS, **options})
    head.load_state_dict({"weight": w})
    return head


class Step(NamedTuple):
    loss: Tensor
    stats: SFaceStats
    grad_x: Tensor
    grad_w: Tensor


def one_process(batch: Split, dtype: torch.dtype | None = None, **options) -> Step:
    """The whole batch in this process, in `dtype`."""
    dtype = dtype or batch.w.dtype
    head = single(batch.w.to(dtype), **options)
    x = batch.x.to(dtype, copy=True).requires_grad_()
    loss, stats = head(x, batch.labels, return_stats=True)
    loss.backward()
    return Step(loss.detach(), stats, x.grad, head.weight.grad)


def assert_near(name: str, ours: Tensor, single: Tensor, exact: Tensor) -> None:
    """No further from `exact` than twice the single process is, and one rounding for each of the sums over processes."""
    size = float(exact.double().norm())
    error, own = (float((t.double() - exact.double()).norm()) for t in (ours, single))
    allowed = 2 * own + 8 * torch.finfo(ours.dtype).eps * max(size, 1e-30)
    assert error <= allowed, f"{name}: {error:.3g} beside {size:.3g}, a single process errs by {own:.3g}"
