"""The table of providers: a name, what it is, how to make the thing that is timed, and the work that it stands for.

Names are those of PROVIDERS, or `<backend>@<filter_eps>` for a backend of the package with any filter, as in
`native@2^-12` or `triton@0`; and such a name with `+<optimizer>` of OPTIMIZERS, which counts in mode "step".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loss import sface_loss
from ..optim import HeadAdamW, HeadSGD
from ..testing.published import reference
from ..testing.selfcheck import unavailable
from ..testing.workloads import FAST_EPS, A, B, K, S, Shape
from ..validation import default_filter_eps

LossFunction = Callable[[Tensor, Tensor, Tensor], Any]  # x, w, y to the loss, or to a tuple with `.loss`
FILTERED = ("chunked", "native", "triton")  # backends that can be asked for with a filter
BARE = "bare"  # operations that every such loss needs, the floor
OPPONENT = "opponent"  # the same loss by other means: may be allowed bf16 products
PACKAGE = "package"
CONTEXT = "context"  # another loss of the same shape of work
PRODUCTS = ("mm-fp32", "mm-tf32", "mm-bf16")


class Unavailable(Exception):
    """The provider cannot run here; the text says why."""


def careful(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The mean loss as plain PyTorch does it best: coefficients in place, one scatter, w never normalised.

    It makes 4 new N×C tensors in the forward and 3 in the backward, and 4 of size C×D in the backward. Scaling the N×C
    products by 1/‖w_j‖ replaces several C×D temporaries of `F.normalize(w)` and its backward.
    """
    inv_norm = torch.linalg.vector_norm(w, dim=1).clamp_min(1e-12).reciprocal()  # [C]
    cos = (F.normalize(x) @ w.t()) * inv_norm  # [N, C]
    with torch.no_grad():
        own = y.unsqueeze(1)
        theta_target = cos.gather(1, own).clamp_(-1, 1).acos_()  # [N, 1]
        coef = cos.clamp(-1, 1).acos_().sub_(B).mul_(-K).sigmoid_().mul_(S)  # [N, C], (4)
        coef.scatter_(1, own, -S * torch.sigmoid(K * (theta_target - A)))  # (6)
    return torch.linalg.vecdot(coef, cos).mean()


def multiply(x: Tensor, w: Tensor, out: Tensor) -> None:
    """`out` [N, C]"""
    torch.mm(x, w.t(), out=out)


def multiply_thrice(x: Tensor, w: Tensor, out: Tensor) -> None:
    """`out` [N, C], and the products of a backward: [N, D] and [C, D]"""
    torch.mm(x, w.t(), out=out)
    out @ w
    out.t() @ x


def read(x: Tensor, w: Tensor, out: Tensor) -> None:
    """`out` [C]"""
    torch.sum(w, 1, out=out)


def write(x: Tensor, w: Tensor, out: Tensor) -> None:
    """`out` [C, D]"""
    out.zero_()


# With learning rate 0: repeats do the work of an update on data that stay as they are.
OPTIMIZERS: dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]] = {
    "sgd": lambda w: torch.optim.SGD([w], 0.0, 0.9, weight_decay=5e-4, fused=True),
    "adamw": lambda w: torch.optim.AdamW([w], 0.0, fused=True),
    "head-sgd": lambda w: HeadSGD(nn.ParameterDict({"weight": w}), 0.0, 0.9, weight_decay=5e-4),
    "head-adamw": lambda w: HeadAdamW(nn.ParameterDict({"weight": w}), 0.0),
}


class Provider(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    what: str
    function: LossFunction | None = None  # of an opponent; a bare operation puts its result where y would stand
    compiled: bool = False
    autocast: bool = False  # to bf16
    backend: str | None = None
    filter_eps: float | None = None  # of a backend; None: its default
    dtype: torch.dtype = torch.float32  # of a bare operation
    precision: str = "highest"  # of float32 products
    optimizer: str = "sgd"  # in mode "step"

    def filter_for(self, dtype: torch.dtype, features: int) -> float:
        """The filter in force, 0 for everything that drops nothing on purpose."""
        if self.backend is None:
            return 0.0
        return default_filter_eps(dtype, features) if self.filter_eps is None else self.filter_eps


def _backend(backend: str, filter_eps: float | None, name: str, what: str) -> Provider:
    return Provider(name, PACKAGE, f"backend {backend}, {what}", backend=backend, filter_eps=filter_eps)


_TABLE = (
    *(
        Provider(
            name + "-compiled" * compiled + "-bf16" * autocast,
            OPPONENT,
            f"{what}, {'torch.compile' if compiled else 'eager'}" + ", bf16 autocast" * autocast,
            function,
            compiled,
            autocast,
        )
        for autocast in (False, True)
        for compiled in (False, True)
        for name, function, what in (
            ("reference", reference, "the published arithmetic"),
            ("careful", careful, "few temporaries"),
        )
    ),
    *(_backend(backend, None, backend, "default filter") for backend in FILTERED),
    *(_backend(backend, FAST_EPS, f"{backend}@2^-16", "fast filter") for backend in FILTERED[1:]),
    *(_backend(backend, 0.0, f"{backend}@0", "every pair") for backend in FILTERED[1:]),
    Provider("mm-fp32", BARE, "ONE bare product x·wᵀ, not a loss", multiply),
    Provider("mm-tf32", BARE, "ONE bare TF32 product, not a loss", multiply, precision="high"),
    Provider("mm-bf16", BARE, "ONE bare bf16 product, precast, not a loss", multiply, dtype=torch.bfloat16),
    Provider("mm3-bf16", BARE, "THREE bare bf16 products", multiply_thrice, dtype=torch.bfloat16),
    Provider("read-w", BARE, "reading w once, not a loss", read),
    Provider("write-w", BARE, "writing something as large as w once, not a loss", write),
    Provider("linear-cross-entropy", CONTEXT, "CONTEXT: torch's fused softmax loss, another loss on the same shapes"),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _TABLE}
# What a run times unless told otherwise: the slow and the exotic ones are asked for by name, or by "all".
DEFAULT = (
    *("reference", "careful", "careful-compiled", *FILTERED),
    *("native@2^-16", "triton@2^-16", "native@0", "triton@0", "mm-fp32", "mm-bf16", "read-w", "write-w"),
)
# whole steps, with PyTorch's optimizers and with the head's own
STEPS = (
    *("reference+sgd", "native+sgd", "native+head-sgd"),
    *("reference+adamw", "native@0+adamw", "native@0+head-adamw", "mm-bf16"),
)


def resolve(name: str) -> Provider:
    """The provider of that name; ValueError in one line for an unknown one."""
    loss, plus, optimizer = name.partition("+")
    if plus:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer in {name!r}: expected one of {', '.join(OPTIMIZERS)}")
        return resolve(loss)._replace(name=name, optimizer=optimizer)
    if name in PROVIDERS:
        return PROVIDERS[name]
    match = re.fullmatch(rf"({'|'.join(FILTERED)})@(?:2\^(-[1-9]\d*)|(0|0?\.\d+|\d(?:\.\d+)?e-\d+))", name)
    if match is None:
        known = ", ".join(PROVIDERS)
        raise ValueError(f"unknown provider {name!r}: expected one of {known}, or a filter as in native@2^-12")
    filter_eps = 2.0 ** int(match[2]) if match[2] else float(match[3])
    return _backend(match[1], filter_eps, name, f"filter {filter_eps:g}")


def build(provider: Provider, device: torch.device, dtype: torch.dtype) -> LossFunction:
    """What is timed for embeddings of `dtype` on `device`. Raises `Unavailable`."""
    if provider.precision == "high" and device.type != "cuda":
        raise Unavailable(f"TF32 products exist on CUDA devices, not on {device.type}")
    if provider.kind == CONTEXT:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"F.linear_cross_entropy came with torch 2.13, this is {torch.__version__}")
        return F.linear_cross_entropy
    if provider.backend is not None:
        backend, filter_eps = provider.backend, provider.filter_eps
        if reason := unavailable(backend, device, dtype):
            raise Unavailable(f"{backend}: {reason}")
        return lambda x, w, y: sface_loss(x, w, y, filter_eps=filter_eps, backend=backend)
    # dynamic=False: a second shape must not turn the first one's kernels into generic ones
    assert provider.function is not None
    return torch.compile(provider.function, dynamic=False) if provider.compiled else provider.function


class Work(NamedTuple):
    """Of the dense computation done once, whatever a provider really does, so that rates compare times and nothing
    else: a backend that skips the products of inactive pairs may show more than the machine's peak."""

    flop: int
    bytes: int

    def rates(self, milliseconds: float) -> dict[str, float]:
        """Effective `tflops` (1e12 flop/s) and `gb_per_s` (1e9 byte/s)."""
        return {"tflops": self.flop / milliseconds / 1e9, "gb_per_s": self.bytes / milliseconds / 1e6}


def count(provider: Provider, shape: Shape, mode: str, dtype: torch.dtype) -> Work:
    """Of one run with embeddings of `dtype`; benchmarks/README.md states the counts."""
    (n, c, d), size = shape, provider.dtype.itemsize
    product = 2 * n * c * d
    if provider.kind == BARE:
        whole = Work(product, size * (n * d + c * d + n * c))
        thrice, once = Work(*(3 * one for one in whole)), Work(c * d, size * (c * d + c))
        bare: dict[Any, Work] = {multiply: whole, multiply_thrice: thrice, read: once, write: Work(0, size * c * d)}
        return bare[provider.function]
    inputs = dtype.itemsize * n * d + 4 * c * d  # and so large are their gradients
    if mode in ("forward", "backward"):
        return Work(product if mode == "forward" else 2 * product, inputs)
    # SGD with momentum reads w, its gradient and the momentum, and writes w and the momentum
    return Work(3 * product, 2 * inputs + (20 * c * d if mode == "step" else 0))
