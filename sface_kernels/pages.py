"""Huge pages for the large tensors that the package makes on a Linux CPU. A leaf: imports torch only."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

HUGE_BYTES = 32 << 20  # below it, a block may share its pages with others


def in_huge_pages(fresh: Tensor) -> Tensor:
    """The same tensor; where it is large, the system is asked for huge pages.

    To be called before anything is written: the faults of the first writes cost a quarter of those of small pages, and
    whatever reads a weight later finds its addresses faster (docs/performance.md).
    """
    # not a subclass, which may have no memory of its own; advice, which a kernel without huge pages ignores
    large = type(fresh) is Tensor and fresh.device.type == "cpu" and fresh.nbytes >= HUGE_BYTES
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        begin = -fresh.data_ptr() % mmap.PAGESIZE  # whole pages only
        length = (fresh.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(fresh.data_ptr() + begin), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return fresh
