"""What every launch needs: the sizes of a call, its precision, and where launches go.

`launch_forward` and `launch_backward` are fixed sequences of launches; nothing here or there waits for the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ...precision import rounds_to_tf32
from ...types import IGNORED, NO_TARGET, HyperParameters
from . import tiles
from .buffers import cdiv, empty, padded
from .device import gpu_of, pretence, pretend
from .plan import screens_int8, threshold_of
from .tiles import GRANULE

__all__ = ["Call", "launch", "on_device", "precision", "pretend"]

# Products and sums fuse, as the kernels are written and counted for; Triton 3.10 means to switch it off by default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    pretended = pretence()
    if pretended is not None and pretended.run is not None:
        pretended.run(kernel, grid, {**COMPILE_OPTIONS, **arguments})
    else:
        kernel[grid](**COMPILE_OPTIONS, **arguments)


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def precision(dtype: torch.dtype, gpu: str) -> str:
    """How dense products of these embeddings are computed: fp32 as PyTorch's matrix products are."""
    if dtype != torch.float32:
        return "half"
    if gpu == "gfx942":
        return "ieee"
    return "tf32" if rounds_to_tf32() and gpu != "interpreter" else "split"


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def block_parts(count: int) -> int:
    """A block for so many parts, of few sizes: each is another kernel to compile."""
    return next(size for size in (64, 256, next_power_of_2(count)) if size >= count)


KINDS = 64  # of calls whose constants are kept
SMALLEST = 2.0**-126  # a float below it is 0 to a GPU, and one of 64 bits to Triton's interpreter


class Kind:
    """What calls of the same sizes, layout and hyper-parameters have in common: no tensors, so it may outlive them.

    Working it out takes the host longer than a launch: `kind_of` does so once for each.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        strides: tuple[tuple[int, ...], tuple[int, ...]],
        device: torch.device,
        family: str,
        precision: str,
        hp: HyperParameters,
        dense: bool,
        int8: bool,
        _overrides: str | None,
    ):
        self.n, self.c, self.d = shape
        self.device, self.dense = device, dense
        self.hp = HyperParameters(*(value if abs(value) >= SMALLEST else 0.0 for value in hp))
        self.family, self.precision, self.int8 = family, precision, int8
        # the screen multiplies fp16 or int8 whatever the dtype; of dense products fp32 is left, or split into two parts
        self.unit_dtype = torch.int8 if int8 else torch.float16
        if dense and precision in ("ieee", "tf32"):
            self.unit_dtype = torch.float32
        self.parts = 2 if dense and precision == "split" else 1
        self.padded_n = padded(self.n)
        step = self.tile("coefficients" if dense else "screen").block_k
        self.padded_d = cdiv(self.d, step) * step  # of unit rows: whole steps of the products over them
        self.block_d = max(16, next_power_of_2(self.padded_d))  # a whole row
        self.row_block = max(1, tiles.ROW_ELEMENTS // self.block_d)  # rows that a program of `prepare` takes
        self.x: dict[str, Any] = {"x_stride_n": strides[0][0], "x_stride_d": strides[0][1]}
        self.w: dict[str, Any] = {"w_stride_c": strides[1][0], "w_stride_d": strides[1][1]}
        self.target: dict[str, Any] = {"n": self.n}
        self.pairs = {"c": self.c, **self.hp._asdict()}  # equations (3) and (4), and the filter
        del self.pairs["s"]
        self.threshold = threshold_of(hp, self.d, int8) or 0.0

    def tile(self, kernel: str) -> tiles.Tile:
        return tiles.tile(kernel, self.family, "int8" if self.int8 else self.precision, triton.__version__)

    def product(self, kernel: str) -> dict[str, Any]:
        """Compile-time arguments of a kernel that multiplies."""
        t = self.tile(kernel)
        blocks = {"BLOCK_N": t.block_n, "BLOCK_C": t.block_c, "BLOCK_K": t.block_k}
        return {**blocks, "UPCAST": self.family == "interpreter", "num_warps": t.warps, "num_stages": t.stages}

    def row_blocks(self, kernel: str) -> int:
        return cdiv(self.n, self.tile(kernel).block_n)

    def chunks(self, chunk: int) -> Iterator[tuple[int, int]]:
        """(first class, classes padded to GRANULE) of each chunk."""
        for first in range(0, self.c, chunk):
            yield first, cdiv(min(chunk, self.c - first), GRANULE) * GRANULE

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(shape, dtype, self.device)

    def unit_rows(self, rows: int) -> Tensor:
        """Room for unit rows `[rows, parts · padded D]`, in whole blocks of `prepare`."""
        in_blocks = cdiv(rows, self.row_block) * self.row_block
        return self.empty(in_blocks, self.parts * self.padded_d, dtype=self.unit_dtype)

    def coefficients(self, chunk: int) -> Tensor:
        """Room for those of all samples and `chunk` classes."""
        return self.empty(self.padded_n, self.parts * chunk, dtype=self.unit_dtype)


@functools.lru_cache(maxsize=KINDS)
def _kind(*what: Any) -> Kind:
    return Kind(*what)


def kind_of(x: Tensor, w: Tensor, hp: HyperParameters, dense: bool) -> Kind:
    family = gpu_of(x.device).family
    (n, d), c, overrides = x.shape, w.shape[0], os.environ.get("SFACE_TILES")
    int8 = not dense and screens_int8(hp, d, family)
    return _kind(
        (n, c, d), (x.stride(), w.stride()), x.device, family, precision(x.dtype, family), hp, dense, int8, overrides
    )


class Call(Kind):
    """One call: its kind, and the tensors that several kernels take under the same names."""

    def __init__(self, x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, dense: bool):
        self.kind = kind_of(x, w, hp, dense)
        vars(self).update(vars(self.kind))
        self.pointers = {"x_ptr": x, "w_ptr": w, "target_ptr": target}
        self.labels = {"label_ptr": target, "ignore_index": IGNORED, "no_target": NO_TARGET}
        self.x = {"x_ptr": x, **self.x}
        self.w = {"w_ptr": w, **self.w}
        self.target = {"target_ptr": target, **self.target}
