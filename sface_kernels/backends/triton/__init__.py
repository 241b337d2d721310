"""The Triton backend: where it runs, and its two operators. Triton itself is imported by the first call."""

from __future__ import annotations

import functools
import importlib.metadata
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...types import IGNORED, NO_TARGET, Forward, HyperParameters, Request
from . import plan
from .buffers import Saved, went_dense
from .device import gpu_of, pretence
from .tiles import GRANULE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LABELS = (torch.int64, torch.int32)  # that a kernel is compiled for; others are converted
OLDEST_TRITON = (3, 4)
OLDEST_CAPABILITY = (8, 0)
MAX_FEATURES = 4096  # a row is held in the registers of one program


def _installed_triton() -> tuple[int, ...] | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return None


# once: looking it up takes a third of a millisecond, and torch.compile would trace through it
TRITON_VERSION = _installed_triton()


def unavailable(request: Request) -> str | None:
    """Why this backend cannot run a request, or None where it can."""
    device, pretended = request.device, pretence() is not None
    if device.type == "cpu" and not pretended and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on a GPU, and on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA and ROCm GPUs, not on {device.type}"
    for dtype in (request.dtype, request.weight_dtype):
        if dtype not in DTYPES:
            return f"it computes in float32 and takes no {dtype}"
    if request.features > MAX_FEATURES:
        return f"it takes at most {MAX_FEATURES} features, got {request.features}"
    if TRITON_VERSION is None:
        return "Triton is not installed"
    if TRITON_VERSION < OLDEST_TRITON:
        return f"it needs Triton ≥ {'.'.join(map(str, OLDEST_TRITON))}, found {'.'.join(map(str, TRITON_VERSION))}"
    if device.type == "cuda" and not pretended:
        return _too_old(device) if device.index is None else _known_too_old(device)
    return None


def _too_old(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        return f"it needs compute capability ≥ 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


_known_too_old = functools.cache(_too_old)  # of few devices; a call asks each time


def forward(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    hp: HyperParameters,
    need_x: bool,
    need_w: bool,
    ignore_index: int | None = None,
    reduction: str = "",
) -> Forward:
    """`labels` `[N]` are targets of `ops.prepare_labels`, or with an `ignore_index` labels of any integer dtype.

    With a `reduction`, "mean" or "sum", a dense call makes ∂w of the loss so reduced: that saves a second product of
    cosines and their coefficients. Only where w is float32: in half precision ∂w would underflow before it meets the
    factor of a loss scaler, which the upstream gradient brings.
    """
    if labels.dtype not in LABELS:
        labels = labels.to(torch.int64)
    gpu = gpu_of(x.device)
    way = plan.way_of(x, w, hp, gpu.family)
    # of raw labels none says that its class is elsewhere: what ignore_index means comes first
    codes = (IGNORED, NO_TARGET) if ignore_index is None else (ignore_index, ignore_index)
    if not way.dense or w.dtype != torch.float32 or x.shape[0] == 0:
        reduction = ""
    which = need_x, need_w, way.dense, gpu.multiprocessors, way.int8, reduction
    outputs = _forward_op(x, w, labels, *codes, hp, *which)
    row_loss, row_stats, hardest_class, counts, row_grad_x, *saved, counted, target, grad_w = outputs
    plan.learn(way, counts, x.shape[0] * w.shape[0])
    made = grad_w if reduction else None
    return Forward(
        row_loss, row_stats, hardest_class, counts, row_grad_x, tuple(saved), counted, target, made, way.int8
    )


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    # nothing but dense products serves where there is no filter: its lists need not be looked at
    dense = plan.threshold_of(hp, x.shape[1]) is None or went_dense(saved)
    return _grad_weight_op(x, w, target, grad_row.float(), hp, dense, saved)


def finish(made: Tensor | None, upstream: Tensor, *arguments: Any) -> Tensor:
    """`grad_weight` of the `arguments`; a ∂w that the forward made is multiplied by its upstream gradient, in place."""
    if made is None:
        return grad_weight(*arguments)
    _scale_op(made, upstream)
    return made


def can_move(x: Tensor, hp: HyperParameters, saved: tuple[Tensor, ...]) -> bool:
    """Whether `move` takes this call: one by lists. After dense products as many registers again would be needed."""
    return plan.threshold_of(hp, x.shape[1]) is not None and not went_dense(saved)


def move(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    hp: HyperParameters,
    grad_row: Tensor,
    saved: tuple[Tensor, ...],
    rule: str,
    **numbers: Any,
) -> None:
    """Moves w, and an optimizer's state, by ∂w without making it; `rule` and the numbers as in `sequence.Move`."""
    step = _sequence().Move(rule, **numbers)
    _sequence().grad_weight(x, w, target, grad_row.float(), hp, False, list(saved), step)


def class_block(rows: int) -> int:
    return GRANULE


def narrow(saved: tuple[Tensor, ...], rows: int, first: int, end: int) -> tuple[Tensor, ...]:
    """The lists are the samples'; what each class has is where its links begin."""
    kept = Saved(*saved)
    head = kept.head if went_dense(saved) else kept.head[first:end]
    return kept._replace(inv_norm=kept.inv_norm[first:end], head=head)


def way(x: Tensor, saved: tuple[Tensor, ...]) -> str | None:
    """Which way a call took, for its verification; None in the interpreter, where nothing is compiled."""
    if not x.is_cuda and pretence() is None:
        return None
    return "dense" if went_dense(saved) else "lists"


@functools.cache
def _sequence() -> ModuleType:
    """The module that imports Triton."""
    from . import sequence

    return sequence


def _forward(x, w, labels, ignore_index, no_target, hyper, *which) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    hp = HyperParameters(*hyper)
    return _sequence().forward(x, w, labels, hp, *which, ignore_index=ignore_index, no_target=no_target)


def _grad_weight(x, w, target, grad_row, hyper, dense, saved) -> Tensor:  # type: ignore[no-untyped-def]
    return _sequence().grad_weight(x, w, target, grad_row, HyperParameters(*hyper), dense, saved)


def _scale(grad_w, factor) -> None:  # type: ignore[no-untyped-def]
    _sequence().scale_by(grad_w, factor)


ops.implement("triton_forward", _forward)
ops.implement("triton_grad_weight", _grad_weight)
ops.implement("triton_scale", _scale)
_forward_op, _grad_weight_op = torch.ops.sface.triton_forward.default, torch.ops.sface.triton_grad_weight.default
_scale_op = torch.ops.sface.triton_scale.default
