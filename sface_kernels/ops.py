"""Operator schemas and fake (meta) implementations. A leaf: torch only, so tracing needs no compiler and no GPU.

C++ and PyTorch only register implementations of what is declared here. The Triton backend declares its operators in
`backends/triton/buffers.py`, by `define`, `fake` and `implement`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tracing import traced
from .types import IGNORED, INVALID, NO_TARGET

NAMESPACE = "sface"
# Kept by PyTorch, not by this module: an import anew (a reload, a purge of sys.modules) finds the operators there.
_library = vars(torch.ops.sface).setdefault("_library", torch.library.Library(NAMESPACE, "FRAGMENT"))


def _has_kernel(name: str, dispatch_key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key)


def define(schema: str) -> None:
    """Declare an operator, once a process."""
    if not hasattr(torch.ops.sface, schema.partition("(")[0]):
        _library.define(schema)


def implement(name: str, function: Callable[..., Any]) -> None:
    """Register a Python implementation for every device; the gradient is that of `autograd`, never of what it calls."""
    if _has_kernel(name, "CompositeExplicitAutograd"):
        return

    def run(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():  # as in an autograd Function
            return function(*arguments)
        with torch.no_grad():
            return function(*arguments)

    _library.impl(name, run, "CompositeExplicitAutograd")


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function that makes an operator's outputs without computing them."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not _has_kernel(name, "Meta"):
            torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library)
        return function

    return register


_HYPER = "float s, float k_intra, float k_inter, float a, float b, float filter_eps"

define("prepare_labels(Tensor labels, int num_classes, int ignore_index, bool check, int first, int count) -> Tensor")
define(
    "native_labels(Tensor labels, int num_classes, int ignore_index, int first, int count)"
    " -> (Tensor target, int first_invalid)"
)
define(
    f"native_forward(Tensor x, Tensor w, Tensor target, {_HYPER}, bool need_grad_x, bool need_grad_w, int arena_words)"
    " -> (Tensor row_loss, Tensor row_stats, Tensor hardest_class, Tensor counts, Tensor row_grad_x, Tensor inv_norm,"
    " Tensor target_weight, Tensor arena, Tensor segments, Tensor counted)"
)
define(
    f"native_forward_early(Tensor x, Tensor w, Tensor target, {_HYPER}, bool need_grad_x, int arena_words,"
    " float upstream, bool mean, Tensor(a!) grad_w, Tensor(b!) rows)"
    " -> (Tensor row_loss, Tensor row_stats, Tensor hardest_class, Tensor counts, Tensor row_grad_x, Tensor inv_norm,"
    " Tensor target_weight, Tensor arena, Tensor segments, Tensor counted)"
)
define(
    f"native_grad_weight(Tensor x, Tensor w, Tensor target, Tensor grad_row, {_HYPER}, Tensor inv_norm,"
    " Tensor target_weight, Tensor arena, Tensor segments) -> Tensor"
)
define(
    f"native_grad_weight_rest(Tensor x, Tensor w, Tensor target, Tensor grad_row, {_HYPER}, Tensor inv_norm,"
    " Tensor target_weight, Tensor arena, Tensor segments, Tensor(a!) grad_w, Tensor rows) -> ()"
)
# `saved` and `hyper`: seven tensors (x, target, grad_row and what the forward saved) and six numbers for each backward
_BACKWARDS = "Tensor[] saved, float[] hyper"
define(
    f"native_sgd_step(Tensor(a!) w, Tensor(b!)? momentum_buffer, {_BACKWARDS}, float lr, float momentum,"
    " float dampening, float weight_decay, bool nesterov, bool maximize) -> ()"
)
define(
    f"native_adamw_step(Tensor(a!) w, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {_BACKWARDS}, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, float step, bool maximize) -> ()"
)
define("native_empty_gradient(Tensor w) -> Tensor")
define("native_instruction_sets() -> str[]")
define(
    "native_constants() -> (int classes_per_segment, int samples_per_group, int no_target, int ignored, int invalid,"
    " float norm_eps, float candidate_share)"
)
define("native_release_memory() -> ()")
define(
    f"chunked_forward(Tensor x, Tensor w, Tensor target, {_HYPER}, bool need_grad_x, bool need_grad_w, SymInt chunk)"
    " -> (Tensor row_loss, Tensor row_stats, Tensor hardest_class, Tensor counts, Tensor row_grad_x, Tensor pairs,"
    " Tensor coefficients, Tensor chunk_pairs)"
)
define(
    f"chunked_grad_weight(Tensor x, Tensor w, Tensor target, Tensor grad_row, {_HYPER}, SymInt chunk, Tensor pairs,"
    " Tensor coefficients, Tensor chunk_pairs) -> Tensor"
)

prepare_labels_op = torch.ops.sface.prepare_labels.default


def _prepare_labels(labels: Tensor, num_classes: int, ignore_index: int, check: bool, first: int, count: int) -> Tensor:
    target = labels.reshape(-1).to(torch.int64)
    # few operations: on a GPU each is a launch, and `where` with a number two
    ignored = target == ignore_index
    place = target.clamp(0, num_classes - 1)
    outside = place != target
    if check:
        invalid = outside & ~ignored
        if bool(invalid.any()):
            row = int(invalid.nonzero()[0])
            raise ValueError(
                f"labels: expected values in [0, {num_classes}) or ignore_index={ignore_index}, "
                f"got {int(target[row])} in row {row} ({int(invalid.sum())} such rows)"
            )
    if (first, count) != (0, num_classes):
        place = torch.where((target >= first) & (target < first + count), target - first, NO_TARGET)
    return place.masked_fill_(outside, INVALID).masked_fill_(ignored, IGNORED)


implement("prepare_labels", _prepare_labels)


@fake("native_labels")
def _(labels: Tensor, num_classes: int, ignore_index: int, first: int, count: int) -> tuple[Tensor, int]:
    return labels.new_empty([labels.numel()], dtype=torch.int64), -1


@fake("prepare_labels")
def _(labels: Tensor, num_classes: int, ignore_index: int, check: bool, first: int, count: int) -> Tensor:
    return labels.new_empty([labels.numel()], dtype=torch.int64)


native_labels: Callable[..., tuple[Tensor, int]] | None = None  # the native backend's, where it is there


def prepare_labels(
    labels: Tensor, num_classes: int, ignore_index: int, check: bool, first: int = 0, count: int | None = None
) -> Tensor:
    """Labels of any integer dtype, `[N]`, `[N, 1]` or 0-d, as int64 `[N]`: what the backends take as a row's target.

    For a weight that holds the classes [first, first + count) of `num_classes` (all of them by default) that is the row
    of the weight, or one of the codes of `types`: NO_TARGET for a class elsewhere, IGNORED, INVALID.

    With `check`, an out-of-range label raises ValueError, which reads the data (a synchronisation on a GPU).
    """
    count = num_classes if count is None else count
    if native_labels is not None and labels.device.type == "cpu" and not traced():
        target, first_invalid = native_labels(labels.flatten().contiguous(), num_classes, ignore_index, first, count)
        if first_invalid < 0 or not check:
            return target
    return prepare_labels_op(labels, num_classes, ignore_index, check, first, count)


# What one record of the native backend's segments covers. The fake must know it without the extension; a test compares
# it with what native_constants() says.
CLASSES_PER_SEGMENT = 48
SAMPLES_PER_GROUP = 256


def native_segments(rows: int, classes: int) -> int:
    """How many segment records the native backend keeps: one for each group of samples and block of classes."""
    groups = (rows + SAMPLES_PER_GROUP - 1) // SAMPLES_PER_GROUP
    return groups * ((classes + CLASSES_PER_SEGMENT - 1) // CLASSES_PER_SEGMENT)


@fake("native_forward")
def _native_forward(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, arena_words):  # type: ignore[no-untyped-def]
    n, d = x.shape
    return (
        x.new_empty([n]),
        x.new_empty([6, n]),
        x.new_empty([n], dtype=torch.int64),
        x.new_empty([2], dtype=torch.int64),
        x.new_empty([n if need_grad_x else 0, d]),
        x.new_empty([w.shape[0]]),
        x.new_empty([n]),
        x.new_empty([torch.sym_min(arena_words, n * w.shape[0]) if need_grad_w else 0], dtype=torch.int32),
        # flat: a dimension that is 1 for some N only would be a guard on N
        x.new_empty([2 * native_segments(n, w.shape[0]) if need_grad_w else 0], dtype=torch.int64),
        x.new_empty([], dtype=torch.int64),
    )


@fake("native_forward_early")
def _(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, arena_words, upstream, mean, grad_w, rows):  # type: ignore[no-untyped-def]
    return _native_forward(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, True, arena_words)


@fake("native_grad_weight")
def _(x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, inv_norm, target_weight, arena, segments):  # type: ignore[no-untyped-def]
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


@fake("native_grad_weight_rest")
@fake("native_sgd_step")
@fake("native_adamw_step")
def _(*_) -> None:  # type: ignore[no-untyped-def]
    pass


@fake("native_empty_gradient")
def _(w):  # type: ignore[no-untyped-def]
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


# active pairs (12 B each in float32) that the chunked backend lists before it recomputes instead
CHUNKED_MAX_PAIRS = 1 << 21


def compute_dtype(x: Tensor, w: Tensor) -> torch.dtype:
    """At least float32: what half inputs are computed in."""
    return torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)


@fake("chunked_forward")
def _(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, chunk):  # type: ignore[no-untyped-def]
    (n, d), c, dtype = x.shape, w.shape[0], compute_dtype(x, w)
    capacity = torch.sym_min(n * c, CHUNKED_MAX_PAIRS)
    return (
        x.new_empty([n], dtype=dtype),
        x.new_empty([6, n], dtype=dtype),
        x.new_empty([n], dtype=torch.int64),
        x.new_empty([2], dtype=torch.int64),
        x.new_empty([n if need_grad_x else 0, d], dtype=dtype),
        x.new_empty([capacity + n if need_grad_w else 0], dtype=torch.int64),
        x.new_empty([capacity + n if need_grad_w else 0], dtype=dtype),
        torch.empty([-(-c // chunk)], dtype=torch.int64, device="cpu"),
    )


@fake("chunked_grad_weight")
def _(x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, chunk, pairs, coefficients, chunk_pairs):  # type: ignore[no-untyped-def]
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)
