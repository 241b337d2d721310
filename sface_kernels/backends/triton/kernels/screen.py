"""The screened pass over a chunk of classes: the loss of every pair, and the list of those that may be active.

Per tile one tensor-core product of unit rows, in fp16 or int8. Its epilogue sums, per row, the loss (5) and the dropped
mass of every pair below the threshold, and the cosines, keeps the nearest class, and lists the rest: the row's
candidates, which `regroup` then brings together. To the sums each of them adds what a pair at the threshold does, which
is taken off again.
Reads the chunk's unit rows once per block of samples (from the L2 cache); cosines exist in registers only.

A program owns a block of samples and every `stripes`-th tile of classes, chunk after chunk: its sums and its list have
one writer, so there are no atomics and the result does not depend on scheduling.

The columns of a tile are cut into four *lanes*, in runs of `RUN` columns that take turns. With the run that fits the
layout of the GPU's products a thread holds all of a lane's columns in its rows: what is summed by lane needs no
exchange between threads, and lanes are added up once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import IGNORED, NO_CLASS, NO_COSINE, cosine_tile, inter_weight_below, load_sums, sums_with_one_trip
from .regroup import COUNT, LOST, RANK_BITS

# Shares of a tile's columns that are summed apart; 128 columns have as many in each as a word has bits.
LANES: tl.constexpr = tl.constexpr(4)


@triton.jit
def lane_sums(tile):
    """Of a tile by lane, `[BLOCK_N, LANES]`."""
    return tl.sum(tl.sum(tile, 1), 2)


@triton.jit
def lane_columns(BLOCK_C: tl.constexpr, RUN: tl.constexpr):
    """Columns of a tile by lane `[1, runs, 1, RUN]`, counted from the first column of each lane `[1, LANES]`."""
    run = tl.arange(0, BLOCK_C // (LANES * RUN)) * (LANES * RUN)
    column = (run[:, None] + tl.arange(0, RUN)[None, :])[None, :, None, :]
    return column, (RUN * tl.arange(0, LANES))[None, :]


@triton.jit
def count_bits(word):
    """Set bits of each uint32."""
    v = word - ((word >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v += v >> 8
    return ((v + (v >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def by_tile(lanes):
    """`[N, LANES]` as `[N, 1, LANES, 1]`."""
    return lanes.expand_dims(2).expand_dims(1)


@triton.jit
def others(cos, column, own, past):
    """`cos` by lane, NO_COSINE in a row's column `own` and from `past` on, both `[N or 1, LANES]`."""
    return tl.where((column != by_tile(own)) & (column < by_tile(past)), cos, NO_COSINE)


@triton.jit
def nearest_column(cos, column, BLOCK_C: tl.constexpr):
    """The largest of each lane of `cos` by lane, its `column` as its low bits."""
    # num_programs(1) is 1: as a register this mask and the column, a constant, go into one instruction
    kept = -BLOCK_C * tl.num_programs(1)
    tagged = (cos.to(tl.int32, bitcast=True) & kept) | column
    return tl.max(tl.max(tagged.to(tl.float32, bitcast=True), 1), 2)


@triton.jit
def add_tile(
    cos, reach, column, first_class, inter, dropped, best, best_class, k_inter, b, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Adds a tile to a program's sums by lane, whose first columns are the classes `first_class` `[1, LANES]`; returns
    its `nearest_column` too."""
    nearest = nearest_column(cos, column, BLOCK_C)  # [BLOCK_N, LANES]
    tag = nearest.to(tl.int32, bitcast=True) & (BLOCK_C - 1)
    best_class = tl.where(nearest > best, first_class + tag, best_class)

    below = tl.minimum(cos, reach)
    weight = inter_weight_below(below, k_inter, b)
    inter += lane_sums(weight * below)
    dropped += lane_sums(weight)
    return nearest, inter, dropped, tl.maximum(nearest, best), best_class


@triton.jit
def tag_margin(BLOCK_C: tl.constexpr):
    """The most that a tag of a column takes from a cosine: its low bits are worth at most 2⁻²³ each."""
    return BLOCK_C * 1.1920928955078125e-07


@triton.jit
def candidate_bits(cos, reach, counted, column, RUN: tl.constexpr, INT8: tl.constexpr):
    """Which columns of `cos` by lane come up to `reach`, as bits of a word `[BLOCK_N, LANES]`, and how many.

    Of rows that are not `counted` `[BLOCK_N]` none: their cosines are 0, and with INT8 `reach` may be less.
    """
    bit = (column * 0 + 1).to(tl.uint32) << (column // (LANES * RUN) * RUN + column % RUN).to(tl.uint32)
    words = lane_sums(tl.where(cos >= reach, bit, 0).to(tl.uint32)).to(tl.uint32)
    if INT8:
        words = tl.where(counted.expand_dims(1), words, 0)
    return words, count_bits(words)


@triton.jit
def append_candidates(
    words, found, to_row, to_lane, passes, row, count, first_class, class_ptr, tag_ptr, room, RUN: tl.constexpr
):  # fmt: skip
    """Appends the candidates of a tile to a list, row by row: classes, tags beside them.

    `to_row` and `to_lane` are how many the tile has up to each `row` `[BLOCK_N]`, and the row up to each lane. `count`
    is how many of each row there have been. Returns the new counts, which go on past the list's `room` and are marked
    LOST where one of the row's found none. A pass takes one bit of every word.
    """
    new = tl.sum(found, 1)  # [BLOCK_N]
    rank = count & COUNT
    end = tl.sum(rank, 0) + to_row
    in_row = to_lane - found  # of the lane's first
    place = (end - new).expand_dims(1) + in_row
    tag = ((row << RANK_BITS) + rank).expand_dims(1) + in_row
    for _ in range(0, passes):
        lowest = words & (words ^ (words - 1))
        number = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        cls = first_class + ((number & -RUN) * LANES | (number & (RUN - 1)))
        stored = (words != 0) & (place.to(tl.uint32) < room)  # counts past 2³¹ are below 0
        tl.store(class_ptr + place, cls, mask=stored)
        tl.store(tag_ptr + place, tag.to(tl.float32, bitcast=True), mask=stored)
        place += 1
        tag += 1
        words = words & (words - 1)
    return (count + new) | tl.where((new > 0) & (end > room), LOST, 0)


@triton.jit
def store_lanes(sums_ptr, best_class_ptr, count_ptr, at, plane, inter, dropped, cos_sum, best, best_class, count):
    """For `load_sums`, what is summed by lane; each sum is stored before the next is made, as registers are scarce."""
    nearest = tl.max(best, 1)  # [BLOCK_N]
    tl.store(sums_ptr + at, tl.sum(inter, 1))
    tl.store(sums_ptr + plane + at, tl.sum(dropped, 1))
    tl.store(sums_ptr + 2 * plane + at, tl.sum(cos_sum, 1))
    tl.store(sums_ptr + 3 * plane + at, nearest)
    tl.store(best_class_ptr + at, tl.min(tl.where(best == nearest.expand_dims(1), best_class, NO_CLASS), 1))
    tl.store(count_ptr + at, count)


@triton.jit
def most_moved(moved_ptr, first, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """How far rounding to int8 moved `COUNT` rows from `first` on at most, as `prepare` says it of every `ROWS`."""
    most = tl.load(moved_ptr + first // ROWS)
    for part in tl.static_range(1, COUNT // ROWS):
        most = tl.maximum(most, tl.load(moved_ptr + first // ROWS + part))
    return most


@triton.jit(do_not_specialize=["n", "row_blocks", "tiles", "stripes", "capacity", "begun"])
def screen(
    # pointers
    unit_x,  # [padded N, PADDED_D] fp16 or int8
    unit_w,  # [padded chunk, PADDED_D] of the same
    step_x_ptr,  # with int8 [padded N], the step of each row
    moved_x_ptr,  # with int8, the most that rounding moved one of every ROWS rows
    step_w_ptr,  # [padded chunk], the same of unit_w
    moved_w_ptr,
    target_ptr,  # [N] int64
    sums_ptr,  # [4, stripes, padded N]: Σ weight·cosine, Σ weight, Σ cosine, the largest cosine with its column
    best_class_ptr,  # [stripes, padded N] int32
    count_ptr,  # [stripes, padded N] int32 candidates, also those that found no room; with LOST where there are such
    links_ptr,  # [row blocks, stripes, BLOCK_N·capacity] int32: each program's candidates, their classes
    list_cos_ptr,  # as links_ptr, in its bits: which row of the block, and the how manieth of that row
    # sizes, floats
    n,
    c,
    padded_n,
    row_blocks,
    first_class,
    tiles,
    stripes,
    capacity,
    begun,  # samples whose sums an earlier chunk began: 0, or padded N
    threshold,  # of the screened cosine, above 0; with int8 what rounding moved comes off it
    k_inter,
    b,
    # compile time
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_D: tl.constexpr,
    RUN: tl.constexpr,
    ROWS: tl.constexpr,  # that a program of `prepare` takes
    TMA: tl.constexpr,  # unit rows are given by descriptors, else by pointers
    INT8: tl.constexpr,  # unit rows are int8, else fp16
):
    pid = tl.program_id(0)
    stripe = (pid // row_blocks).to(tl.int64)
    first_row = (pid % row_blocks) * BLOCK_N
    i = first_row.to(tl.int64) + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_C)
    lane_column, first_column = lane_columns(BLOCK_C, RUN)
    target = tl.load(target_ptr + i, mask=i < n, other=IGNORED).to(tl.int32)

    at = stripe * padded_n + i  # [BLOCK_N], the program's slot in the sums
    plane = padded_n.to(tl.int64) * stripes
    # what an earlier chunk began goes on in the first lane
    in_lane = at[:, None] + tl.zeros([1, LANES], tl.int64)
    later = (i < begun)[:, None] & (tl.arange(0, LANES) == 0)[None, :]  # [BLOCK_N, LANES]
    inter, dropped, cos_sum, best, best_class = load_sums(sums_ptr, best_class_ptr, in_lane, plane, later)
    count = tl.load(count_ptr + at, mask=i < begun, other=0)

    if INT8:
        x_moved = most_moved(moved_x_ptr, first_row, BLOCK_N, ROWS)

    for tile in range(pid // row_blocks, tiles, stripes):
        first = tile * BLOCK_C  # of the chunk
        tile_product = cosine_tile(
            unit_x, unit_w, first_row, first, BLOCK_N, BLOCK_C, BLOCK_K, PADDED_D, False, INT8, TMA
        )
        reach = threshold
        if INT8:
            w_moved = most_moved(moved_w_ptr, first, BLOCK_C, ROWS)
            reach = threshold - (x_moved + w_moved * (1.0 + x_moved))
            x_step = tl.load(step_x_ptr + first_row + tl.arange(0, BLOCK_N))  # here, as registers are scarce
            w_step = tl.load(step_w_ptr + first + column)
            tile_product = tile_product.to(tl.float32) * x_step[:, None] * w_step[None, :]
        cos = tile_product.reshape(BLOCK_N, BLOCK_C // (LANES * RUN), LANES, RUN)
        cos_sum += lane_sums(cos)

        first += first_class
        own = target - first  # [BLOCK_N], the own class as a column
        owned = tl.max(((own >= 0) & (own < BLOCK_C)).to(tl.int32), 0)
        if (owned > 0) | (first + BLOCK_C > c):
            cos = others(cos, lane_column, own[:, None] - first_column, c - first - first_column)
        lane_class = first + first_column
        nearest, inter, dropped, best, best_class = add_tile(
            cos, reach, lane_column, lane_class, inter, dropped, best, best_class, k_inter, b, BLOCK_C
        )

        # not `>=`: a NaN, which some interpreters' max keeps, must not hide the candidates of other rows
        if not (tl.max(sums_with_one_trip(tl.max(nearest, 1)), 0) < reach - tag_margin(BLOCK_C)):
            room = BLOCK_N * capacity
            own_list = ((pid % row_blocks).to(tl.int64) * stripes + stripe) * room
            words, found = candidate_bits(cos, reach, target != IGNORED, lane_column, RUN, INT8)
            passes = tl.max(sums_with_one_trip(tl.max(found, 1)), 0)
            count = append_candidates(
                words, found, tl.cumsum(tl.sum(found, 1), 0), tl.cumsum(found, 1), passes, tl.arange(0, BLOCK_N), count,
                lane_class, links_ptr + own_list, list_cos_ptr + own_list, room, RUN,
            )  # fmt: skip
            taken = found.to(tl.float32) * inter_weight_below(reach, k_inter, b)
            inter -= taken * reach
            dropped -= taken

    store_lanes(sums_ptr, best_class_ptr, count_ptr, at, plane, inter, dropped, cos_sum, best, best_class, count)
