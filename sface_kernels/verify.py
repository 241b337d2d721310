"""Trust before proof: calls on a GPU checked against `chunked`, on a part of what they were given.

The first two calls of each kind in a process are checked, forward and backward: row losses and ∂x of some of their
samples over all classes, and ∂w of some of their classes over all samples. The second as its launches may be repeated
from a list, and not worked out as the first's are. That waits for the GPU, twice; later calls do not.
`SFACE_VERIFY=0` turns it off, `SFACE_VERIFY=all` checks every call and `SFACE_VERIFY=1000` each thousandth of a kind.
Calls that are compiled or captured in a CUDA graph are not checked, nor is a backward under torch.func, nor what a
head's optimizer moves instead of making ∂w.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .dispatch import BACKENDS, distrusted
from .tracing import traced
from .types import NO_TARGET, NORM_EPS, Forward, HyperParameters, RowStats

ROWS = 32  # samples whose losses and ∂x are computed again
FIRST = 2  # calls of a kind that are checked
CLASSES = 16  # classes whose ∂w is, and as many samples' own classes
Kind = tuple[object, ...]

_calls: dict[Kind, int] = {}  # how many of a kind there have been


class WrongResult(RuntimeError):
    """A backend failed, or its results are further from those of `chunked` than rounding explains."""


def _period() -> int:
    """Of how many calls of a kind one is checked beside the first; 0: none at all, −1: no other."""
    text = os.environ.get("SFACE_VERIFY", "first")
    if text in ("first", "all"):
        return -1 if text == "first" else 1
    if not text.isdecimal():
        raise ValueError(f"SFACE_VERIFY: expected 0, all or a number of calls, got {text!r}")
    return int(text)


def _can_wait(x: Tensor) -> bool:
    if traced(x):
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def is_batched(grad: Tensor) -> bool:
    """Whether vmap may hold a Jacobian's batch of upstream gradients in it: it cannot be read, nor fill an `out`."""
    if traced():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._are_functorch_transforms_active()


def _due(kind: Kind, period: int) -> bool:
    before = _calls.get(kind, 0)
    _calls[kind] = before + 1
    return before < FIRST or (period > 0 and before % period == 0)


def _kind(backend: str, x: Tensor, w: Tensor, hp: HyperParameters) -> Kind:
    # not N, nor C but its size: the last batch of an epoch and sampled classes run the same kernels
    return backend, x.device, x.dtype, w.dtype, x.shape[1], w.shape[0].bit_length(), hp.filter_eps > 0


def _backward_kind(kind: Kind, way: str, made: Any) -> Kind:
    return *kind, way, made is None, "backward"


def _tolerance(x: Tensor, hp: HyperParameters, way: str) -> float:
    """How far a sum of (5) to (8) may be off, relative to the sizes of its terms.

    A cosine's error through the slope of (3) or (4) at its steepest, twice. Only dense products of half embeddings
    round them to half precision.
    """
    rough = way == "dense" and x.dtype != torch.float32
    return 2 * max(hp.k_intra, hp.k_inter, 1.0) * (2.0**-10 if rough else 2.0**-16)


def _off(ours: Tensor, theirs: Tensor, allowed: Tensor, what: str) -> str | None:
    """What to say of results `[R]` or `[R, D]` whose rows may differ by `allowed` `[R]`, if one differs more."""
    ours, theirs = (t.double().reshape(len(allowed), -1) for t in (ours, theirs))
    distance = (ours - theirs).norm(dim=1)
    right = (distance <= allowed) | (~theirs.isfinite().all(1) & ~ours.isfinite().all(1))
    share = torch.where(right, 0, distance / allowed).nan_to_num(torch.inf)
    worst = int(share.argmax())
    if float(share[worst]) <= 1:
        return None
    return f"{what} differs by {float(distance[worst]):.3g}, {float(allowed[worst]):.3g} allowed"


def _spread(count: int, total: int, device: torch.device) -> Tensor:
    """Up to `count` numbers from 0 to `total` − 1, the first and the last among them."""
    return torch.linspace(0, total - 1, min(count, total), device=device, dtype=torch.float64).long()


def _compare_forward(
    result: Forward, x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, relative: float
) -> str | None:
    need_x = len(result.row_grad_x) > 0
    some = _spread(ROWS, len(x), x.device)
    theirs = BACKENDS["chunked"].forward(x[some], w, target[some], hp, need_x, False)
    stats = RowStats(*theirs.row_stats)
    smallest = hp.s * (4 * hp.filter_eps + 1e-6)  # entries at the edge of the filter, and where nothing is left
    terms = relative * (stats.intra.abs() + stats.inter.abs()) + smallest  # [R]
    off = _off(result.row_loss[some], theirs.row_loss, terms + 0.1 * stats.dropped, "a row loss")
    if off is None and need_x:
        length = x[some].float().norm(dim=1).clamp_min(NORM_EPS)
        size = relative * theirs.row_grad_x.norm(dim=1)
        off = _off(result.row_grad_x[some], theirs.row_grad_x, size + terms / length, "a row of ∂x")
    return off


def _compare_backward(
    grad_w: Tensor, x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, relative: float
) -> str | None:
    own = target[_spread(CLASSES, len(x), x.device)]
    some = torch.cat([own[own >= 0], _spread(CLASSES, len(w), x.device)]).unique()  # [J], sorted
    place = torch.searchsorted(some, target).clamp_max(len(some) - 1)
    there = torch.where(some[place] == target, place, torch.where(target >= 0, NO_TARGET, target))
    part = w[some]
    made = BACKENDS["chunked"].forward(x, part, there, hp, False, True)
    theirs = BACKENDS["chunked"].grad_weight(x, part, there, hp, grad_row, made.saved)
    stats = RowStats(*made.row_stats)
    length = part.double().norm(dim=1, keepdim=True).clamp_min(NORM_EPS)
    ours, theirs = (t.double() * length for t in (grad_w[some], theirs))
    relative += 2 * torch.finfo(w.dtype).eps  # as it is stored
    terms = relative * (stats.intra.abs() + stats.inter.abs()) + hp.s * (4 * hp.filter_eps + 1e-6)
    allowed = relative * theirs.norm() + (grad_row.double().abs() * terms).nan_to_num(0).sum()
    return _off(ours.reshape(1, -1), theirs.reshape(1, -1), allowed.reshape(1), "∂w")


def _checked(backend: str, compare: Callable[[], str | None]) -> None:
    try:
        off = compare()
    except torch.OutOfMemoryError:
        return  # the call itself had room
    if off is not None:
        raise WrongResult(f"backend {backend!r} gives other results than 'chunked': {off} (SFACE_VERIFY)")


def forward(
    backend: str, x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool, **options: Any
) -> Forward:
    """The backend's forward, checked where that is due. With an `ignore_index` the target is labels as they are.

    Raises:
        WrongResult: it is off, or failed in the first call of its kind.
    """
    entry = BACKENDS[backend]
    if entry.way is None or not _can_wait(x) or x.shape[0] == 0 or (period := _period()) == 0:
        return entry.forward(x, w, target, hp, need_x, need_w, **options)
    kind = _kind(backend, x, w, hp)
    try:
        result = entry.forward(x, w, target, hp, need_x, need_w, **options)
    except Exception as error:
        _raise_failure(backend, error, first=kind not in _calls)
    _calls.setdefault(kind, 1)
    way = entry.way(x, result.saved)
    if way is not None and _due((*kind, way, result.coarse, need_x), period):
        if result.coarse:  # so that the next backward, which reads what this screen left, is checked too
            _calls[_backward_kind(kind, way, result.made)] = FIRST - 1
        prepared = target if result.target is None else result.target
        _checked(backend, lambda: _compare_forward(result, x, w, prepared, hp, _tolerance(x, hp, way)))
    return result


def grad_weight(
    backend: str,
    x: Tensor,
    w: Tensor,
    target: Tensor,
    hp: HyperParameters,
    grad_row: Tensor,
    saved: tuple[Tensor, ...],
    strict: bool,
    made: Any = None,
    upstream: Tensor | None = None,
) -> Tensor:
    """The backend's ∂w, checked where that is due; what is wrong raises, or unless `strict` `chunked` does it.

    Of a mean or a sum `upstream` is the one that `grad_row` was made of, and `made` is `Forward.made`.
    """
    entry = BACKENDS[backend]

    def make() -> Tensor:
        if upstream is None or entry.finish is None:
            return entry.grad_weight(x, w, target, hp, grad_row, saved)
        return entry.finish(made, upstream, x, w, target, hp, grad_row, saved)

    can_wait = x.shape[0] > 0 and _can_wait(x) and not is_batched(grad_row)
    way = entry.way(x, saved) if entry.way is not None and can_wait else None
    period = _period() if way is not None else 0
    if way is None or period == 0 or not _due(_backward_kind(_kind(backend, x, w, hp), way, made), period):
        return make()
    try:
        try:
            grad_w = make()
        except Exception as error:
            _raise_failure(backend, error, first=True)
        _checked(backend, lambda: _compare_backward(grad_w, x, w, target, hp, grad_row, _tolerance(x, hp, way)))
        return grad_w
    except WrongResult as error:
        if strict:
            raise
        distrust(backend, error)
    anew = BACKENDS["chunked"].forward(x, w, target, hp, False, True)
    return BACKENDS["chunked"].grad_weight(x, w, target, hp, grad_row, anew.saved)


def _raise_failure(backend: str, error: Exception, first: bool) -> NoReturn:
    """What a first call raises is the compiler's, but for memory that runs out and settings that are wrong."""
    if not first or isinstance(error, (torch.OutOfMemoryError, ValueError)):
        raise error
    text = (str(error).strip().splitlines() or [""])[0][:200]
    raise WrongResult(f"backend {backend!r} failed: {type(error).__name__}: {text}") from error


def distrust(backend: str, error: WrongResult) -> None:
    """From now on "auto" takes `chunked` instead; says so."""
    if backend not in distrusted:
        warnings.warn(f"sface_kernels: {error}; 'auto' takes 'chunked' from now on", stacklevel=2)
    distrusted[backend] = str(error)
