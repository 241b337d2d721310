"""The C++ backend for a CPU: loads the operators that `csrc/` registers, calls them, and keeps the memory of ∂w."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch
from torch import Tensor

from .. import ops
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


def forward(x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool) -> Forward:
    *outputs, counted = torch.ops.sface.native_forward(
        x.float().contiguous(), _inner_contiguous(w), target, *hp, need_x, need_w, ARENA_WORDS
    )
    return Forward.of(outputs)._replace(counted=counted)


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    return torch.ops.sface.native_grad_weight(
        x.float().contiguous(), _inner_contiguous(w), target, grad_row.contiguous(), *hp, *saved
    )


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
            self._time += 1
            for index, (block, _) in enumerate(self._blocks):
                if self._reusable(block, size):
                    del self._blocks[index]
                    break
            else:
                self._blocks = [(t, used) for t, used in self._blocks if self._time - used <= self.PATIENCE]
                block = torch.empty(size, dtype=torch.uint8, device="cpu")
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
