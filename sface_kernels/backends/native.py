"""The C++ backend for a CPU: loads the operators that `csrc/` registers, calls them, and keeps the memory of ∂w."""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..tracing import traced
from ..types import Forward, HyperParameters, Request

LIBRARY = Path(__file__).parents[1] / "_C.so"
TO_BUILD = (
    "`pip install --no-build-isolation --no-deps --force-reinstall .` in a checkout, with a C++20 compiler, builds it"
)


def _load() -> str | None:
    """Registers the C++ operators; why they are missing, or None."""
    if os.environ.get("SFACE_NO_NATIVE") == "1":
        return "SFACE_NO_NATIVE=1 is set"
    if not LIBRARY.exists():
        return f"the C++ extension is not built ({LIBRARY} is missing); {TO_BUILD}"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the C++ extension does not load ({error}); {TO_BUILD}"
    names = torch.ops.sface.native_instruction_sets()
    if (wanted := os.environ.get("SFACE_CPU_ISA", "")) not in ("", *names):
        return f"SFACE_CPU_ISA: expected one of {', '.join(names)} on this CPU, got {wanted}"
    return None


missing = _load()
if missing is None:
    ops.native_labels = torch.ops.sface.native_labels.default

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


class EarlyRows(NamedTuple):
    """Rows of ∂w that a forward made for the backward that it expected: it reads the rows of w anyway."""

    grad_w: Tensor  # [C, D]
    rows: Tensor  # [C] uint8, what has become of each (csrc/cpu/early_rows.h)
    upstream: float  # that they are of


class UpstreamHistory:
    """The upstream gradients of the last losses of a few weights. That of a backward is expected again where it was the
    same as the one before, with one forward between the two: what a forward makes for another one, or for a backward
    that never comes, is lost.
    """

    WEIGHTS = 64

    def __init__(self) -> None:
        # by address: the last one, whether it is expected again, forwards since then
        self._last: dict[int, tuple[float, bool, int]] = {}
        self._lock = threading.Lock()

    def expect(self, w: Tensor) -> float | None:
        """Asked by each forward."""
        with self._lock:
            upstream, again, forwards = self._last.pop(w.data_ptr(), (math.nan, False, 0))
            self._set(w, upstream, again, forwards + 1)
        return upstream if again and forwards == 0 else None

    def learn(self, w: Tensor, upstream: float) -> None:
        """Told by each backward."""
        with self._lock:
            before, _, forwards = self._last.pop(w.data_ptr(), (math.nan, False, 0))
            self._set(w, upstream, before == upstream and forwards == 1, 0)

    def _set(self, w: Tensor, *state: Any) -> None:
        if len(self._last) >= self.WEIGHTS:
            self._last.pop(next(iter(self._last)), None)
        self._last[w.data_ptr()] = state


_upstreams = UpstreamHistory()


def forward(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool, reduction: str = ""
) -> Forward:
    """With a `reduction`, "mean" or "sum", rows of ∂w may be made early."""
    x, w = x.float().contiguous(), _inner_contiguous(w)
    early = _early_rows(x, w) if reduction and hp.filter_eps > 0 else None  # with no filter all blocks are dense
    if early is None:
        *outputs, counted = torch.ops.sface.native_forward(x, w, target, *hp, need_x, need_w, ARENA_WORDS)
    else:
        how = early.upstream, reduction == "mean", early.grad_w, early.rows
        *outputs, counted = torch.ops.sface.native_forward_early(x, w, target, *hp, need_x, ARENA_WORDS, *how)
    return Forward.of(outputs)._replace(counted=counted, made=early)


def _early_rows(x: Tensor, w: Tensor) -> EarlyRows | None:
    """Where they are to be made: only in memory that an earlier ∂w has left, so that no call takes more for them."""
    if w.dtype != torch.float32 or not 0 < x.shape[0] <= ops.SAMPLES_PER_GROUP or traced(w):
        return None
    if (upstream := _upstreams.expect(w)) is None or (grad_w := _gradient_memory.left(w)) is None:
        return None
    return EarlyRows(grad_w, torch.empty(w.shape[0], dtype=torch.uint8, device="cpu"), upstream)


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    return torch.ops.sface.native_grad_weight(
        x.float().contiguous(), _inner_contiguous(w), target, grad_row.contiguous(), *hp, *saved
    )


def finish(
    made: EarlyRows | None,
    upstream: Tensor,
    x: Tensor,
    w: Tensor,
    target: Tensor,
    hp: HyperParameters,
    grad_row: Tensor,
    saved: tuple[Tensor, ...],
) -> Tensor:
    """`grad_weight`, where the upstream gradient `[]` of a mean or a sum is known."""
    if traced(upstream):
        return grad_weight(x, w, target, hp, grad_row, saved)
    value = float(upstream)
    _upstreams.learn(w, value)
    if made is None:
        return grad_weight(x, w, target, hp, grad_row, saved)
    if made.upstream != value:
        made.rows.zero_()  # all to be made later
    torch.ops.sface.native_grad_weight_rest(
        x.float().contiguous(), _inner_contiguous(w), target, grad_row.contiguous(), *hp, *saved, made.grad_w, made.rows
    )
    return made.grad_w


def class_block(rows: int) -> int:
    return ops.CLASSES_PER_SEGMENT


def narrow(saved: tuple[Tensor, ...], rows: int, first: int, end: int) -> tuple[Tensor, ...]:
    inv_norm, target_weight, arena, segments = saved
    blocks = slice(first // ops.CLASSES_PER_SEGMENT, -(-end // ops.CLASSES_PER_SEGMENT))
    by_group = segments.view(-1, ops.native_segments(1, len(inv_norm)), 2)  # [groups, blocks, 2]
    return inv_norm[first:end], target_weight, arena, by_group[:, blocks].reshape(-1)


class GradientMemory:
    """The memory of large ∂w and of exact calls' arenas, kept for the next step: page faults of a fresh block cost more
    than the whole loss.

    It holds a tensor on each of the last few storages it gave out, and gives a storage out again once nobody else holds
    it. They are storages like any other, which may be resized or shared.
    """

    BLOCKS = 4  # as many heads may take turns, two in exact mode
    PATIENCE = 16  # a free block that this many gradients had no use for goes back

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[tuple[Tensor, int]] = []  # the last one used first, with the time of that
        self._time = 0
        # how many hold a storage is no public question: where the answer does not count holders, nothing is kept
        probe = torch.empty(1, device="cpu")
        self._alone = self._holders(probe)
        view = probe.view(1)
        self._counts = self._holders(probe) == self._alone + 1
        del view
        storage = probe.untyped_storage()
        self._counts &= self._holders(probe) == self._alone + 1
        del storage
        self._counts &= self._holders(probe) == self._alone

    @staticmethod
    def _holders(t: Tensor) -> int:
        """How many tensors and Python objects refer to a storage, and a constant."""
        storage, count = t.untyped_storage(), getattr(torch._C, "_storage_Use_Count", None)
        return count(storage._cdata) + sys.getrefcount(storage) if count else 0

    def _reusable(self, block: Tensor, size: int) -> bool:
        held = block.untyped_storage().nbytes()  # not what it was if its owner resized it
        return size <= held <= size + size // 4 and not block.is_shared() and self._holders(block) == self._alone

    def empty_like(self, w: Tensor) -> Tensor:
        """Uninitialised, contiguous."""
        size = w.numel() * w.element_size()
        if not self._counts:
            return torch.empty(w.shape, dtype=w.dtype, device="cpu")
        with self._lock:
            block = self._free(size)
            if block is None:
                self._blocks = [(t, used) for t, used in self._blocks if self._time - used < self.PATIENCE]
                block = torch.empty(size, dtype=torch.uint8, device="cpu")
            return self._give(block, w)

    def left(self, w: Tensor) -> Tensor | None:
        """The same in memory that is there already, or None."""
        with self._lock:
            block = self._free(w.numel() * w.element_size())
            return None if block is None else self._give(block, w)

    def _free(self, size: int) -> Tensor | None:
        for index, (block, _) in enumerate(self._blocks):
            if self._reusable(block, size):
                del self._blocks[index]
                return block
        return None

    def _give(self, block: Tensor, w: Tensor) -> Tensor:
        """Before the lock opens, or the next thread would find a block that nobody holds."""
        self._time += 1
        self._blocks = [(block, self._time), *self._blocks[: self.BLOCKS - 1]]
        return torch.empty(0, dtype=w.dtype, device="cpu").set_(
            block.untyped_storage(), 0, w.shape, w.new_empty(w.shape, device="meta").stride()
        )

    def held(self) -> int:
        """Bytes of the blocks that it knows, in use or not."""
        return sum(block.untyped_storage().nbytes() for block, _ in self._blocks)

    def release(self) -> None:
        """Gives free blocks back to the system; one that is in use goes back when its owner lets it go."""
        with self._lock:
            self._blocks.clear()


_gradient_memory = GradientMemory()
ops.implement("native_empty_gradient", _gradient_memory.empty_like)
ops.implement("native_release_memory", _gradient_memory.release)
