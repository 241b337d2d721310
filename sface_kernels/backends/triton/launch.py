"""What every launch needs: the sizes of a call, and its arguments by the names that the kernels know them by.

`sequence` is the fixed sequences of launches; nothing here or there waits for the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...types import HyperParameters
from . import buffers, tiles
from .buffers import cdiv, padded
from .device import gpu_of, pretence
from .kernels.prepare import prepare
from .kernels.rescore import MOST_LIST_PARTS, PART_PLANES
from .kernels.screen import LANES
from .plan import threshold_of
from .tiles import GRANULE

# Products and sums fuse, as the kernels are written and counted for; Triton 3.10 means to switch it off by default.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # the compiler's, among a kernel's own arguments
# Triton before 3.6 spills under the limit that makes room for several programs.
LIMITS_REGISTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
SUM_PLANES = 4  # per sample: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine
KINDS = 64  # of calls whose constants are kept
SMALLEST = 2.0**-126  # a float below it is 0 to a GPU, and one of 64 bits to Triton's interpreter


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def block_parts(count: int) -> int:
    """A block for so many parts, of few sizes: each is another kernel to compile."""
    return next(size for size in (64, 256, next_power_of_2(count)) if size >= count)


# of a call: its device, the dtypes of its tensors and whether they are aligned, everything else that it was given
Variant = tuple[object, ...]


class Ready(NamedTuple):
    """A kernel that Triton has compiled for a variant of a call: asking Triton again would take the host longer."""

    compiled: Any
    values: list[Any]  # in order, of a launch
    differ: list[tuple[int, str]]  # which of them another launch may have otherwise, by name


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
        self.ready: dict[Variant, dict[str, Ready]] = {}  # by a kernel's name
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
            "IN_PARTS": self.list_parts > 1,
            "threshold": threshold_of(hp, self.d, int8) or 0.0,
            "BLOCK_D": block_d,
            "PADDED_D": self.padded_d,
            "DENSE": dense,
            "FILTERED": hp.filter_eps >= SMALLEST,
            "INT8": int8,
            "SPLIT": split,
            "TMA": family in tiles.BY_DESCRIPTOR,
            "UPCAST": family == "interpreter",
        }

    def tile(self, kernel: str) -> tiles.Tile:
        return tiles.tile(kernel, self.family, self.operands, triton.__version__)

    def _product(self, kernel: str, **others: int) -> dict[str, int]:
        """Arguments of a kernel that multiplies."""
        t = self.tile(kernel)
        blocks = {"BLOCK_N": t.block_n, "BLOCK_C": t.block_c, "BLOCK_K": t.block_k}
        options = {"num_warps": t.warps, "num_stages": t.stages, **self._limit(kernel, t.warps)}
        return {**blocks, "row_blocks": cdiv(self.n, t.block_n), **options, **others}

    def _limit(self, kernel: str, warps: int) -> dict[str, int]:
        limit = tiles.most_registers(kernel, self.family, self.operands, warps) if LIMITS_REGISTERS else None
        return {} if limit is None else {"maxnreg": limit}

    def _by_lists(self, block_d: int) -> dict[str, dict[str, int]]:
        granules = max(1, buffers.CHUNK_BYTES // (self.padded_d * self.unit_dtype.itemsize * GRANULE))
        self.chunk = self._whole_rounds(granules // self.stripes)
        # into how many parts each sample's candidates are cut, whose sums are kept where a chunk's unit rows have been
        a_part = 4 * (self.n * self.d + PART_PLANES.value * self.padded_n)
        room = self.chunk * self.padded_d * self.unit_dtype.itemsize // a_part
        if self.c >= tiles.CLASSES_OF_PARTS and room > 1:
            self.list_parts = min(room, MOST_LIST_PARTS.value)
        screen = self._product("screen", ROWS=self.row_block)
        screen["RUN"] = min(tiles.RUN[self.family], screen["BLOCK_C"] // LANES.value)
        if self.padded_d > tiles.DEEP_FEATURES:
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


def launched_alone(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launches a kernel that belongs to no call."""
    options = {**COMPILE_OPTIONS, "num_warps": tiles.ROW_WARPS}
    pretended = pretence()
    if pretended is not None and pretended.run is not None:
        pretended.run(kernel, (programs,), {**options, **arguments})
    else:
        kernel[(programs,)](**arguments, **options)


class Call:
    """One call: its kind, and the arguments of its launches so far."""

    def __init__(self, kind: Kind, device: torch.device, **arguments: Any):
        """`arguments` hold all tensors that are not made here, and what is a constant of the compiled code."""
        self.kind, self.device, self.arguments = kind, device, arguments
        tensors = [(v.dtype, v.data_ptr() % 16) if isinstance(v, Tensor) else v for v in arguments.values()]
        self.ready = kind.ready.setdefault((device, *tensors), {})

    def make(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer that is an argument of the launches to come."""
        made = self.arguments[name] = buffers.empty(shape, dtype, self.device)
        return made

    def launch(self, kernel: Any, *grid: int, **arguments: Any) -> None:
        """Launches with what `kernel` takes, by name; what its mode does not look at is None."""
        name, given, pretended = kernel.fn.__name__, self.arguments | arguments, pretence()
        record = None if pretended is None else pretended.run
        # what differs between launches of a variant, such as the first class of a chunk, Triton compiles alike
        if (ready := self.ready.get(name)) and record is None:
            values = ready.values.copy()
            for place, argument in ready.differ:
                values[place] = given[argument]
            ready.compiled[(*grid, 1, 1)[:3]](*values)
            return
        options, all_given = self.kind.options[name], {**self.kind.arguments, **self.kind.own[name], **given}
        taken = {argument: all_given.get(argument) for argument in kernel.arg_names}
        if record is not None:
            record(kernel, grid, {**options, **taken})
        elif compiled := kernel[grid](**taken, **options):  # None in the interpreter
            differ = [(place, argument) for place, argument in enumerate(taken) if argument in given]
            self.ready[name] = Ready(compiled, list(taken.values()), differ)

    def unit_rows(self, own: dict[str, int]) -> int:
        """Room for those of all samples and of a chunk of classes, whose size it returns, in whole blocks.

        `own` is of the kernel that multiplies the two, and takes them by descriptors where the GPU has such loads.
        """
        kind, chunk = self.kind, self.kind.chunk
        self.arguments["padded_chunk"] = chunk
        for name, rows, block in (("x", kind.padded_n, own["BLOCK_N"]), ("w", chunk, own["BLOCK_C"])):
            blocks = cdiv(rows, kind.row_block)
            size = blocks * kind.row_block, kind.parts * kind.padded_d
            unit = self.make(f"unit_{name}_ptr", *size, dtype=kind.unit_dtype)
            by_descriptor = kind.arguments["TMA"]
            self.arguments[f"unit_{name}"] = (
                TensorDescriptor.from_tensor(unit, [block, own["BLOCK_K"]]) if by_descriptor else unit
            )
            if kind.int8:
                self.make(f"step_{name}_ptr", blocks * kind.row_block)
                self.make(f"moved_{name}_ptr", blocks)
        return chunk

    def chunks(self) -> Iterator[int]:
        """Unit rows and norms of the classes, chunk by chunk, and with the first those of the samples.

        Yields how many classes a chunk has, padded to GRANULE; its other launches follow.
        """
        kind, chunk = self.kind, self.arguments["padded_chunk"]
        for first in range(0, kind.c, chunk):
            rows = cdiv(min(chunk, kind.c - first), GRANULE) * GRANULE
            samples = cdiv(kind.padded_n, kind.row_block) if first == 0 else 0
            self.arguments |= {"first_class": first, "begun": kind.padded_n if first else 0}
            self.launch(prepare, samples + cdiv(rows, kind.row_block), sample_blocks=samples)
            yield rows
