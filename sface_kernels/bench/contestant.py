"""A provider on a workload: what is prepared, and what is inside the timed region."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..testing.workloads import Workload
from .providers import BARE, PACKAGE, LossFunction, Provider, build, multiply, read
from .timing import Timed

MODES = ("forward", "backward", "both", "step")
CACHE_FACTOR = 4  # rotated inputs in float32 are this many times the L2 cache, so that none is still in it
MAX_COPIES = 16


def copies_for(work: Workload) -> int:
    """How many copies of the inputs take turns: 1 on a CPU, and where one alone overflows a GPU's L2 cache."""
    device = work.x.device
    if device.type != "cuda":
        return 1
    size = sum(t.numel() * t.element_size() for t in (work.x, work.w))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_COPIES, max(1, math.ceil(CACHE_FACTOR * cache / size)))


class Bare(Timed):
    """A bare operation on `copies` of the inputs in its dtype, in place: the same in every mode."""

    def __init__(self, provider: Provider, work: Workload, precision: str, copies: int) -> None:
        assert provider.operation is not None
        self.operation, self.precision, self.rotates = provider.operation, precision, copies > 1
        dtype = provider.dtype
        self.pairs = [(work.x.to(dtype, copy=i > 0), work.w.to(dtype, copy=i > 0)) for i in range(copies)]
        self.turns, self.now = itertools.cycle(self.pairs), self.pairs[0]
        (n, d), c = work.x.shape, len(work.w)
        size = (n, c) if self.operation is multiply else (c,) if self.operation is read else (c, d)
        # zeros, so that its pages are there before the first run
        self.out = torch.zeros(size, dtype=dtype, device=work.x.device)

    def prepare(self) -> None:
        torch.set_float32_matmul_precision(self.precision)
        if not self.hot:
            self.now = next(self.turns)

    def run(self) -> None:
        self.operation(*self.now, self.out)


class _Inputs:
    """Leaves and, for "step", their optimizer: a contestant frees its own gradients and nobody else's."""

    def __init__(self, x: Tensor, w: Tensor, mode: str) -> None:
        self.x, self.w = x.requires_grad_(), w.requires_grad_()
        self.optimizer = None
        if mode == "step":
            self.optimizer = torch.optim.SGD([self.w], lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)


class Contestant(Timed):
    """A provider with `prepare` and `run` for `timing`.

    Modes: "forward" builds the graph and frees it; "backward" times the backward of a forward made in
    `prepare`; "both"; "step" adds SGD (momentum 0.9, weight decay 5e-4, fused) on w with learning rate 0,
    so that repeats do the work of an update on data that stays as it is. Where there is a backward, the
    timed region begins with freeing the last gradients (`zero_grad(set_to_none)`), which every training
    step pays for; the upstream gradient is made beforehand. Opponents get half embeddings as a training
    loop hands them over: converted to float32.
    """

    def __init__(
        self,
        provider: Provider,
        work: Workload,
        mode: str,
        bf16_products: bool = False,
        function: LossFunction | None = None,
        copies: int = 1,
    ) -> None:
        self.provider, self.mode, self.y, self.precision = provider, mode, work.y, _precision(provider, bf16_products)
        self.loss: Any = None
        self.rotates, self.rests = copies > 1, work.x.device.type == "cuda"
        # a function that is given is shared, to be compiled once
        self.function = function or build(provider, work.x.device, work.x.dtype)
        leaves = [[t.clone() if i else t.detach() for t in (work.x, work.w)] for i in range(copies)]
        self.inputs = [_Inputs(x, w, mode) for x, w in leaves]
        self.turns = itertools.cycle(self.inputs)
        self.last = self.now = self.inputs[0]
        self.upstream = torch.ones((), device=work.x.device)

    def prepare(self) -> None:
        torch.set_float32_matmul_precision(self.precision)
        self.last = self.now
        if not self.hot:
            self.now = next(self.turns)
        if self.mode == "backward":
            self.loss = self._forward()[0]

    def run(self) -> None:
        if self.mode == "forward":
            self._forward()
            return
        self.last.w.grad = self.last.x.grad = None
        if self.mode == "backward":
            self.loss.backward(self.upstream)
            self.loss = None
            return
        loss, outputs = self._forward()
        loss.backward(self.upstream)
        if self.now.optimizer is not None:
            self.now.optimizer.step()
        del outputs

    def _forward(self) -> tuple[Tensor, Any]:
        assert self.function is not None
        x, w = self.now.x, self.now.w
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.provider.autocast):
            outputs = self.function(x if self.provider.kind == PACKAGE else x.float(), w, self.y)
        # the other outputs live as long as in a training loop that reads them after the step
        return (outputs, None) if isinstance(outputs, Tensor) else (outputs.loss, outputs)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and gradients of one forward and backward, detached."""
        torch.set_float32_matmul_precision(self.precision)
        leaves = self.now
        leaves.w.grad = leaves.x.grad = None
        loss, _ = self._forward()
        loss.backward(self.upstream)
        assert leaves.x.grad is not None and leaves.w.grad is not None
        found = loss.detach(), leaves.x.grad, leaves.w.grad
        leaves.w.grad = leaves.x.grad = None
        return found

    def rest(self) -> None:
        """On a GPU gives back what it holds between turns: the gradients of every provider together may not fit.

        On a CPU they stay, as freeing them is a cost of every step there (pages go back to the system).
        """
        if not self.rests:
            return
        for inputs in self.inputs:
            inputs.w.grad = inputs.x.grad = None
            if inputs.optimizer is not None:
                inputs.optimizer.state.clear()


def _precision(provider: Provider, bf16_products: bool) -> str:
    """Of float32 products: what is allowed to opponents and floors is not allowed to the package."""
    return "medium" if bf16_products and provider.kind != PACKAGE else provider.precision or "highest"


def enter(
    provider: Provider,
    work: Workload,
    mode: str,
    bf16_products: bool = False,
    function: LossFunction | None = None,
    copies: int = 1,
) -> Bare | Contestant:
    """The provider on the workload, ready to be timed."""
    if provider.kind == BARE:
        return Bare(provider, work, _precision(provider, bf16_products), copies)
    return Contestant(provider, work, mode, bf16_products, function, copies)
