"""Which way a call goes: by lists of candidates or by dense products, and what the screen takes for a candidate.

Two things decide. `threshold_of` says from the hyper-parameters whether there is anything to screen for. Where there
is, an earlier call's counts say whether lists pay, and whether a screen in int8 leaves few candidates more: they are
copied to the host without waiting and looked at when they have arrived, some steps later; until then a call goes as the
one before. Either way gives the same results up to the rounding of dense products. Where that must not vary from run to
run (`torch.use_deterministic_algorithms`), or nothing is known (a first call, a function that is compiled), calls go by
lists from a screen in fp16, whose overflow the device handles. A CUDA graph keeps the way that the counts before its
capture asked for. Imports no Triton.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ...tracing import traced
from ...types import HyperParameters
from . import tiles

CANDIDATE_SHARE = 1 / 1024  # the cheap form of the weight below the threshold is accurate to here
# Share of active pairs from which dense products are taken. On an H200 at (1024; 1,000,000; 512) they take 13 ms, lists
# 3.4 and some 2 ns a pair (of a trained head): 8 ms here, but lists have room for 3e-3 of the pairs.
DENSE_SHARE = 2.5e-3
# Share of random pairs that a screen in int8 may take for candidates: each costs as much as the screen of hundreds.
INT8_SHARE = DENSE_SHARE / 10
# Share of active pairs up to which it pays. On an H200 at (1024; 1,000,000; 512) int8 saves 0.46 ms, and a candidate
# takes some 1.4 ns: as much as 3e-4 of the pairs. Of trained rows it takes five for each active pair (6.3e-3 where
# 1.3e-3 are active, and fp16 takes 1.4e-3).
INT8_ACTIVE = 2.0**-14
# What rounding to int8 typically takes from the threshold, at any number of features (docs/math.md §3).
INT8_MARGIN = 0.02
INT8_FILTER = 2.0**-16  # the default for half embeddings; below it lists would often hold too many
INT8_SLOPE = 160  # beyond it an error of a cosine turns into too much of a coefficient
# Dense calls after the first call in a row whose lists overflowed; then lists are tried again. Each further one doubles
# it: lists that never suffice are tried ever more rarely, and where they suffice again they are soon back.
FIRST_PAUSE = 16
KINDS = 64  # of calls whose counts are watched; there is room for so many, and further kinds go by lists


@functools.lru_cache(maxsize=KINDS)
def threshold_of(hp: HyperParameters, features: int, int8: bool = False) -> float | None:
    """The screened cosine that candidates have at least, which misses no active pair (docs/math.md §3).

    For a screen in int8 that of rows which rounding has not moved: by how much it has is known on the device.
    None where there is nothing to screen for: every pair may be active, or the cheap form of the weight below the
    threshold is not accurate.
    """
    share = min(hp.filter_eps, CANDIDATE_SHARE)
    if share <= 0:
        return None
    angle = hp.b + math.log((1 - share) / share) / hp.k_inter
    # rounding a unit row to fp16 moves it by at most 2⁻¹¹ of its length and half a subnormal step per feature
    moved = 0.0 if int8 else 2.0**-11 + 2.0**-25 * math.sqrt(features)
    # fp32 sums that tensor cores may truncate, and the fp32 norms on both sides
    bound = 2 * moved + moved * moved + 4e-6 + features * 2.0**-22
    threshold = math.cos(max(angle, 0.0)) - bound if angle < math.pi else -2.0
    far_exponent = hp.k_inter * (math.acos(-0.5) - hp.b) / math.log(2)
    # above 0, where the zeros of ignored and padded rows are no candidates
    return threshold if 0 < threshold <= 0.26 - 2 * bound and far_exponent > 60 else None


@functools.lru_cache(maxsize=KINDS)
def screens_int8(hp: HyperParameters, features: int, family: str) -> bool:
    """Whether the screen of a call by lists may multiply int8: where that is fast and leaves few more candidates."""
    threshold = threshold_of(hp, features, int8=True)
    if family not in tiles.INT8_SCREEN or threshold is None:
        return False
    if hp.k_inter > INT8_SLOPE or hp.filter_eps < INT8_FILTER:
        return False
    # a cosine of random rows has a standard deviation of 1/√D
    return math.erfc((threshold - INT8_MARGIN) * math.sqrt(features / 2)) / 2 <= INT8_SHARE


NOT_YET = -1  # in the host's copy of the counts: no copy has arrived


class Way(NamedTuple):
    """Of a call: by lists from a screen in fp16, unless it says otherwise."""

    dense: bool = False
    int8: bool = False  # what the screen multiplies
    watch: Watch | None = None  # what is to learn the call's counts


class Pause:
    """When lists from one kind of screen are tried again after they have overflowed."""

    def __init__(self) -> None:
        self.calls = 0  # from one try to the next; 0 while lists suffice
        self.left = 0  # of these

    def learn(self, overflowed: bool) -> None:
        self.calls = max(FIRST_PAUSE, 2 * self.calls) if overflowed else 0
        self.left = self.calls

    def lasts(self, under_way: bool) -> bool:
        """Asked for each call. One call tries, the next wait for what its counts say."""
        pausing = self.calls > 0 and (self.left > 0 or under_way)
        self.left = max(0, self.left - 1)
        return pausing


class Watch:
    """The counts of calls of one kind: what the last to arrive said, and the one under way."""

    def __init__(self, host: Tensor):
        self.host = host  # [2] int64: active pairs, pairs computed by dense products
        self.many = False  # whether the last count that arrived was past DENSE_SHARE
        self.few = False  # whether it was up to INT8_ACTIVE
        self.pauses = {False: Pause(), True: Pause()}  # of screens in fp16 and, True, in int8
        self.taken: set[tuple[bool, bool]] = set()  # dense and int8 of the ways that calls have gone
        self.under_way = False
        self.sent, self.pairs = Way(), 0  # the call whose counts are under way

    def choose(self, may_int8: bool) -> Way:
        """The way of the next call."""
        self._look()
        dense = self.pauses[False].lasts(self.under_way) or self.many
        int8 = not dense and may_int8 and self.few and not self.pauses[True].lasts(self.under_way)
        self.taken.add((dense, int8))
        return Way(dense, int8, self)

    def settle(self, may_int8: bool) -> Way:
        """The way of a call that is captured in a graph, and so repeated: no try of lists that overflowed, and no way
        that no call has gone, as CUDA refuses to load its kernels then."""
        self._look()
        dense = self.pauses[False].calls > 0 or self.many
        int8 = not dense and may_int8 and self.few and self.pauses[True].calls == 0
        return Way(dense, int8) if (dense, int8) in self.taken else Way()

    def _look(self) -> None:
        """At the counts, if they have arrived."""
        if self.under_way:
            active, exact = self.host.tolist()
            if active != NOT_YET and exact != NOT_YET:
                self.under_way = False
                self.many = active > DENSE_SHARE * self.pairs
                self.few = active <= INT8_ACTIVE * self.pairs
                if self.sent.int8:
                    self.pauses[True].learn(exact > 0)
                if not self.sent.dense and not (self.sent.int8 and exact):  # fp16 leaves no more in a list than int8
                    self.pauses[False].learn(exact > 0)

    def send(self, counts: Tensor, pairs: int, way: Way) -> None:
        if self.under_way:  # the buffer is still being written
            return
        self.host.fill_(NOT_YET)
        # nobody waits for it and no event is recorded: asking an event would break another thread's capture of a graph
        self.host.copy_(counts, non_blocking=True)
        self.sent, self.pairs, self.under_way = way, pairs, True


_watches: dict[tuple[object, ...], Watch] = {}
_making = threading.Lock()  # of a watch: two threads must not take the same room for their counts
_host: Tensor | None = None  # [KINDS, 2]


def _host_counts() -> Tensor:
    """Room for one more kind's counts, pinned, as a copy to other memory would wait.

    Allocated once, by the first call of a process: an allocation would break another thread's capture of a CUDA graph,
    as would the loading of kernels that comes with a first call.
    """
    global _host
    if _host is None:
        # an evaluation may come first, and a tensor made in inference mode is never written outside of it
        with torch.inference_mode(False):
            _host = torch.empty(KINDS, 2, dtype=torch.int64, device="cpu", pin_memory=True)
    return _host[len(_watches)]


def _varies(x: Tensor) -> bool:
    """Whether the way of a call on `x` may follow an earlier call's counts."""
    if not x.is_cuda or traced(x):
        return False
    return not torch.are_deterministic_algorithms_enabled()


def _capturing(x: Tensor) -> bool:
    with torch.cuda.device_of(x):
        return torch.cuda.is_current_stream_capturing()


def way_of(x: Tensor, w: Tensor, hp: HyperParameters, family: str) -> Way:
    """The next call's, on a GPU of `family`. Never waits."""
    if threshold_of(hp, x.shape[1]) is None:
        return Way(dense=True)
    if not _varies(x):
        return Way()
    # s, k, a and b may follow a schedule: a kind of its own for every value would never see its count arrive
    kind = x.device, x.shape[1], w.shape[0], hp.filter_eps
    watch, may_int8 = _watches.get(kind), screens_int8(hp, x.shape[1], family)
    if _capturing(x):
        return Way() if watch is None else watch.settle(may_int8)
    if watch is None:
        with _making:
            if kind not in _watches:
                if len(_watches) == KINDS:
                    return Way()
                _watches[kind] = Watch(_host_counts())
            watch = _watches[kind]
    return watch.choose(may_int8)


def learn(way: Way, counts: Tensor, pairs: int) -> None:
    """Sends the counts of a call of so many pairs, `[2]` on its device, on their way to the host."""
    if way.watch is not None:
        with torch.cuda.device_of(counts):
            way.watch.send(counts, pairs, way)
