"""Precision that a call chooses itself, whatever process-wide switches and autocast say. A leaf: imports torch only."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# what torch.set_float32_matmul_precision and torch.backends.fp32_precision set for a CPU and for a GPU
_SWITCHES: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Undoes at its end what is set inside of these switches."""
    before = [switch.fp32_precision for switch in _SWITCHES]
    older = None
    with contextlib.suppress(RuntimeError):  # which PyTorch raises where both kinds of switch were used
        older = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for switch, value in zip(_SWITCHES, before, strict=True):
            _put_back(switch, value)


def _put_back(switch: Any, value: str) -> None:
    switch.fp32_precision = "none"  # what a wider switch says, as long as that is the same
    if switch.fp32_precision != value:
        switch.fp32_precision = value


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Devices such as meta have no autocast to turn off."""
    # making the other context costs more than all that a small step does in it
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class _WithoutTF32:
    """While a thread is inside, the switches, which are the process's, say "ieee"; the last one out puts them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: dict[int, str] = {}  # what each switch said that said something else, by its place

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            for place, switch in enumerate(_SWITCHES):
                if (value := switch.fp32_precision) not in ("none", "ieee"):
                    self._before[place] = value
                    switch.fp32_precision = "ieee"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for place, value in self._before.items():
                    _put_back(_SWITCHES[place], value)
                self._before.clear()


_without_tf32 = _WithoutTF32()


def full_precision(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorates a function whose first argument is a tensor: its products are made in the dtype of what it multiplies,
    not in TF32 or half precision. k = 80 would blow such cosines up to errors of percents."""

    @functools.wraps(function)
    def wrapped(first: Tensor, *others: Any) -> Result:
        with _without_autocast(first.device):
            if torch.compiler.is_compiling():  # the compiler cannot trace the switches
                return function(first, *others)
            with _without_tf32:
                return function(first, *others)

    return wrapped
