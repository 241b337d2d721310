"""Operator schemas and fake (meta) implementations. A leaf: torch only, so tracing needs no compiler and no GPU.

C++ and PyTorch only register implementations of what is declared here. The Triton backend declares its operators in
`backends/triton/buffers.py`, by `define`, `fake` and `implement`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .types import IGNORED, INVALID, NO_TARGET

NAMESPACE = "sface"
_library = torch.library.Library(NAMESPACE, "DEF")
define = _library.define

_HYPER = "float s, float k_intra, float k_inter, float a, float b, float filter_eps"

_library.define(
    "prepare_labels(Tensor labels, int num_classes, int ignore_index, bool check, int first, int count) -> Tensor"
)
_library.define(
    f"native_forward(Tensor x, Tensor w, Tensor target, {_HYPER}, bool need_grad_x, bool need_grad_w, int arena_words)"
    " -> (Tensor row_loss, Tensor row_stats, Tensor counts, Tensor row_grad_x, Tensor inv_norm,"
    " Tensor target_weight, Tensor arena, Tensor segments)"
)
_library.define(
    f"native_grad_weight(Tensor x, Tensor w, Tensor target, Tensor grad_row, {_HYPER}, Tensor inv_norm,"
    " Tensor target_weight, Tensor arena, Tensor segments) -> Tensor"
)
_library.define("native_instruction_sets() -> str[]")
_library.define("native_release_memory() -> ()")
_library.define(
    f"chunked_forward(Tensor x, Tensor w, Tensor target, {_HYPER}, bool need_grad_x, bool need_grad_w, int chunk)"
    " -> (Tensor row_loss, Tensor row_stats, Tensor counts, Tensor row_grad_x, Tensor pairs, Tensor coefficients,"
    " Tensor chunk_pairs)"
)
_library.define(
    f"chunked_grad_weight(Tensor x, Tensor w, Tensor target, Tensor grad_row, {_HYPER}, int chunk, Tensor pairs,"
    " Tensor coefficients, Tensor chunk_pairs) -> Tensor"
)

prepare_labels_op = torch.ops.sface.prepare_labels.default


def _prepare_labels(labels: Tensor, num_classes: int, ignore_index: int, check: bool, first: int, count: int) -> Tensor:
    target = labels.reshape(-1).to(torch.int64)
    ignored = target == ignore_index
    invalid = ((target < 0) | (target >= num_classes)) & ~ignored
    if check and bool(invalid.any()):
        row = int(invalid.nonzero()[0])
        raise ValueError(
            f"labels: expected values in [0, {num_classes}) or ignore_index={ignore_index}, "
            f"got {int(target[row])} in row {row} ({int(invalid.sum())} such rows)"
        )
    here = (target >= first) & (target < first + count)
    code = torch.where(here, target - first, NO_TARGET)
    code = torch.where(invalid, INVALID, code)
    return torch.where(ignored, IGNORED, code)


def implement(name: str, function: Callable[..., Any]) -> None:
    """Register a Python implementation for every device."""
    _library.impl(name, function, "CompositeExplicitAutograd")


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers what an operator returns without computing it: shapes, strides and dtypes, for tracing."""
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


implement("prepare_labels", _prepare_labels)


@torch.library.register_fake(f"{NAMESPACE}::prepare_labels", lib=_library)
def _(labels: Tensor, num_classes: int, ignore_index: int, check: bool, first: int, count: int) -> Tensor:
    return labels.new_empty([labels.shape[0]], dtype=torch.int64)


def prepare_labels(
    labels: Tensor, num_classes: int, ignore_index: int, check: bool, first: int = 0, count: int | None = None
) -> Tensor:
    """Labels of any integer dtype, `[N]` or `[N, 1]`, as int64 `[N]`: what the backends take as a row's target.

    For a weight that holds the classes [first, first + count) of `num_classes` (all of them by default) that is the row
    of the weight, or one of the codes of `types`: NO_TARGET for a class elsewhere, IGNORED, INVALID.

    With `check`, an out-of-range label raises ValueError, which reads the data (a synchronisation on a GPU).
    """
    return prepare_labels_op(labels, num_classes, ignore_index, check, first, num_classes if count is None else count)


CLASSES_PER_SEGMENT = 48  # classes whose active pairs the native backend stores together
SAMPLES_PER_GROUP = 256  # samples that one native task handles together


def native_segments(rows: int, classes: int) -> tuple[int, int]:
    """How many (sample groups, class blocks) the native backend keeps one segment record for."""
    return -(-rows // SAMPLES_PER_GROUP), -(-classes // CLASSES_PER_SEGMENT)


@torch.library.register_fake(f"{NAMESPACE}::native_forward", lib=_library)
def _(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, arena_words):
    n, d = x.shape
    groups, blocks = native_segments(n, w.shape[0])
    return (
        x.new_empty([n]),
        x.new_empty([6, n]),
        x.new_empty([2], dtype=torch.int64),
        x.new_empty([n if need_grad_x else 0, d]),
        x.new_empty([w.shape[0]]),
        x.new_empty([n]),
        x.new_empty([arena_words if need_grad_w else 0], dtype=torch.int32),
        x.new_empty([groups if need_grad_w else 0, blocks, 2], dtype=torch.int64),
    )


@torch.library.register_fake(f"{NAMESPACE}::native_grad_weight", lib=_library)
def _(x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, inv_norm, target_weight, arena, segments):
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


# active pairs (12 B each in float32) that the chunked backend lists before it recomputes instead
CHUNKED_MAX_PAIRS = 1 << 21


def compute_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """At least float32: what half inputs are computed in."""
    return torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::chunked_forward", lib=_library)
def _(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, chunk):
    (n, d), c, dtype = x.shape, w.shape[0], compute_dtype(x, w)
    capacity = min(n * c, CHUNKED_MAX_PAIRS)
    return (
        x.new_empty([n], dtype=dtype),
        x.new_empty([6, n], dtype=dtype),
        x.new_empty([2], dtype=torch.int64),
        x.new_empty([n if need_grad_x else 0, d], dtype=dtype),
        x.new_empty([capacity + n if need_grad_w else 0], dtype=torch.int64),
        x.new_empty([capacity + n if need_grad_w else 0], dtype=dtype),
        torch.empty([-(-c // chunk)], dtype=torch.int64, device="cpu"),
    )


@torch.library.register_fake(f"{NAMESPACE}::chunked_grad_weight", lib=_library)
def _(x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, chunk, pairs, coefficients, chunk_pairs):
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)
