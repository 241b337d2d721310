"""The table of providers: a name, what it is, and how to make the thing that is timed.

Names are those of PROVIDERS, or `<backend>@<filter_eps>` for a backend of the package with any filter, as in
`native@2^-12` or `chunked@0`.

Floors of one step on [N, C, D] in float32: the cosines take 2·N·C·D flop and read 4·C·D bytes; a dense ∂w
writes 4·C·D bytes; SGD with momentum reads and writes 20·C·D bytes (w, its gradient and the momentum in, w
and momentum out).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import opponents
from .workloads import FAST_EPS, Workload

LossFunction = Callable[[Tensor, Tensor, Tensor], Any]  # x, w, y to the loss, or to a tuple with `.loss`
MODES = ("forward", "backward", "both", "step")
FLOAT32_EPS = 2.0**-24  # the package's default filter for float32


class Unavailable(Exception):
    """The provider cannot run here; the text says why."""


class Provider(NamedTuple):
    """One row of the table. `make` builds what is timed, and raises `Unavailable` with the reason."""

    name: str
    what: str
    make: Callable[[], LossFunction] | None  # None: a bare product
    product: torch.dtype | None = None
    opponent: bool = False  # not the package: may be allowed bf16 products
    compiled: bool = False
    filter_eps: float | None = None  # None: nothing dropped on purpose (an opponent)


def _compiled(function: LossFunction) -> Callable[[], LossFunction]:
    # dynamic=False: a second shape must not turn the first one's kernels into generic ones
    return lambda: torch.compile(function, dynamic=False)


def _package(backend: str, filter_eps: float | None) -> Callable[[], LossFunction]:
    def make() -> LossFunction:
        try:
            from sface_kernels import explain, sface_loss
        except ImportError as error:
            raise Unavailable(f"the package cannot be imported: {error}") from error
        try:
            explain(backend=backend)
        except (RuntimeError, ValueError) as error:
            raise Unavailable(str(error)) from error
        return lambda x, w, y: sface_loss(x, w, y, filter_eps=filter_eps, backend=backend)

    return make


_TABLE = (
    Provider("reference", "the published arithmetic, eager", lambda: opponents.reference, opponent=True),
    Provider("careful", "few temporaries, eager", lambda: opponents.careful, opponent=True),
    Provider(
        "reference-compiled",
        "the published arithmetic, torch.compile",
        _compiled(opponents.reference),
        opponent=True,
        compiled=True,
    ),
    Provider(
        "careful-compiled",
        "few temporaries, torch.compile",
        _compiled(opponents.careful),
        opponent=True,
        compiled=True,
    ),
    Provider("chunked", "backend chunked, default filter 2^-24", _package("chunked", None), filter_eps=FLOAT32_EPS),
    Provider("native", "backend native, default filter 2^-24", _package("native", None), filter_eps=FLOAT32_EPS),
    Provider("native@2^-16", "backend native, fast filter", _package("native", FAST_EPS), filter_eps=FAST_EPS),
    Provider("native@0", "backend native, every pair", _package("native", 0.0), filter_eps=0.0),
    Provider("mm-fp32", "ONE bare product x·wᵀ, not a loss", None, product=torch.float32, opponent=True),
    Provider("mm-bf16", "ONE bare bf16 product, precast, not a loss", None, product=torch.bfloat16, opponent=True),
)
PROVIDERS: dict[str, Provider] = {provider.name: provider for provider in _TABLE}


def resolve(name: str) -> Provider:
    """The provider of that name; ValueError in one line for an unknown one."""
    if name in PROVIDERS:
        return PROVIDERS[name]
    match = re.fullmatch(r"(chunked|native)@(?:2\^(-\d+)|(0|[0-9.]+(?:e-?\d+)?))", name)
    if match is None:
        known = ", ".join(PROVIDERS)
        raise ValueError(f"unknown provider {name!r}: expected one of {known}, or a filter as in native@2^-12")
    filter_eps = 2.0 ** int(match[2]) if match[2] else float(match[3])
    if filter_eps >= 1:
        raise ValueError(f"unknown provider {name!r}: the filter must be below 1")
    what = f"backend {match[1]}, filter {filter_eps:g}"
    return Provider(name, what, _package(match[1], filter_eps), filter_eps=filter_eps)


class Contestant:
    """A provider on a workload in one mode, with `prepare` and `run` for `timing`.

    Modes: "forward" builds the graph and frees it; "backward" times the backward of a forward made in
    `prepare`; "both"; "step" adds SGD (momentum 0.9, weight decay 5e-4, fused) on w with learning rate 0,
    so that repeats do the work of an update on data that stays as it is. Where there is a backward, the
    timed region begins with freeing the last gradients (`zero_grad(set_to_none)`), which every training
    step pays for; the upstream gradient is made beforehand. A bare product does the same one product in
    every mode.
    """

    def __init__(
        self,
        provider: Provider,
        work: Workload,
        mode: str,
        bf16_products: bool = False,
        function: LossFunction | None = None,
    ) -> None:
        self.provider, self.mode = provider, mode
        self.precision = "medium" if bf16_products and provider.opponent else "highest"
        self.y = work.y
        self.loss: Any = None
        if provider.make is None:
            assert provider.product is not None
            self.x, self.w = work.x.to(provider.product), work.w.to(provider.product)
            # zeros, so that its pages are there before the first run
            self.out = torch.zeros(len(work.x), len(work.w), dtype=provider.product)  # [N, C]
            return
        self.function = function or provider.make()  # one given is shared, to be compiled once
        # leaves of its own on shared storage: a contestant frees its own gradients and nobody else's
        self.x, self.w = work.x.detach().requires_grad_(), work.w.detach().requires_grad_()
        self.upstream = torch.ones(())
        self.optimizer = None
        if mode == "step":
            self.optimizer = torch.optim.SGD([self.w], lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)

    def prepare(self) -> None:
        torch.set_float32_matmul_precision(self.precision)
        if self.mode == "backward" and self.provider.make is not None:
            self.loss = self._forward()[0]

    def run(self) -> None:
        if self.provider.make is None:
            torch.mm(self.x, self.w.t(), out=self.out)
            return
        if self.mode == "forward":
            self._forward()
            return
        self.w.grad = self.x.grad = None
        if self.mode == "backward":
            self.loss.backward(self.upstream)
            self.loss = None
            return
        loss, outputs = self._forward()
        loss.backward(self.upstream)
        if self.optimizer is not None:
            self.optimizer.step()
        del outputs

    def _forward(self) -> tuple[Tensor, Any]:
        outputs = self.function(self.x, self.w, self.y)
        # the other outputs live as long as in a training loop that reads them after the step
        return (outputs, None) if isinstance(outputs, Tensor) else (outputs.loss, outputs)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients of one forward and backward, detached."""
        self.prepare()
        loss, _ = self._forward()
        self.w.grad = self.x.grad = None
        loss.backward(self.upstream)
        assert self.x.grad is not None and self.w.grad is not None
        found = loss.detach(), self.x.grad, self.w.grad
        self.w.grad = self.x.grad = None
        return found
