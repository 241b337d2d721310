"""What every launch needs: the sizes of a call, its precision, and where launches go.

`launch_forward` and `launch_backward` are fixed sequences of launches; nothing here or there waits for the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ... import ops
from ...types import HyperParameters
from . import tiles

FLAGS = 2  # [0]: a row of w is not finite, [1]: a list overflowed
SUM_PLANES = 4  # per sample: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine
GRANULE = 128  # every block of classes or samples divides it; buffers are padded to it


class Saved(NamedTuple):
    """What the forward leaves for the backward. Without lists, in a dense call, the last four hold nothing."""

    norm: Tensor  # [padded N]
    inv_norm: Tensor  # [C]
    dense_row: Tensor  # [padded N] int32, 1 where the sample's list overflowed
    flags: Tensor  # [FLAGS] int32
    target_weight: Tensor  # [N], −p_i / s
    cos_target: Tensor  # [N]
    counts: Tensor  # [stripes, padded N] int32
    list_classes: Tensor  # [padded N, stripes, capacity] int32
    list_weight: Tensor  # the same shape
    list_cos: Tensor  # the same shape


class Recorder(NamedTuple):
    """Records launches instead of running them, for a GPU of `family`; `tools.compile_report` reads the record."""

    family: str
    taken: list[tuple[Any, dict[str, Any]]]  # kernels and their arguments


_recorder: Recorder | None = None


@contextlib.contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    global _recorder
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    if _recorder is not None:
        _recorder.taken.append((kernel, arguments))
    else:
        kernel[grid](**arguments)


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def family(device: torch.device) -> str:
    if _recorder is not None:
        return _recorder.family
    if device.type != "cuda":
        return tiles.family(None, None)
    return tiles.family(torch.cuda.get_device_capability(device), torch.version.hip)


def precision(dtype: torch.dtype, gpu: str) -> str:
    """How dense products of these embeddings are computed: fp32 as `torch.get_float32_matmul_precision()` says."""
    if dtype != torch.float32:
        return "half"
    if gpu in ("gfx942", "interpreter"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Call:
    """One call's sizes, and the arguments that several kernels take under the same names."""

    def __init__(self, x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, dense: bool):
        (self.n, self.d), self.c = x.shape, w.shape[0]
        self.device, self.hp, self.dense = x.device, hp, dense
        self.family = family(x.device)
        self.precision = precision(x.dtype, self.family)
        # the screen multiplies fp16 whatever the dtype; dense products multiply in theirs
        self.unit_dtype = torch.float32 if dense and self.precision != "half" else torch.float16
        self.padded_n = ops.triton_padded(self.n)
        self.padded_d = triton.cdiv(self.d, self.feature_step) * self.feature_step  # of unit rows
        self.block_d = max(16, triton.next_power_of_2(self.padded_d))  # a whole row
        self.row_block = max(1, tiles.ROW_ELEMENTS // self.block_d)  # rows that a row-wise program takes at once
        self.stripes, self.capacity = ops.triton_lists(self.n, self.c, self.d, dense)
        self.slots = self.padded_n * self.stripes * self.capacity
        self.x = {"x_ptr": x, "x_stride_n": x.stride(0), "x_stride_d": x.stride(1)}
        self.w = {"w_ptr": w, "w_stride_c": w.stride(0), "w_stride_d": w.stride(1)}
        self.target = {"target_ptr": target, "n": self.n}
        self.rows = {**self.x, **self.w, **self.target, "d": self.d, "padded_n": self.padded_n}
        self.inter = {"k_inter": hp.k_inter, "b": hp.b, "filter_eps": hp.filter_eps}
        self.intra = {"k_intra": hp.k_intra, "a": hp.a}

    @property
    def feature_step(self) -> int:
        """Unit rows are padded to whole steps of the products over them."""
        kernels = ("row_coefficients", "class_coefficients") if self.dense else ("screen", "screen_full")
        return max(self.tile(kernel).block_k for kernel in kernels)

    def tile(self, kernel: str) -> tiles.Tile:
        return tiles.tile(kernel, self.family, self.precision, self.n)

    def product(self, kernel: str) -> dict[str, Any]:
        """Compile-time arguments of a kernel that multiplies."""
        t = self.tile(kernel)
        blocks = {"BLOCK_N": t.block_n, "BLOCK_C": t.block_c, "BLOCK_K": t.block_k}
        return {**blocks, "UPCAST": self.family == "interpreter", "num_warps": t.warps, "num_stages": t.stages}

    def row_blocks(self, kernel: str) -> int:
        return triton.cdiv(self.n, self.tile(kernel).block_n)

    def chunks(self, chunk: int) -> Iterator[tuple[int, int]]:
        """(first class, classes padded to GRANULE) of each chunk."""
        for first in range(0, self.c, chunk):
            yield first, triton.cdiv(min(chunk, self.c - first), GRANULE) * GRANULE

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def unit_rows(self, rows: int) -> Tensor:
        """Room for unit rows `[rows, padded D]`, in whole blocks of the kernels that write them."""
        return self.empty(triton.cdiv(rows, self.row_block) * self.row_block, self.padded_d, dtype=self.unit_dtype)
