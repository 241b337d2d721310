"""The stated operation and byte counts behind every effective TFLOP/s and GB/s.

They are those of the dense computation done once, whatever a provider really does, so that rates compare times and
nothing else: a backend that skips the products of inactive pairs may show more than the machine's peak.

    flop     forward 2·N·C·D (the cosines); backward 4·N·C·D (∂x and ∂w); both 6·N·C·D; step the same
    bytes    forward reads x and w once; backward writes ∂x and ∂w once; both: the two together; step: SGD with
             momentum on top, which reads w, its gradient and the momentum and writes w and the momentum, 20·C·D
    product  2·N·C·D flop; reads x and w, writes N×C, in its own dtype, in every mode
    read-w   C·D flop, reads w and writes C; write-w writes C·D
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..testing.workloads import Shape
from .providers import BARE, Provider, multiply, read

MASTER = 4  # bytes of a weight and of its gradient: float32
SGD = 5 * MASTER


class Work(NamedTuple):
    flop: int
    bytes: int


def count(provider: Provider, shape: Shape, mode: str, dtype: torch.dtype) -> Work:
    """Of one run with embeddings of `dtype`."""
    n, c, d = shape
    product = 2 * n * c * d
    if provider.kind == BARE:
        size = provider.dtype.itemsize
        if provider.operation is multiply:
            return Work(product, size * (n * d + c * d + n * c))
        return Work(c * d, size * (c * d + c)) if provider.operation is read else Work(0, size * c * d)
    inputs = dtype.itemsize * n * d + MASTER * c * d  # and so large are their gradients
    if mode == "forward":
        return Work(product, inputs)
    if mode == "backward":
        return Work(2 * product, inputs)
    return Work(3 * product, 2 * inputs + (SGD * c * d if mode == "step" else 0))


def rates(work: Work, milliseconds: float) -> dict[str, float]:
    """Effective `tflops` (1e12 flop/s) and `gb_per_s` (1e9 byte/s)."""
    seconds = milliseconds / 1e3
    return {"tflops": work.flop / seconds / 1e12, "gb_per_s": work.bytes / seconds / 1e9}
