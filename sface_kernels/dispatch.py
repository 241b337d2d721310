"""The table of backends, which of them "auto" takes, and why."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import chunked, native, reference, triton
from .types import Forward, HyperParameters, Request
from .validation import check_dtype, check_weight_dtype, integer


class Backend(NamedTuple):
    """One implementation. `unavailable` says why it cannot run a request, or None where it can.

    `narrow` is what `saved` of a forward with so many samples says of a range of classes, first and end, which begins
    and ends at a multiple of `class_block`; None where only a forward on the range can say it.
    """

    summary: str
    unavailable: Callable[[Request], str | None]
    forward: Callable[..., Forward]  # of x, w, target, hp, need_x, need_w
    grad_weight: Callable[[Tensor, Tensor, Tensor, HyperParameters, Tensor, tuple[Tensor, ...]], Tensor]
    class_block: Callable[[int], int]
    narrow: Callable[[tuple[Tensor, ...], int, int, int], tuple[Tensor, ...]] | None
    # of a backend whose first calls are verified: which of its ways a call took, or None where it need not be
    way: Callable[[Tensor, tuple[Tensor, ...]], str | None] | None
    # whether it moves a weight by ∂w without making it, of x, hp, saved; and that, of grad_weight's arguments, the rule
    # of a step and its numbers
    can_move: Callable[[Tensor, HyperParameters, tuple[Tensor, ...]], bool]
    move: Callable[..., None] | None
    # of a backend whose forward takes a `reduction` and may make ∂w, or a part of it: ∂w of what it `made`, or None, of
    # the upstream gradient [] and of grad_weight's arguments
    finish: Callable[..., Tensor] | None
    takes_labels: bool  # its forward takes labels as they are, with an `ignore_index`, and returns their targets


BACKENDS: dict[str, Backend] = {
    name: Backend(
        summary,
        module.unavailable,
        module.forward,
        module.grad_weight,
        getattr(module, "class_block", lambda rows: 1),
        getattr(module, "narrow", None),
        getattr(module, "way", None),
        getattr(module, "can_move", lambda *_: False),
        getattr(module, "move", None),
        getattr(module, "finish", None),
        module is triton,
    )
    for name, summary, module in (
        ("native", "C++ on the CPU: one streamed pass over the weight", native),
        ("triton", "Triton kernels on a GPU: one screened pass over the weight, no synchronisation", triton),
        ("chunked", "portable PyTorch over blocks of classes", chunked),
        ("reference", "plain PyTorch, N×C materialised", reference),
    )
}
# What "auto" tries, in order. On a CPU Triton runs in its interpreter, which nobody means by "auto".
PREFERENCE = {"cpu": ("native", "chunked"), "meta": ("chunked",)}
PREFERENCE_ELSEWHERE = ("triton", "chunked")
distrusted: dict[str, str] = {}  # backends that "auto" no longer takes in this process, and why


@functools.cache
def _say_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def available_backends(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> list[str]:
    """Names of the backends that can run embeddings of `dtype` on `device`, the one "auto" takes first.

    Raises:
        TypeError: a dtype that no loss takes.
    """
    request = _request(device, dtype, weight_dtype)
    chosen, _ = choose("auto", request)
    names = [name for name, backend in BACKENDS.items() if backend.unavailable(request) is None]
    return sorted(names, key=lambda name: name != chosen)


def _request(
    device: torch.device | str, dtype: torch.dtype, weight_dtype: torch.dtype | None, features: int = 512
) -> Request:
    check_dtype("dtype", dtype)
    check_dtype("weight_dtype", weight_dtype)
    device, weight_dtype = torch.device(device), weight_dtype or dtype
    check_weight_dtype("weight_dtype", weight_dtype, dtype, device)
    return Request(device, dtype, weight_dtype, integer("features", features, positive=True))


def check_name(name: str) -> None:
    known = ["auto", *BACKENDS]
    if name not in known:
        raise ValueError(f"backend: expected one of {known}, got {name!r}")


def choose(name: str, request: Request) -> tuple[str, str | None]:
    """The backend to run, and what a user should be told of the choice, if anything.

    An explicit name never falls back: it raises with the reason.
    """
    check_name(name)
    if name != "auto":
        reason = BACKENDS[name].unavailable(request)
        if reason is not None:
            raise RuntimeError(f"backend: {name!r} cannot run here: {reason}")
        return name, None
    first, *others = PREFERENCE.get(request.device.type, PREFERENCE_ELSEWHERE)
    if first in distrusted:
        return "chunked", None  # as was said when it happened
    reason = BACKENDS[first].unavailable(request)
    if reason is None:
        return first, None
    chosen = next(other for other in others if BACKENDS[other].unavailable(request) is None)
    if request.device.type == "cpu" and reason != native.missing:  # a dtype that the C++ does not take
        return chosen, None
    return chosen, f"sface_kernels: backend {chosen!r} runs on {request.device.type}, as {first!r} cannot: {reason}"


def select(name: str, request: Request) -> str:
    """The backend of `choose`, with its warning given once."""
    chosen, warning = choose(name, request)
    if warning is not None and not torch.compiler.is_compiling():
        _say_once(warning)
    return chosen


def explain(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    backend: str = "auto",
    features: int = 512,
) -> str:
    """What `backend` resolves to for these tensors, and for every other backend whether it could run and why not.

    Args:
        device: device of the embeddings.
        dtype: dtype of the embeddings.
        weight_dtype: dtype of the weight; that of the embeddings if None.
        backend: the name that would be given to `sface_loss`.
        features: D, size of an embedding.

    Returns:
        Text: a line that says what runs, and one for each backend, the chosen one marked with "->".

    Raises:
        TypeError, ValueError, RuntimeError: as `sface_loss` would for this backend.
    """
    request = _request(device, dtype, weight_dtype, features)
    chosen, _ = choose(backend, request)
    lines = [
        f"{backend!r} on {request.device} with {dtype} embeddings and {request.weight_dtype} weights runs {chosen!r}:"
    ]
    for name, entry in BACKENDS.items():
        reason = distrusted.get(name) or entry.unavailable(request)
        mark = "->" if name == chosen else "  "
        lines.append(f"{mark} {name:<10} {entry.summary}" + (f" (not available: {reason})" if reason else ""))
    return "\n".join(lines)
