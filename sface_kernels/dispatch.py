"""The table of backends, which of them "auto" takes, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import chunked, native, reference, triton
from .types import Forward, HyperParameters


class Backend(NamedTuple):
    """One implementation. `unavailable` says why it cannot run these devices and dtypes, or None where it can."""

    summary: str
    unavailable: Callable[[torch.device, torch.dtype, torch.dtype], str | None]
    forward: Callable[[Tensor, Tensor, Tensor, HyperParameters, bool, bool], Forward]
    grad_weight: Callable[[Tensor, Tensor, Tensor, HyperParameters, Tensor, tuple[Tensor, ...]], Tensor]


BACKENDS: dict[str, Backend] = {
    name: Backend(summary, module.unavailable, module.forward, module.grad_weight)
    for name, summary, module in (
        ("native", "C++ on the CPU: one streamed pass over the weight", native),
        ("triton", "Triton kernels on a GPU: one screened pass over the weight, no synchronisation", triton),
        ("chunked", "portable PyTorch over blocks of classes", chunked),
        ("reference", "plain PyTorch, N×C materialised", reference),
    )
}
PREFERENCE = ("native", "chunked")  # what "auto" tries, in order


def available_backends(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> list[str]:
    """Names of the backends that can run embeddings of `dtype` on `device`, the one "auto" takes first."""
    return [
        name
        for name, backend in BACKENDS.items()
        if backend.unavailable(torch.device(device), dtype, weight_dtype or dtype) is None
    ]


def check_name(name: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {['auto', *BACKENDS]}, got {name!r}")


def select(name: str, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """The backend to run. An explicit name never falls back: it raises with the reason."""
    if name == "auto":
        for candidate in PREFERENCE:
            if BACKENDS[candidate].unavailable(device, dtype, weight_dtype) is None:
                return candidate
    check_name(name)
    reason = BACKENDS[name].unavailable(device, dtype, weight_dtype)
    if reason is not None:
        raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")
    return name


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> str:
    """What `backend` resolves to for these tensors, and for every other backend whether it could run and why not.

    Args:
        device: device of the embeddings.
        dtype: dtype of the embeddings.
        weight_dtype: dtype of the weight; that of the embeddings if None.
        backend: the name that would be given to `sface_loss`.

    Returns:
        Text of one line per backend, the chosen one marked with "->".

    Raises:
        ValueError, RuntimeError: as `sface_loss` would for this backend.
    """
    device, weight_dtype = torch.device(device), weight_dtype or dtype
    chosen = select(backend, device, dtype, weight_dtype)
    lines = [f"{backend!r} on {device} with {dtype} embeddings and {weight_dtype} weights runs {chosen!r}:"]
    for name, entry in BACKENDS.items():
        reason = entry.unavailable(device, dtype, weight_dtype)
        mark = "->" if name == chosen else "  "
        lines.append(f"{mark} {name:<10} {entry.summary}" + (f" (not available: {reason})" if reason else ""))
    return "\n".join(lines)
