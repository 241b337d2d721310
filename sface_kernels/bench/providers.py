"""The table of providers: a name, what it is, and how to make the thing that is timed.

Names are those of PROVIDERS, or `<backend>@<filter_eps>` for a backend of the package with any filter, as in
`native@2^-12` or `triton@0`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import BACKENDS, explain
from ..loss import sface_loss
from ..testing.published import reference
from ..testing.workloads import FAST_EPS
from ..validation import default_filter_eps
from . import opponents

LossFunction = Callable[[Tensor, Tensor, Tensor], Any]  # x, w, y to the loss, or to a tuple with `.loss`
Operation = Callable[[Tensor, Tensor, Tensor], None]  # x, w, and where the result goes
FILTERED = ("chunked", "native", "triton")  # backends that can be asked for with a filter
BARE = "bare"  # one operation that every such loss needs, the floor
OPPONENT = "opponent"  # the same loss by other means: may be allowed bf16 products
PACKAGE = "package"
CONTEXT = "context"  # another loss of the same shape of work


class Unavailable(Exception):
    """The provider cannot run here; the text says why."""


def multiply(x: Tensor, w: Tensor, out: Tensor) -> None:
    """`out` [N, C]"""
    torch.mm(x, w.t(), out=out)


def read(x: Tensor, w: Tensor, out: Tensor) -> None:
    """`out` [C]"""
    torch.sum(w, 1, out=out)


def write(x: Tensor, w: Tensor, out: Tensor) -> None:
    """`out` [C, D]"""
    out.zero_()


class Provider(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    what: str
    function: LossFunction | None = None  # of an opponent
    compiled: bool = False
    autocast: bool = False  # to bf16
    backend: str | None = None
    filter_eps: float | None = None  # of a backend; None: its default
    operation: Operation | None = None  # of a bare one, with its dtype
    dtype: torch.dtype = torch.float32
    precision: str | None = None  # of float32 products, where it is part of what is timed

    def filter_for(self, dtype: torch.dtype, features: int) -> float:
        """The filter in force, 0 for everything that drops nothing on purpose."""
        if self.backend is None:
            return 0.0
        return default_filter_eps(dtype, features) if self.filter_eps is None else self.filter_eps


def _opponents() -> list[Provider]:
    """Both functions, eager and compiled, in float32 and under autocast."""
    table = []
    for autocast in (False, True):
        for compiled in (False, True):
            for name, function, what in (
                ("reference", reference, "the published arithmetic"),
                ("careful", opponents.careful, "few temporaries"),
            ):
                full = name + "-compiled" * compiled + "-bf16" * autocast
                how = ("torch.compile" if compiled else "eager") + ", bf16 autocast" * autocast
                table.append(Provider(full, OPPONENT, f"{what}, {how}", function, compiled, autocast))
    return table


def _backend(backend: str, filter_eps: float | None, name: str, what: str) -> Provider:
    return Provider(name, PACKAGE, f"backend {backend}, {what}", backend=backend, filter_eps=filter_eps)


_TABLE = (
    *_opponents(),
    *(_backend(backend, None, backend, "default filter") for backend in FILTERED),
    *(_backend(backend, FAST_EPS, f"{backend}@2^-16", "fast filter") for backend in FILTERED[1:]),
    *(_backend(backend, 0.0, f"{backend}@0", "every pair") for backend in FILTERED[1:]),
    Provider("mm-fp32", BARE, "ONE bare product x·wᵀ, not a loss", operation=multiply),
    Provider("mm-tf32", BARE, "ONE bare TF32 product, not a loss", operation=multiply, precision="high"),
    Provider("mm-bf16", BARE, "ONE bare bf16 product, precast, not a loss", operation=multiply, dtype=torch.bfloat16),
    Provider("read-w", BARE, "reading w once, not a loss", operation=read),
    Provider("write-w", BARE, "writing something as large as w once, not a loss", operation=write),
    Provider("linear-cross-entropy", CONTEXT, "CONTEXT: torch's fused softmax loss, another loss on the same shapes"),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _TABLE}
# What a run times unless told otherwise: the slow and the exotic ones are asked for by name, or by "all".
DEFAULT = (
    *("reference", "careful", "careful-compiled", *FILTERED),
    *("native@2^-16", "triton@2^-16", "native@0", "triton@0", "mm-fp32", "mm-bf16", "read-w", "write-w"),
)


def resolve(name: str) -> Provider:
    """The provider of that name; ValueError in one line for an unknown one."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    match = re.fullmatch(rf"({'|'.join(FILTERED)})@(?:2\^(-\d+)|(0|[0-9.]+(?:e-?\d+)?))", name)
    if match is None:
        known = ", ".join(PROVIDERS)
        raise ValueError(f"unknown provider {name!r}: expected one of {known}, or a filter as in native@2^-12")
    filter_eps = 2.0 ** int(match[2]) if match[2] else float(match[3])
    if filter_eps >= 1:
        raise ValueError(f"unknown provider {name!r}: the filter must be below 1")
    return _backend(match[1], filter_eps, name, f"filter {filter_eps:g}")


def build(provider: Provider, device: torch.device, dtype: torch.dtype) -> LossFunction | None:
    """What is timed for embeddings of `dtype` on `device`; None for a bare operation. Raises `Unavailable`."""
    if provider.kind == BARE:
        if provider.precision == "high" and device.type != "cuda":
            raise Unavailable(f"TF32 products exist on CUDA devices, not on {device.type}")
        return None
    if provider.kind == CONTEXT:
        cross_entropy = getattr(F, "linear_cross_entropy", None)
        if cross_entropy is None:
            raise Unavailable(
                f"torch.nn.functional.linear_cross_entropy came with torch 2.13, this is {torch.__version__}"
            )
        return cross_entropy
    if provider.kind == PACKAGE:
        return _package(provider, device, dtype)
    # dynamic=False: a second shape must not turn the first one's kernels into generic ones
    assert provider.function is not None
    return torch.compile(provider.function, dynamic=False) if provider.compiled else provider.function


def _package(provider: Provider, device: torch.device, dtype: torch.dtype) -> LossFunction:
    backend, filter_eps = provider.backend, provider.filter_eps
    assert backend is not None
    if backend not in BACKENDS:
        raise Unavailable(f"this version of the package has no backend {backend!r}")
    try:
        explain(device, dtype, torch.float32, backend)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    return lambda x, w, y: sface_loss(x, w, y, filter_eps=filter_eps, backend=backend)
