"""Which GPU a tensor is on, or passes for: the seam that the interpreter, the recorder and an emulator share.

Torch only, so that it can be asked before Triton is there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tiles

Buffer = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # its shape and strides
# An H100's or H200's; for tensors that are on no GPU.
MULTIPROCESSORS = 132


class Gpu(NamedTuple):
    """What the launches depend on."""

    family: str  # a row of the tables in `tiles`
    multiprocessors: int


class Pretence(NamedTuple):
    """What `pretend` was given."""

    gpu: Gpu
    run: Callable[[Any, tuple[int, ...], dict[str, Any]], None] | None
    allocated: Callable[[Tensor], Tensor] | None


_pretence: Pretence | None = None


def pretence() -> Pretence | None:
    """That of the `pretend` block around this, if any."""
    return _pretence


@contextlib.contextmanager
def pretend(
    capability: tuple[int, int] | None,
    hip: str | None = None,
    *,
    multiprocessors: int = MULTIPROCESSORS,
    run: Callable[[Any, tuple[int, ...], dict[str, Any]], None] | None = None,
    allocated: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Tensors on a CPU (or on the meta device) pass for those of a GPU of this capability inside the block.

    Args:
        capability: of CUDA, such as (9, 0); None for what the interpreter takes.
        hip: the version of HIP for an AMD GPU, whose `capability` is not looked at.
        multiprocessors: how many that GPU has.
        run: called with kernel, grid and arguments instead of launching.
        allocated: called with every buffer that is made for a launch, returns the buffer to use.
    """
    global _pretence
    before = _pretence
    _pretence = Pretence(Gpu(tiles.family(capability, hip), multiprocessors), run, allocated)
    try:
        yield
    finally:
        _pretence = before


def gpu_of(device: torch.device) -> Gpu:
    if _pretence is not None:
        return _pretence.gpu
    if device.type != "cuda":
        return Gpu(tiles.family(None, None), MULTIPROCESSORS)
    return _asked(device) if device.index is None else _known(device)  # without an index it is the current one


def _asked(device: torch.device) -> Gpu:
    family = tiles.family(torch.cuda.get_device_capability(device), torch.version.hip)
    return Gpu(family, torch.cuda.get_device_properties(device).multi_processor_count)


_known = functools.cache(_asked)  # of few devices; asking takes the host as long as an allocation


def empty(buffers: Iterable[Buffer], device: torch.device) -> list[Tensor]:
    """New buffers for launches."""
    # takes the host two thirds of what torch.empty takes
    made = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in buffers]
    if _pretence is None or (allocated := _pretence.allocated) is None:
        return made
    return [each if each.stride() == (0,) else allocated(each) for each in made]  # those hold nothing
