"""∂w of one backward as what it is computed from, and the place where it waits for an optimizer that takes it so."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import verify
from .dispatch import BACKENDS
from .types import NO_TARGET, HyperParameters

RANGE_BYTES = 4 << 20  # of the rows of ∂w that are made at a time
RANGE_BYTES_CUDA = 16 << 20  # there each takes the host a dozen launches; the memory bound has room for two


class WeightGradient(NamedTuple):
    """What a backward knows of ∂w `[C, D]`, equation (8): the forward's lists and the upstream gradient of each row."""

    backend: str
    hp: HyperParameters
    x: Tensor  # [N, D]
    w: Tensor  # [C, D]
    target: Tensor  # [N], of `ops.prepare_labels`
    grad_row: Tensor  # [N], u_i; that of an ignored row plays no part
    saved: tuple[Tensor, ...]  # of `types.Forward`
    strict: bool = True  # whether a result that `verify` finds wrong raises

    @property
    def class_block(self) -> int:
        return BACKENDS[self.backend].class_block(len(self.x))

    def dense(self, made: Any = None, upstream: Tensor | None = None) -> Tensor:
        """`[C, D]`, in the dtype of `w`; of a mean or a sum its `upstream` gradient, and what the forward has `made`,
        may be given."""
        return self._of_all(self.w, self.target, self.saved, made, upstream)

    def rows(self, first: int, end: int) -> Tensor:
        """The rows of the classes first … end − 1, in the dtype of `w`. Reads nothing of the others but `saved`."""
        block, classes = self.class_block, len(self.w)
        start, stop = first // block * block, min(classes, -(-end // block) * block)
        w, backend = self.w[start:stop], BACKENDS[self.backend]
        inside = (self.target >= start) & (self.target < stop)
        target = torch.where(inside, self.target - start, self.target.clamp_max(NO_TARGET))  # codes are below that
        if backend.narrow is not None:
            saved = backend.narrow(self.saved, len(self.x), start, stop)
        else:
            saved = backend.forward(self.x, w, target, self.hp, False, True).saved
        return self._of_all(w, target, saved)[first - start : end - start]

    def sparse(self) -> Tensor:
        """A coalesced COO tensor `[C, D]` of the rows that are not all 0. Waits for the device."""
        indices, values = [], []
        for first, end in class_ranges(self.w, self.class_block):
            grad = self.rows(first, end)
            which = (grad != 0).any(1).nonzero().squeeze(1)
            indices.append(first + which)
            values.append(grad[which])
        return torch.sparse_coo_tensor(
            torch.cat(indices).unsqueeze(0), torch.cat(values), self.w.shape, is_coalesced=True, check_invariants=False
        )

    @property
    def can_move(self) -> bool:
        return len(self.x) > 0 and BACKENDS[self.backend].can_move(self.x, self.hp, self.saved)

    def move(self, rule: str, **numbers: Any) -> None:
        """Moves w and an optimizer's state in one pass over them, where that can be."""
        move = BACKENDS[self.backend].move
        assert move is not None
        move(self.x, self.w, self.target, self.hp, self.grad_row, self.saved, rule, **numbers)

    def _of_all(self, w: Tensor, target: Tensor, saved: tuple[Tensor, ...], *of_a_loss: Any) -> Tensor:
        grad = verify.grad_weight(
            self.backend, self.x, w, target, self.hp, self.grad_row, saved, self.strict, *of_a_loss
        )
        return grad if grad.dtype == w.dtype else grad.to(w.dtype)


def class_ranges(w: Tensor, block: int) -> Iterator[tuple[int, int]]:
    """(first, end) of ranges of about so many bytes of float32 rows of a weight, in whole blocks."""
    classes, features = w.shape
    size = RANGE_BYTES_CUDA if w.is_cuda else RANGE_BYTES
    step = block * max(1, size // (4 * features * block))
    bounds = [*range(0, classes, step), classes]
    return itertools.pairwise(bounds)


class PendingGradient:
    """The gradients of a weight that an optimizer has not taken yet, each with the versions of the embeddings and the
    weight at its backward.

    A weight that is spread over processes has two: operations on the `DTensor` count one, those on this process's rows
    of it the other.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self._waiting: list[tuple[WeightGradient, tuple[int, int, int]]] = []
        self.watch(weight)

    def watch(self, weight: nn.Parameter) -> None:
        """From now on, as long as somebody keeps this object, the gradients of `weight` wait here."""
        self._weight = weight
        _pending[id(weight)] = self
        if type(weight) is nn.Parameter:
            weight.__class__ = WatchedParameter

    def _versions(self, gradient: WeightGradient) -> tuple[int, int, int]:
        return gradient.x._version, self._weight._version, gradient.w._version

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, gradient: WeightGradient) -> None:
        self._waiting.append((gradient, self._versions(gradient)))

    def clear(self) -> None:
        self._waiting.clear()

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies ∂w, which is linear in the upstream gradients."""
        self._waiting = [(one._replace(grad_row=one.grad_row * factor), versions) for one, versions in self._waiting]

    def gradients(self) -> list[WeightGradient]:
        """Those that wait; raises where the embeddings or the weight were changed after their backward, as autograd
        does before it."""
        for one, versions in self._waiting:
            found = self._versions(one)
            if found != versions:
                raise RuntimeError(
                    f"{'weight' if found[1:] != versions[1:] else 'embeddings'}: modified by an in-place operation "
                    "between backward() and step(), while the weight's gradient waited "
                    f"(versions {found}, expected {versions}); step or zero_grad it first"
                )
        return [one for one, _ in self._waiting]


# By id(weight). Beside the tensors, not on them: a copy or a pickle of a weight must not take what waits for it along.
# No weak reference to a weight, with which torch.utils.swap_tensors, and so Module.to of a DTensor, would refuse it: a
# PendingGradient keeps its weight alive, so that no other object has the id.
_pending: weakref.WeakValueDictionary[int, PendingGradient] = weakref.WeakValueDictionary()


def pending_of(weight: Tensor) -> PendingGradient | None:
    """Where the gradient of this tensor is to wait; None: it is a tensor like any other."""
    return _pending.get(id(weight))


def wait_no_longer(weight: nn.Parameter) -> None:
    """From now on the gradient of `weight` is made, as that of any tensor."""
    _pending.pop(id(weight), None)
    if type(weight) is WatchedParameter:
        weight.__class__ = nn.Parameter  # type: ignore[assignment]


_grad: Any = Tensor.grad  # the attribute of every tensor


def gradient_of(weight: Tensor) -> Tensor | None:
    """`weight.grad`, without a warning."""
    return _grad.__get__(weight)


class WatchedParameter(nn.Parameter):
    """A parameter that warns whoever looks for its gradient while that waits, such as clip_grad_norm_ and another
    optimizer, which take None for nothing to do."""

    @property
    def grad(self) -> Tensor | None:
        grad = gradient_of(self)
        if grad is None and pending_of(self):
            warnings.warn(
                "head.weight.grad is None, and is not the gradient: that waits for the step of the head's optimizer. "
                "Clip it by that optimizer's max_norm, drop it by its zero_grad()",
                stacklevel=2,
            )
        return grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _grad.__delete__(self)
