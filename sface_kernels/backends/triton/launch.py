"""What every launch needs: its arguments by the names that the kernels know them by, and a list of launches to repeat.

`sequence` is the fixed sequences of launches; nothing here or there waits for the GPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import buffers, tiles
from .buffers import cdiv
from .device import Buffer, pretence
from .kernels.prepare import prepare
from .kinds import COMPILE_OPTIONS, Kind, Launch, Steps
from .tiles import GRANULE

SUM_PLANES = 4  # per sample: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine
ALIGNMENT = 256  # bytes, of a buffer: what PyTorch's allocator gives at least, on any GPU


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _recorder() -> Callable[[Any, tuple[int, ...], dict[str, Any]], None] | None:
    """What is given launches instead of Triton."""
    pretended = pretence()
    return None if pretended is None else pretended.run


def gluon_descriptor(buffer: Tensor, block: list[int]) -> Any:
    """What kernels in Gluon take for a `TensorDescriptor`."""
    from triton.experimental.gluon import language
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Descriptor

    element = language.int8 if buffer.dtype == torch.int8 else language.float16
    return Descriptor.from_tensor(buffer, block, language.NVMMASharedLayout.get_default_for(block, element))


def launched_alone(kernel: Any, device: torch.device, programs: int, **arguments: Any) -> None:
    """Launches a kernel that belongs to no call."""
    options = {**COMPILE_OPTIONS, "num_warps": tiles.ROW_WARPS}
    if (record := _recorder()) is not None:
        record(kernel, (programs,), {**options, **arguments})
    else:
        with _on(device):
            kernel[(programs,)](**arguments, **options)


class Call:
    """One call: its kind, and the arguments of its launches by the names that the kernels know them by."""

    def __init__(self, kind: Kind, device: torch.device, common: dict[str, Any], own: dict[str, Any]):
        """`common` is what alike calls have in common beside their kind, such as constants of the compiled code; `own`
        are this one's tensors, and numbers that are compiled alike."""
        self.kind, self.device, self.common, self.own = kind, device, common, own
        self.scratch: dict[str, Buffer] = {}
        self.units: dict[str, Buffer] = {}  # with descriptors
        self.same: list[tuple[str, str]] = []
        self.launches: list[Launch] = []

    def run(self, steps: Callable[[Call], None], given: Sequence[Tensor]) -> None:
        """Makes the launches of `steps`. After the first of alike calls they are made from a list: to work them out and
        to ask Triton takes the host longer than a small step takes the GPU.

        `given` are the tensors whose dtype and alignment are the caller's.
        """
        if _recorder() is not None:
            return steps(self)
        variant = self.variant(steps, given)
        with _on(self.device):
            if (known := self.kind.steps.get(variant)) is not None:
                return self._repeat(known)
            steps(self)
        if self.launches:  # in the interpreter nothing is compiled
            self.kind.steps[variant] = self._noted()

    def variant(self, steps: Callable[[Call], None], given: Sequence[Tensor]) -> tuple[object, ...]:
        """Of its kind: alike calls have the same, and the same compiled code."""
        return steps, self.device, *self.common.values(), *[(t.dtype, t.data_ptr() % 16) for t in given]

    def _noted(self) -> Steps:
        offsets, size = [], 0
        for name, (shape, _, dtype) in self.scratch.items():
            offsets.append((name, size))
            size += cdiv(math.prod(shape) * dtype.itemsize, ALIGNMENT) * ALIGNMENT
        memory = buffers.whole(size // 4, dtype=torch.int32)
        described = [(name, type(self.own[name]), vars(self.own[name]) | {"base": None}) for name in self.units]
        return Steps(self.launches, [memory, *self.units.values()] if offsets else [], offsets, described, self.same)

    def _repeat(self, steps: Steps) -> None:
        own = self.own
        if steps.buffers:  # compiled code takes addresses, and an allocation takes the host half as long as a launch
            memory, *units = buffers.empty(steps.buffers, self.device)
            start = memory.data_ptr()
            for name, offset in steps.offsets:
                own[name] = start + offset
            for (name, kind, known), unit in zip(steps.described, units, strict=True):
                # without Triton's checks, which those of the first call passed: they too take as long as an allocation
                described: Any = object.__new__(kind)
                vars(described).update(known, base=unit)
                own[name], own[f"{name}_ptr"] = described, unit
        for name, other in steps.same:
            own[name] = own[other]
        for run, values, places in steps.launches:
            values = values.copy()
            for place, name in places:
                values[place] = own[name]
            run(*values)

    def make(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """A buffer that is an argument of the launches to come."""
        self.scratch[name] = buffer = buffers.whole(*shape, dtype=dtype)
        (self.own[name],) = buffers.empty([buffer], self.device)

    def also(self, name: str, other: str, buffer: Tensor) -> None:
        """Another name for a `buffer` in the same memory."""
        self.same.append((name, other))
        self.own[name] = buffer

    def launch(self, kernel: Any, *grid: int, **arguments: Any) -> None:
        """Launches with what `kernel` takes, by name; what its mode does not look at is None."""
        name, record, own = kernel.fn.__name__, _recorder(), self.own
        known = {**self.kind.arguments, **self.kind.own[name], **self.common, **own, **arguments}
        taken, options = {argument: known.get(argument) for argument in kernel.arg_names}, self.kind.options[name]
        if record is not None:
            record(kernel, grid, {**options, **taken})
        elif compiled := kernel[grid](**taken, **options):  # None in the interpreter
            values = [None if argument in own else value for argument, value in taken.items()]
            places = [(place, argument) for place, argument in enumerate(taken) if argument in own]
            self.launches.append(Launch(compiled[(*grid, 1, 1)[:3]], values, places))

    def unit_rows(self, own: dict[str, int]) -> None:
        """Room for those of all samples and of a chunk of classes, in whole blocks.

        `own` is of the kernel that multiplies the two, and takes them by descriptors where the GPU has such loads.
        """
        kind = self.kind
        described = gluon_descriptor if kind.specialised else TensorDescriptor.from_tensor
        for name, rows, block in (("x", kind.padded_n, own["BLOCK_N"]), ("w", kind.chunk, own["BLOCK_C"])):
            blocks, unit, pointer = cdiv(rows, kind.row_block), f"unit_{name}", f"unit_{name}_ptr"
            self.make(pointer, blocks * kind.row_block, kind.parts * kind.padded_d, dtype=kind.unit_dtype)
            if kind.arguments["TMA"]:
                self.units[unit] = self.scratch.pop(pointer)
                self.own[unit] = described(self.own[pointer], [block, own["BLOCK_K"]])
            else:
                self.also(unit, pointer, self.own[pointer])
            if kind.int8:
                self.make(f"step_{name}_ptr", blocks * kind.row_block)
                self.make(f"moved_{name}_ptr", blocks)

    def chunks(self) -> Iterator[int]:
        """Unit rows and norms of the classes, chunk by chunk, and with the first those of the samples.

        Yields how many classes a chunk has, padded to GRANULE; its other launches follow.
        """
        kind = self.kind
        for first in range(0, kind.c, kind.chunk):
            rows = cdiv(min(kind.chunk, kind.c - first), GRANULE) * GRANULE
            samples = cdiv(kind.padded_n, kind.row_block) if first == 0 else 0
            self.common |= {"first_class": first, "begun": kind.padded_n if first else 0}
            self.launch(prepare, samples + cdiv(rows, kind.row_block), sample_blocks=samples)
            yield rows
