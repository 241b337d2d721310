"""Lists or dense products for the next call, from an earlier call's count of active pairs.

The count is copied to the host without waiting and read when it has arrived, some steps later; until then a call goes
as the one before. Either way gives the same results up to the rounding of dense products; where that must not vary from
run to run (`torch.use_deterministic_algorithms`), or nothing can be read (a CUDA graph is captured, a function is
compiled), calls go by lists, whose overflow the device handles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import HyperParameters

# Share of active pairs at which dense products are taken to beat lists. Computed for an H200 from operation and byte
# counts, not measured (docs/kernels.md).
DENSE_SHARE = 2.5e-3


def _host_buffer(counts: Tensor) -> Tensor:
    """Pinned, or a copy to it would wait."""
    return torch.zeros(counts.shape, dtype=counts.dtype, pin_memory=True)


class _Watch:
    """The last count of calls of one kind that has arrived, and the one that is under way."""

    def __init__(self, counts: Tensor):
        self.host = _host_buffer(counts)
        self.arrived = torch.cuda.Event()
        self.under_way = False
        self.dense = False

    def send(self, counts: Tensor) -> None:
        if not self.under_way:  # the buffer is still being written otherwise
            self.host.copy_(counts, non_blocking=True)
            self.arrived.record()
            self.under_way = True

    def read(self, pairs: int) -> None:
        if self.under_way and self.arrived.query():
            self.dense = int(self.host[0]) > DENSE_SHARE * pairs
            self.under_way = False


_watches: dict[tuple[object, ...], _Watch] = {}


def _readable(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or not x.is_cuda or torch.are_deterministic_algorithms_enabled():
        return False
    with torch.cuda.device_of(x):
        return not torch.cuda.is_current_stream_capturing()


def _kind(x: Tensor, w: Tensor, hp: HyperParameters) -> tuple[object, ...]:
    # s, k, a and b may follow a schedule: a kind of its own for every value would never see its count arrive
    return x.device, x.shape[1], w.shape[0], hp.filter_eps


def expects_dense(x: Tensor, w: Tensor, hp: HyperParameters) -> bool:
    if not _readable(x):
        return False
    watch = _watches.get(_kind(x, w, hp))
    if watch is None:
        return False
    watch.read(x.shape[0] * w.shape[0])
    return watch.dense


def learn(counts: Tensor, x: Tensor, w: Tensor, hp: HyperParameters) -> None:
    """Sends the counts of a call, `[2]` on its device, on their way to the host."""
    if not _readable(x):
        return
    kind = _kind(x, w, hp)
    with torch.cuda.device_of(x):  # an event is recorded on the current device
        if kind not in _watches:
            _watches[kind] = _Watch(counts)
        _watches[kind].send(counts)
