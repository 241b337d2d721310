"""What calls of the same sizes have in common: the sizes of their launches, and what they launch.

`launch` makes the launches.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...types import HyperParameters
from . import buffers, tiles
from .buffers import cdiv, padded
from .device import Buffer, gpu_of
from .kernels.rescore import MOST_LIST_PARTS, PART_PLANES
from .kernels.screen import LANES
from .plan import threshold_of
from .tiles import GRANULE

# Products and sums fuse, as the kernels are written and counted for; Triton 3.10 means to switch it off by default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # the compiler's, among a kernel's own arguments
# Triton before 3.6 spills under the limit that makes room for several programs.
LIMITS_REGISTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
KINDS = 64  # of calls whose constants are kept
SMALLEST = 2.0**-126  # a float below it is 0 to a GPU, and one of 64 bits to Triton's interpreter


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def block_parts(count: int) -> int:
    """A block for so many parts, of few sizes: each is another kernel to compile."""
    return next(size for size in (64, 256, next_power_of_2(count)) if size >= count)


class Launch(NamedTuple):
    """One that Triton has compiled."""

    run: Callable[..., None]  # on its grid
    values: list[Any]  # in order; None in place of what is each call's own
    own: list[tuple[int, str]]  # these, by place and name


class Steps(NamedTuple):
    """What alike calls launch, without their tensors."""

    launches: list[Launch]
    buffers: list[Buffer]  # one piece of memory, then what has a descriptor
    offsets: list[tuple[str, int]]  # of scratch in that memory, in bytes, by name
    described: list[tuple[str, type, dict[str, Any]]]  # a descriptor by name: its attributes but for its buffer
    same: list[tuple[str, str]]  # names of one buffer


class Kind:
    """What calls of the same sizes, layout and hyper-parameters have in common: no tensors, so it may outlive them.

    Working it out takes the host longer than a launch: `kind_of` does so once for each.
    """

    def __init__(
        self,
        shapes: tuple[tuple[int, int], tuple[int, int]],
        strides: tuple[tuple[int, int], tuple[int, int]],
        family: str,
        split: bool,
        hp: HyperParameters,
        dense: bool,
        int8: bool,
        made: bool,
        multiprocessors: int,
        _overrides: str | None,
    ):
        (self.n, self.d), (self.c, _) = shapes
        self.family, self.dense, self.int8, self.made = family, dense, int8, made
        # the screen multiplies fp16 or int8 whatever the dtype; in dense products fp32 is split into two parts of fp16
        self.unit_dtype, self.parts = torch.int8 if int8 else torch.float16, 2 if split else 1
        self.operands = "int8" if int8 else "split" if split else "half"
        self.padded_n = padded(self.n)
        step = self.tile("coefficients" if dense else "screen").block_k
        self.padded_d = cdiv(self.d, step) * step  # of unit rows: whole steps of the products over them
        self.block_d = block_d = max(16, next_power_of_2(self.padded_d))  # a whole row
        self.row_block = max(1, tiles.ROW_ELEMENTS // block_d)  # rows that a program of `prepare` takes
        self.lists = self.stripes, self.capacity = buffers.lists(self.n, self.c, self.d, multiprocessors)
        self.list_parts = 1
        self.specialised = False  # the screen's warps
        self.steps: dict[tuple[object, ...], Steps] = {}  # by `Call.variant`
        own = self._dense(multiprocessors) if dense else self._by_lists(block_d)
        own["prepare"] = {"BLOCK": self.row_block, "num_warps": tiles.ROW_WARPS}
        entries = tiles.RESCORE_ELEMENTS // block_d if self.list_parts > 1 else self.row_block
        own["finish_samples"] = {
            "BLOCK_E": tiles.rows_at_once(max(1, min(tiles.FINISH_ENTRIES, entries)), family),
            "BLOCK_PARTS": block_parts(self.stripes),
            "num_warps": tiles.ROW_WARPS,
        }
        own["rescore"] = {**own["finish_samples"], "num_warps": max(1, min(8, block_d // tiles.RESCORE_FEATURES))}
        self.own = own  # arguments of one kernel, by its name, and the compiler's options for it
        self.options = {
            kernel: {**COMPILE_OPTIONS, **{name: values[name] for name in OPTIONS if name in values}}
            for kernel, values in own.items()
        }
        self.arguments: dict[str, Any] = {  # of all kernels
            **dict(zip(("x_stride_n", "x_stride_d", "w_stride_c", "w_stride_d"), sum(strides, ()), strict=True)),
            **{name: value if abs(value) >= SMALLEST else 0.0 for name, value in hp._asdict().items()},
            "n": self.n,
            "c": self.c,
            "d": self.d,
            "padded_n": self.padded_n,
            "stripes": self.stripes,
            "capacity": self.capacity,
            "slots": self.padded_n * self.lists[0] * self.capacity,
            "list_parts": self.list_parts,
            "padded_chunk": self.chunk,
            "splits": own["row_gradient"]["splits"] if dense else None,
            "IN_PARTS": self.list_parts > 1,
            "threshold": threshold_of(hp, self.d, int8) or 0.0,
            "BLOCK_D": block_d,
            "PADDED_D": self.padded_d,
            "DENSE": dense,
            "FILTERED": hp.filter_eps >= SMALLEST,
            "INT8": int8,
            "SPLIT": split,
            "TMA": family in tiles.BY_DESCRIPTOR,
        }

    def tile(self, kernel: str) -> tiles.Tile:
        return tiles.tile(kernel, self.family, self.operands, triton.__version__)

    def _product(self, kernel: str) -> dict[str, int]:
        """Arguments of a kernel that multiplies."""
        t = self.tile(kernel)
        own = {"BLOCK_N": t.block_n, "BLOCK_C": t.block_c, "BLOCK_K": t.block_k, "row_blocks": cdiv(self.n, t.block_n)}
        own |= {"num_warps": t.warps, "num_stages": t.stages}
        programs = tiles.programs(kernel, self.family, self.operands)
        return own | {"maxnreg": tiles.most_registers(programs, t.warps)} if programs > 1 and LIMITS_REGISTERS else own

    def _by_lists(self, block_d: int) -> dict[str, dict[str, int]]:
        granules = max(1, buffers.CHUNK_BYTES // (self.padded_d * self.unit_dtype.itemsize * GRANULE))
        self.chunk = self._whole_rounds(granules // self.stripes)
        # into how many parts each sample's candidates are cut, whose sums are kept where a chunk's unit rows have been
        a_part = 4 * (self.n * self.d + PART_PLANES.value * self.padded_n)
        room = self.chunk * self.padded_d * self.unit_dtype.itemsize // a_part
        if self.c >= tiles.CLASSES_OF_PARTS and room > 1:
            self.list_parts = min(room, MOST_LIST_PARTS.value)
        screen = self._product("screen")
        tiles_each = cdiv(self.c, screen["BLOCK_C"]) // self.stripes
        screen["ROWS"], screen["RUN"] = self.row_block, min(tiles.RUN[self.family], screen["BLOCK_C"] // LANES.value)
        if tiles_each >= tiles.SPECIALISED_TILES and (
            ring := tiles.ring(self.family, self.operands, triton.__version__, self.padded_d)
        ):
            self.specialised = True
            screen["RING"] = ring
            screen.pop("maxnreg", None)  # of each group of warps its own
        elif self.padded_d > tiles.DEEP_FEATURES:
            screen["num_stages"] = min(screen["num_stages"], tiles.DEEP_STAGES)
        features = min(block_d, tiles.SCATTER_FEATURES)
        scatter = {
            "BLOCK_C": tiles.rows_at_once(tiles.SCATTER_ELEMENTS // features, self.family),
            "BLOCK_D": features,
            "num_warps": tiles.SCATTER_WARPS,
        }
        regroup = {"BLOCK_N": screen["BLOCK_N"], "row_blocks": screen["row_blocks"], "num_warps": tiles.ROW_WARPS}
        return {"screen": screen, "regroup": regroup, "scatter_classes": scatter}

    def _dense(self, multiprocessors: int) -> dict[str, dict[str, int]]:
        weighed = self._product("coefficients")
        rows, classes = self._product("row_gradient"), self._product("class_gradient")
        rows |= {"COLUMNS": weighed["BLOCK_C"], "BLOCK_K": min(rows["BLOCK_K"], weighed["BLOCK_C"])}
        classes |= {"ROWS": weighed["BLOCK_N"], "BLOCK_K": min(classes["BLOCK_K"], weighed["BLOCK_N"])}
        outputs = rows["row_blocks"] * cdiv(self.d, rows["BLOCK_C"])
        in_memory = buffers.PARTIAL_BYTES // (4 * self.padded_n * self.d)
        rows["splits"] = buffers.shares(outputs, min(max(2, in_memory), cdiv(self.c, GRANULE)), multiprocessors)
        granules = self._dense_granules(rows["splits"])
        programs = multiprocessors * tiles.programs("coefficients", self.family, self.operands)
        self.stripes = buffers.shares(weighed["row_blocks"], min(granules, cdiv(self.c, GRANULE)), programs)
        # as many rounds as leave the fewest multiprocessors idle under the last programs of class_gradient
        a_round = self.stripes * GRANULE // classes["BLOCK_C"] * cdiv(self.d, classes["BLOCK_N"])
        at_once = multiprocessors * tiles.programs("class_gradient", self.family, self.operands)
        rounds = range(max(1, granules // self.stripes), 0, -1)
        self.chunk = self._whole_rounds(min(rounds, key=lambda r: cdiv(r * a_round, at_once) / r))
        return {"coefficients": weighed, "row_gradient": rows, "class_gradient": classes}

    def _dense_granules(self, splits: int) -> int:
        """How many granules of classes a chunk may have with its coefficients: what the bound on memory leaves."""
        operands = 2 if self.made else 1  # of coefficients: for ∂x, for ∂w
        a_class = 2 * self.parts * (self.padded_d + operands * self.padded_n) + self.padded_n // 4  # with exponents
        samples = self.padded_n * ((4 * splits + 2 * self.parts) * self.padded_d + 128)  # parts of ∂x and unit rows
        left = buffers.BOUND_BYTES + 8 * self.c + 12 * self.n * self.d - samples
        return max(1, min(left, buffers.DENSE_CHUNK_BYTES) // (a_class * GRANULE))

    def _whole_rounds(self, rounds: int) -> int:
        """Classes in a chunk of so many, at least one, granules for each stripe."""
        return min(max(1, rounds) * self.stripes, cdiv(self.c, GRANULE)) * GRANULE


_kind = functools.lru_cache(maxsize=KINDS)(Kind)


def kind_of(
    x: Tensor, w: Tensor, hp: HyperParameters, dense: bool, int8: bool, multiprocessors: int, made: bool = False
) -> Kind:
    """`made`: a dense forward makes ∂w too."""
    family, split = gpu_of(x.device).family, dense and x.dtype == torch.float32
    shapes, strides = (x.shape, w.shape), (x.stride(), w.stride())
    return _kind(shapes, strides, family, split, hp, dense, int8, made, multiprocessors, os.environ.get("SFACE_TILES"))
