"""A record of what a process exchanges: which collective was started, how large, and when it was waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch.distributed as dist

from sface_kernels.distributed import collectives


class Exchange(NamedTuple):
    name: str
    bytes: int  # of the larger buffer


class Record:
    def __init__(self) -> None:
        self.events: list[str] = []  # "start NAME", "wait NAME", and what a test notes in between
        self.exchanges: list[Exchange] = []

    def watch(self, function: Any, name: str, larger: int) -> Any:
        """`function`, a collective with its larger buffer as argument number `larger`."""

        def call(*tensors: Any, **options: Any) -> Any:
            exchange = f"{name} {len(self.exchanges)}"
            self.exchanges.append(Exchange(name, tensors[larger].numel() * tensors[larger].element_size()))
            self.events.append(f"start {exchange}")
            return _Watched(function(*tensors, **options), lambda: self.events.append(f"wait {exchange}"))

        return call

    def note(self, function: Any, name: str) -> Any:
        """`function`, whose calls are events too."""

        def call(*args: Any, **options: Any) -> Any:
            self.events.append(name)
            return function(*args, **options)

        return call


class _Watched:
    def __init__(self, work: dist.Work, when_waited_for: Any) -> None:
        self.work, self.when_waited_for = work, when_waited_for

    def wait(self) -> None:
        self.when_waited_for()
        self.work.wait()


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """A record of the collectives that NCCL is given: gloo runs them too, but is spared the reduce-scatter otherwise."""
    record = Record()
    watch = record.watch
    with (
        mock.patch.object(collectives, "_all_gather", watch(collectives._all_gather, "gather", 0)),
        mock.patch.object(collectives, "_reduce_scatter", watch(collectives._reduce_scatter, "sum and scatter", 1)),
        mock.patch.object(dist, "all_reduce", watch(dist.all_reduce, "reduce", 0)),
        mock.patch.object(collectives, "SCATTERS_A_COPY", set()),
    ):
        yield record
