"""A provider on a workload: what is prepared, and what is inside the timed region."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .providers import CONTEXT, OPPONENT, PACKAGE, PRODUCT, LossFunction, Provider, build
from .timing import Timed
from .workloads import Workload

MODES = ("forward", "backward", "both", "step")
CACHE_FACTOR = 2  # rotated inputs together are this many times the L2 cache, so that none of them is still in it
MAX_COPIES = 16


def copies_for(work: Workload) -> int:
    """How many copies of the inputs take turns: 1 on a CPU, and where one alone overflows a GPU's L2 cache."""
    device = work.x.device
    if device.type != "cuda":
        return 1
    size = sum(t.numel() * t.element_size() for t in (work.x, work.w))
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_COPIES, max(1, math.ceil(CACHE_FACTOR * cache / size)))


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
    step pays for; the upstream gradient is made beforehand. A bare product does the same one product in
    every mode. Opponents get half embeddings as a training loop hands them over: converted to float32.
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
        self.provider, self.mode, self.y = provider, mode, work.y
        self.precision = provider.precision or "highest"
        if bf16_products and provider.kind in (OPPONENT, CONTEXT, PRODUCT):
            self.precision = "medium"
        self.loss: Any = None
        self.rotates, self.rests = copies > 1, work.x.device.type == "cuda"
        self.turns = itertools.cycle(range(copies))
        # a function that is given is shared, to be compiled once
        self.function = function or build(provider, work.x.device, work.x.dtype)
        if provider.kind == PRODUCT:
            dtype = provider.product
            self.pairs = [(work.x.to(dtype, copy=i > 0), work.w.to(dtype, copy=i > 0)) for i in range(copies)]
            # zeros, so that its pages are there before the first run
            self.out = torch.zeros(len(work.x), len(work.w), dtype=dtype, device=work.x.device)  # [N, C]
            self.at = 0
            return
        leaves = [[t.clone() if i else t.detach() for t in (work.x, work.w)] for i in range(copies)]
        self.inputs = [_Inputs(x, w, mode) for x, w in leaves]
        self.last = self.now = self.inputs[0]
        self.upstream = torch.ones((), device=work.x.device)

    def prepare(self) -> None:
        torch.set_float32_matmul_precision(self.precision)
        turn = None if self.hot else next(self.turns)
        if self.provider.kind == PRODUCT:
            self.at = self.at if turn is None else turn
            return
        self.last = self.now
        if turn is not None:
            self.now = self.inputs[turn]
        if self.mode == "backward":
            self.loss = self._forward()[0]

    def run(self) -> None:
        if self.provider.kind == PRODUCT:
            x, w = self.pairs[self.at]
            torch.mm(x, w.t(), out=self.out)
            return
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
        if self.provider.kind == PRODUCT or not self.rests:
            return
        for inputs in self.inputs:
            inputs.w.grad = inputs.x.grad = None
            if inputs.optimizer is not None:
                inputs.optimizer.state.clear()
