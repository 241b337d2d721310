"""Full float32 precision of matrix products, whatever the process-wide switches say. A leaf: imports torch only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# what torch.set_float32_matmul_precision and torch.backends.fp32_precision set for a CPU and for a GPU
_SWITCHES: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products are not made in TF32 or bf16 inside: k = 80 would blow such cosines up to errors of percents."""
    if torch.compiler.is_compiling():  # the compiler cannot trace the switches
        yield
        return
    before = [switch.fp32_precision for switch in _SWITCHES]
    try:
        for switch in _SWITCHES:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            switch.fp32_precision = value
