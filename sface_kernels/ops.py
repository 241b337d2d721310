"""Operator schemas and fake (meta) implementations. A leaf: torch only, so tracing needs no compiler and no GPU.

C++ and Triton only register implementations of what is declared here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .types import IGNORED, INVALID, NO_TARGET

NAMESPACE = "sface"
_library = torch.library.Library(NAMESPACE, "DEF")

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
_library.define("native_empty_gradient(Tensor w) -> Tensor")
_library.define("native_instruction_sets() -> str[]")
_library.define(
    "native_constants() -> (int classes_per_segment, int samples_per_group, int ignored, int invalid, float norm_eps,"
    " float candidate_share)"
)
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


# What one record of the native backend's segments covers. The fake must know it without the extension; a test compares
# it with what native_constants() says.
CLASSES_PER_SEGMENT = 48
SAMPLES_PER_GROUP = 256


def native_segments(rows: int, classes: int) -> int:
    """How many segment records the native backend keeps: one for each group of samples and block of classes."""
    groups = (rows + SAMPLES_PER_GROUP - 1) // SAMPLES_PER_GROUP
    return groups * ((classes + CLASSES_PER_SEGMENT - 1) // CLASSES_PER_SEGMENT)


@torch.library.register_fake(f"{NAMESPACE}::native_forward", lib=_library)
def _(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, arena_words):
    n, d = x.shape
    return (
        x.new_empty([n]),
        x.new_empty([6, n]),
        x.new_empty([2], dtype=torch.int64),
        x.new_empty([n if need_grad_x else 0, d]),
        x.new_empty([w.shape[0]]),
        x.new_empty([n]),
        x.new_empty([torch.sym_min(arena_words, n * w.shape[0]) if need_grad_w else 0], dtype=torch.int32),
        # flat: a dimension that is 1 for some N only would be a guard on N
        x.new_empty([2 * native_segments(n, w.shape[0]) if need_grad_w else 0], dtype=torch.int64),
    )


@torch.library.register_fake(f"{NAMESPACE}::native_grad_weight", lib=_library)
def _(x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, inv_norm, target_weight, arena, segments):
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


@torch.library.register_fake(f"{NAMESPACE}::native_empty_gradient", lib=_library)
def _(w):
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


# Sizes of the Triton backend's buffers. They follow from the shapes alone, not from the GPU, so that fakes know them
# and results do not depend on the number of multiprocessors.
TRITON_PROGRAMS = 264  # what a launch aims at: two on each multiprocessor of an H200
TRITON_ROWS = 128  # samples that buffers are padded to
TRITON_LIST_BYTES = 44 << 20  # of lists, plus what the memory bound grants for C and N·D
TRITON_SLOT_BYTES = 16  # class, weight, cosine, and in the backward a link
TRITON_PARTIAL_BYTES = 16 << 20  # of partial sums of ∂x
TRITON_CHUNK_BYTES = 32 << 20  # of unit rows and coefficients of a chunk of classes: it stays in the L2 cache

_library.define(
    f"triton_forward(Tensor x, Tensor w, Tensor target, {_HYPER}, bool need_grad_x, bool need_grad_w, bool dense)"
    " -> (Tensor row_loss, Tensor row_stats, Tensor counts, Tensor row_grad_x, Tensor norm, Tensor inv_norm,"
    " Tensor dense_row, Tensor flags, Tensor target_weight, Tensor cos_target, Tensor list_counts, Tensor list_classes,"
    " Tensor list_weight, Tensor list_cos)"
)
_library.define(
    f"triton_grad_weight(Tensor x, Tensor w, Tensor target, Tensor grad_row, {_HYPER}, bool dense, Tensor norm,"
    " Tensor inv_norm, Tensor dense_row, Tensor flags, Tensor target_weight, Tensor cos_target, Tensor list_counts,"
    " Tensor list_classes, Tensor list_weight, Tensor list_cos) -> Tensor"
)


def triton_padded(rows: int) -> int:
    return -(-rows // TRITON_ROWS) * TRITON_ROWS


def triton_lists(rows: int, classes: int, features: int, dense: bool) -> tuple[int, int]:
    """(stripes, capacity): each sample's list has that many parts, of that many candidates each."""
    if dense:
        return 1, 0
    tiles = -(-classes // 128)
    in_chunk = TRITON_CHUNK_BYTES // (2 * 128 * (features + 127))  # a chunk holds a tile of every stripe
    stripes = max(1, min(TRITON_PROGRAMS // max(1, triton_padded(rows) // TRITON_ROWS), tiles, in_chunk))
    granted = TRITON_LIST_BYTES + 12 * classes + 4 * rows * features
    capacity = granted // TRITON_SLOT_BYTES // (max(TRITON_ROWS, triton_padded(rows)) * stripes)
    return stripes, max(1, min(capacity, -(-tiles // stripes) * 128))


def _triton_outputs(x: Tensor, w: Tensor, need_grad_x: bool, need_grad_w: bool, dense: bool) -> tuple[Tensor, ...]:
    (n, d), c = x.shape, w.shape[0]
    stripes, capacity = triton_lists(n, c, d, dense)
    padded = triton_padded(n)
    slots = padded * stripes * capacity

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    return (
        empty(n),
        empty(6, n),
        empty(2, dtype=torch.int64),
        empty(n if need_grad_x else 0, d),
        empty(padded),
        empty(c),
        empty(padded, dtype=torch.int32),
        empty(2, dtype=torch.int32),
        empty(n),
        empty(n),
        empty(0 if dense else stripes, padded, dtype=torch.int32),
        empty(slots, dtype=torch.int32),
        empty(slots if need_grad_w else 0),
        empty(slots if need_grad_w else 0),
    )


@torch.library.register_fake(f"{NAMESPACE}::triton_forward", lib=_library)
def _(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, dense):
    return _triton_outputs(x, w, need_grad_x, need_grad_w, dense)


def triton_nothing(x: Tensor, w: Tensor, need_grad_x: bool, need_grad_w: bool, dense: bool) -> tuple[Tensor, ...]:
    """What the forward returns for N = 0, where nothing is launched."""
    return tuple(t.zero_() for t in _triton_outputs(x, w, need_grad_x, need_grad_w, dense))


@torch.library.register_fake(f"{NAMESPACE}::triton_grad_weight", lib=_library)
def _(x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, dense, *saved):
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)
