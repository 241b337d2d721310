"""The C++ backend for a CPU. This file only sizes buffers and calls the operators that `csrc/` registers."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..types import Forward, HyperParameters, Request

try:
    importlib.import_module("sface_kernels._C")  # registers the operators
    missing: str | None = None
except (ImportError, OSError) as error:
    missing = (
        f"the C++ extension sface_kernels._C is not built or does not load ({error}); with a C++20 compiler, "
        "`pip install --no-build-isolation --no-deps --force-reinstall .` in a checkout builds it"
    )

ARENA_WORDS = 12 << 20  # at most 48 MiB: active pairs take 2 words each, entries of dense blocks 1, N·C in all suffice
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"it runs on a CPU, not on {request.device.type}"
    for dtype in (request.dtype, request.weight_dtype):
        if dtype not in DTYPES:
            return f"it computes in float32 and takes no {dtype}"
    return missing


def _inner_contiguous(w: Tensor) -> Tensor:
    if w.shape[1] == 1:  # the stride of a single column means nothing, and contiguous() would keep it
        return w[:, 0].unsqueeze(1)
    return w if w.stride(1) == 1 else w.contiguous()


def forward(x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool) -> Forward:
    return Forward.of(
        torch.ops.sface.native_forward(
            x.float().contiguous(), _inner_contiguous(w), target, *hp, need_x, need_w, ARENA_WORDS
        )
    )


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    return torch.ops.sface.native_grad_weight(
        x.float().contiguous(), _inner_contiguous(w), target, grad_row.contiguous(), *hp, *saved
    )
