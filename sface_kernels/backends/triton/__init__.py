"""The Triton backend: where it runs, and which way a call goes. Triton itself is imported by the first call."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...types import Forward, HyperParameters, Request
from . import density
from .rules import make_rules

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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


def unavailable(request: Request) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = request.device
    if device.type == "cpu" and not interpreted:
        return "it runs on a GPU, and on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA and ROCm GPUs, not on {device.type}"
    for dtype in (request.dtype, request.weight_dtype):
        if dtype not in DTYPES:
            return f"it computes in float32 and takes no {dtype}"
    if request.features > MAX_FEATURES:
        return f"it takes at most {MAX_FEATURES} features, got {request.features}"
    version = _installed_triton()
    if version is None:
        return "Triton is not installed"
    if version < OLDEST_TRITON:
        return f"it needs Triton ≥ {'.'.join(map(str, OLDEST_TRITON))}, found {'.'.join(map(str, version))}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch finds no GPU"
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < OLDEST_CAPABILITY:
            return f"it needs compute capability ≥ 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def forward(x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool) -> Forward:
    dense = not make_rules(hp, x.shape[1]).screens or density.expects_dense(x, w, hp)
    result = Forward.of(torch.ops.sface.triton_forward(x, w, target, *hp, need_x, need_w, dense))
    density.learn(result.counts, x, w, hp)
    return result


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    dense = saved[-4].shape[0] == 0  # no parts of lists were made
    return torch.ops.sface.triton_grad_weight(x, w, target, grad_row.float().contiguous(), *hp, dense, *saved)


def _forward(x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, dense) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    from . import launch_forward as launches
    from .launch import on_device

    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    with on_device(x):
        if x.shape[0] == 0:
            return ops.triton_nothing(x, w, need_grad_x, need_grad_w, dense)
        *results, saved = launches.forward(x, w, target, hp, need_grad_x, need_grad_w, dense)
    return (*results, *saved)


def _grad_weight(x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, dense, *saved) -> Tensor:  # type: ignore[no-untyped-def]
    from . import launch_backward as launches
    from .launch import Saved, on_device

    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    with on_device(x):
        if x.shape[0] == 0:
            return torch.zeros(w.shape, dtype=w.dtype, device=w.device)
        return launches.grad_weight(x, w, target, grad_row, hp, dense, Saved(*saved))


ops.implement("triton_forward", _forward)
ops.implement("triton_grad_weight", _grad_weight)
