"""Every sample's candidates brought together, from the lists of the screen's programs, each of a block of samples.

Lists are a block's and not a sample's, as samples differ: of trained ones some have ten times as many candidates as
most, but blocks of 128 have much the same. A sample for one of whose candidates a list had no room gets none at all.
Reads and writes 12 bytes a candidate.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A candidate's tag: its row in the block of samples above so many bits, below them its rank among the row's.
RANK_BITS: tl.constexpr = tl.constexpr(24)
RANK: tl.constexpr = tl.constexpr((1 << 24) - 1)
LOST: tl.constexpr = tl.constexpr(1 << 30)  # in a count of candidates: the list had no room for all of them
COUNT: tl.constexpr = tl.constexpr((1 << 30) - 1)  # the count itself
PARTS: tl.constexpr = tl.constexpr(16)  # stripes whose counts are added up at once
ENTRIES: tl.constexpr = tl.constexpr(1024)


@triton.jit(do_not_specialize=["padded_n", "row_blocks", "stripes", "capacity"])
def regroup(
    # pointers
    count_ptr,  # [stripes, padded N], of `screen`
    links_ptr,  # [row blocks, stripes, BLOCK_N·capacity], of `screen`: classes
    list_cos_ptr,  # the same: tags
    list_sample_ptr,  # [row blocks, stripes·BLOCK_N·capacity] out: classes, sample by sample
    begin_ptr,  # [stripes, padded N] int32 out: where they begin, also of each stripe; −1 of samples that lost some
    # sizes
    padded_n,
    row_blocks,
    stripes,
    capacity,
    # compile time
    BLOCK_N: tl.constexpr,  # of `screen`
):
    pid = tl.program_id(0)
    block, stripe = (pid % row_blocks).to(tl.int64), pid // row_blocks
    i = block * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.int32)
    earlier = tl.zeros([BLOCK_N], tl.int32)
    own = tl.zeros([BLOCK_N], tl.int32)
    most = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, stripes, PARTS):
        part = first + tl.arange(0, PARTS)
        at = count_ptr + part.to(tl.int64)[:, None] * padded_n + i[None, :]
        marked = tl.load(at, mask=(part < stripes)[:, None], other=0)  # [PARTS, BLOCK_N]
        most = tl.maximum(most, tl.max(marked, 0))
        counts = marked & COUNT
        total += tl.sum(counts, 0)
        earlier += tl.sum(tl.where((part < stripe)[:, None], counts, 0), 0)
        own += tl.sum(tl.where((part == stripe)[:, None], counts, 0), 0)
    lost = most >= LOST
    total = tl.where(lost, 0, total)
    room = BLOCK_N * capacity
    begin = (block * stripes * room).to(tl.int32) + tl.cumsum(total, 0) - total + earlier
    begins = begin_ptr + stripe.to(tl.int64) * padded_n + block * BLOCK_N
    tl.store(begins + tl.arange(0, BLOCK_N), tl.where(lost, -1, begin))
    tl.debug_barrier()  # they are read below
    own_list = (block * stripes + stripe) * room
    used = tl.minimum(tl.sum(own, 0), room)
    for first in range(0, used, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        exists = entry < used
        cls = tl.load(links_ptr + own_list + entry, mask=exists, other=0)
        tag = tl.load(list_cos_ptr + own_list + entry, mask=exists, other=0.0).to(tl.int32, bitcast=True)
        to = tl.load(begins + (tag >> RANK_BITS), mask=exists, other=-1)
        tl.store(list_sample_ptr + to + (tag & RANK), cls, mask=to >= 0)
