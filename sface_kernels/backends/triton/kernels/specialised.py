"""The screen of `screen.py` with specialised warps, for sm_90, in Gluon: the same sums, lists and results, to the bit.

One warp loads (TMA): the block's unit rows of x, once, then those of the classes, in a ring of steps. Two groups of
eight warps take turns at the tensor cores, each with stripes and lists of its own: the epilogue of one runs under the
product of the other. Two programs of `screen.py` on a multiprocessor are to do that too, but nothing sets them apart:
both wait for products, then both for sums. What is computed is explained there.

Imported where it is launched alone: Triton's interpreter has no Gluon, and versions differ (`tiles.SPECIALISED`).
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from . import math
from . import screen as plain
from .math import IGNORED

inter_weight_below, load_sums = (GluonJITFunction(f.fn) for f in (math.inter_weight_below, math.load_sums))
tag_margin, most_moved = GluonJITFunction(plain.tag_margin.fn), GluonJITFunction(plain.most_moved.fn)
lane_sums, add_tile = GluonJITFunction(plain.lane_sums.fn), GluonJITFunction(plain.add_tile.fn)
others, store_lanes = GluonJITFunction(plain.others.fn), GluonJITFunction(plain.store_lanes.fn)
candidate_bits = GluonJITFunction(plain.candidate_bits.fn)
append_candidates = GluonJITFunction(plain.append_candidates.fn)
cumsum = GluonJITFunction(tl.cumsum.fn)
WARPS: gl.constexpr = gl.constexpr(8)  # of a group
# of a thread that computes and of one that loads: 512 and 128 threads share 61,440
REGISTERS, LOADER_REGISTERS = gl.constexpr(112), gl.constexpr(24)
LANES: gl.constexpr = gl.constexpr(4)
RUN: gl.constexpr = gl.constexpr(2)


@gluon.jit
def either(a, b):
    return a | b


@gluon.jit
def load(
    unit_x, unit_w, x_rows, w_rows, x_here, full, empty, first_row, first_stripe, tiles, stripes,
    BLOCK_C: gl.constexpr, BLOCK_K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """All of x, then step by step the tiles of both groups' stripes in turn, as far as there is room in the ring."""
    mbarrier.expect(x_here.index(0), STEPS * unit_x.block_type.nbytes)
    for k in gl.static_range(STEPS):
        tma.async_copy_global_to_shared(unit_x, [first_row, k * BLOCK_K], x_here.index(0), x_rows.index(k))
    groups = min(2, stripes - first_stripe)
    step = 0
    for first in range(first_stripe, tiles, stripes):
        for tile in range(first, min(first + groups, tiles)):
            for k in gl.static_range(STEPS):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
                mbarrier.expect(full.index(slot), unit_w.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    unit_w, [tile * BLOCK_C, k * BLOCK_K], full.index(slot), w_rows.index(slot)
                )
                step += 1


@gluon.jit
def compute(
    x_rows, w_rows, w_steps, x_here, full, empty, turn, step_x_ptr, moved_x_ptr, step_w_ptr, moved_w_ptr, target_ptr,
    sums_ptr, best_class_ptr, count_ptr, links_ptr, list_cos_ptr, n, c, padded_n, first_row, first_stripe, first_class,
    tiles, stripes, capacity, begun, threshold, k_inter, b,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_C: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    ROWS: gl.constexpr, INT8: gl.constexpr,
):  # fmt: skip
    """A group's products and sums. Where the number of stripes is odd, the last program's second group has none."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_C, 32 if INT8 else 16]
    )
    RUNS: gl.constexpr = BLOCK_C // (LANES * RUN)
    zeros = gl.full([BLOCK_N, BLOCK_C], 0, gl.int32 if INT8 else gl.float32, mma)
    tile_layout: gl.constexpr = zeros.to(gl.float32).reshape(BLOCK_N, RUNS, LANES, RUN).type.layout
    lanes: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(1, tile_layout))
    of_rows: gl.constexpr = gl.SliceLayout(1, lanes)
    of_runs: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, tile_layout))
    in_order: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])  # what a sum along it can be made of
    in_order_of_rows: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [WARPS, 1], [1, 0])
    run = gl.arange(0, RUNS, layout=gl.SliceLayout(1, of_runs)).expand_dims(1) * (LANES * RUN)
    column = (run + gl.arange(0, RUN, layout=gl.SliceLayout(0, of_runs)).expand_dims(0)).expand_dims(1).expand_dims(0)
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, lanes))
    first_column = (RUN * lane).expand_dims(0)  # [1, LANES]

    stripe = first_stripe + GROUP
    begun = gl.where(stripe < stripes, begun, 0)
    row = gl.arange(0, BLOCK_N, layout=of_rows)
    i = first_row.to(gl.int64) + row
    target = gl.load(target_ptr + i, mask=i < n, other=IGNORED).to(gl.int32)
    at = stripe.to(gl.int64) * padded_n + i
    plane = padded_n.to(gl.int64) * stripes
    in_lane = at.expand_dims(1) + gl.full([1, LANES], 0, gl.int64, lanes)
    later = (i < begun).expand_dims(1) & (lane == 0).expand_dims(0)
    inter, dropped, cos_sum, best, best_class = load_sums(sums_ptr, best_class_ptr, in_lane, plane, later)
    count = gl.load(count_ptr + at, mask=i < begun, other=0)
    if INT8:
        x_moved = most_moved(moved_x_ptr, first_row, BLOCK_N, ROWS)
        x_step = gl.load(step_x_ptr + first_row + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))).expand_dims(1)
    # which of the stripe's tiles have own classes: a bit of each, the last for all that are further on
    own_tile = (target - first_class) // BLOCK_C - stripe
    own_bit = gl.full([BLOCK_N], 1, gl.int64, of_rows) << gl.minimum(own_tile // stripes, 63).to(gl.int64)
    of_stripe = (target >= first_class) & (own_tile >= 0) & (own_tile % stripes == 0)
    owned = gl.reduce(gl.where(of_stripe, own_bit, 0), 0, either)

    both = first_stripe + 1 < stripes
    step = GROUP * STEPS
    parity = 1 - GROUP  # the first turn is the first group's
    mbarrier.wait(x_here.index(0), 0)
    for tile in range(stripe, gl.where(stripe < stripes, tiles, 0), stripes):
        first = tile * BLOCK_C
        if INT8:
            a_step = gl.load(step_w_ptr + first + gl.arange(0, BLOCK_C, layout=in_order))
            w_moved = most_moved(moved_w_ptr, first, BLOCK_C, ROWS)
        product = zeros
        mbarrier.wait(turn.index(GROUP), parity, pred=both)
        parity ^= 1
        for k in gl.static_range(STEPS):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            product = warpgroup_mma(
                x_rows.index(k), w_rows.index(slot).permute((1, 0)), product, use_acc=k > 0, is_async=True
            )
            if k > 0:
                product = warpgroup_mma_wait(1, deps=[product])
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            step += 1
        mbarrier.arrive(turn.index(1 - GROUP), count=1)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        step += gl.where(both, STEPS, 0)  # the other group's

        reach = threshold
        if INT8:
            reach = threshold - (x_moved + w_moved * (1.0 + x_moved))
            w_steps.index(GROUP).store(a_step)
            w_step = w_steps.index(GROUP).load(gl.SliceLayout(0, mma)).expand_dims(0)
            product = product.to(gl.float32) * x_step * w_step
        cos = product.reshape(BLOCK_N, RUNS, LANES, RUN)
        cos_sum += lane_sums(cos)

        first += first_class
        if ((owned & 1) != 0) | (first + BLOCK_C > c):
            cos = others(cos, column, (target - first).expand_dims(1) - first_column, c - first - first_column)
        owned = gl.where(gl.to_tensor(tile // stripes >= 63), owned, (owned >> 1) & 0x7FFFFFFFFFFFFFFF)

        lane_class = first + first_column
        nearest, inter, dropped, best, best_class = add_tile(
            cos, reach, column, lane_class, inter, dropped, best, best_class, k_inter, b, BLOCK_C
        )

        if not (gl.max(gl.max(nearest, 1), 0) < reach - tag_margin(BLOCK_C)):
            room = BLOCK_N * capacity
            own_list = ((first_row // BLOCK_N).to(gl.int64) * stripes + stripe) * room
            words, found = candidate_bits(cos, reach, target != IGNORED, column, RUN, INT8)
            to_row = gl.convert_layout(cumsum(gl.convert_layout(gl.sum(found, 1), in_order), 0), of_rows)
            to_lane = gl.convert_layout(cumsum(gl.convert_layout(found, in_order_of_rows), 1), lanes)
            count = append_candidates(
                words, found, to_row, to_lane, gl.max(gl.max(found, 1), 0), row, count, lane_class,
                links_ptr + own_list, list_cos_ptr + own_list, room, RUN,
            )  # fmt: skip
            taken = found.to(gl.float32) * inter_weight_below(reach, k_inter, b)
            inter -= taken * reach
            dropped -= taken

    if stripe < stripes:
        store_lanes(sums_ptr, best_class_ptr, count_ptr, at, plane, inter, dropped, cos_sum, best, best_class, count)


@gluon.jit(do_not_specialize=["n", "row_blocks", "tiles", "stripes", "capacity", "begun"])
def screen(
    # the arguments of `screen.screen`, with Gluon's descriptors
    unit_x, unit_w, step_x_ptr, moved_x_ptr, step_w_ptr, moved_w_ptr, target_ptr, sums_ptr, best_class_ptr, count_ptr,
    links_ptr, list_cos_ptr, n, c, padded_n, row_blocks, first_class, tiles, stripes, capacity, begun, threshold,
    k_inter, b,
    # compile time
    BLOCK_N: gl.constexpr,
    BLOCK_C: gl.constexpr,
    BLOCK_K: gl.constexpr,
    PADDED_D: gl.constexpr,
    ROWS: gl.constexpr,
    INT8: gl.constexpr,
    RING: gl.constexpr,  # steps of classes in shared memory
):  # fmt: skip
    STEPS: gl.constexpr = PADDED_D // BLOCK_K
    pid = gl.program_id(0)
    first_stripe = pid // row_blocks * 2
    first_row = (pid % row_blocks) * BLOCK_N
    x_rows = gl.allocate_shared_memory(unit_x.dtype, [STEPS, BLOCK_N, BLOCK_K], unit_x.layout)
    w_rows = gl.allocate_shared_memory(unit_w.dtype, [RING, BLOCK_C, BLOCK_K], unit_w.layout)
    w_steps = gl.allocate_shared_memory(gl.float32, [2, BLOCK_C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    x_here = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(x_here.index(0), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turn.index(group), count=1)
    for slot in gl.static_range(RING):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    gl.warp_specialize(
        [
            (compute, (
                x_rows, w_rows, w_steps, x_here, full, empty, turn, step_x_ptr, moved_x_ptr, step_w_ptr, moved_w_ptr,
                target_ptr, sums_ptr, best_class_ptr, count_ptr, links_ptr, list_cos_ptr, n, c, padded_n, first_row,
                first_stripe, first_class, tiles, stripes, capacity, begun, threshold, k_inter, b,
                0, BLOCK_N, BLOCK_C, STEPS, RING, ROWS, INT8,
            )),
            (compute, (
                x_rows, w_rows, w_steps, x_here, full, empty, turn, step_x_ptr, moved_x_ptr, step_w_ptr, moved_w_ptr,
                target_ptr, sums_ptr, best_class_ptr, count_ptr, links_ptr, list_cos_ptr, n, c, padded_n, first_row,
                first_stripe, first_class, tiles, stripes, capacity, begun, threshold, k_inter, b,
                1, BLOCK_N, BLOCK_C, STEPS, RING, ROWS, INT8,
            )),
            (load, (
                unit_x, unit_w, x_rows, w_rows, x_here, full, empty, first_row, first_stripe, tiles, stripes,
                BLOCK_C, BLOCK_K, STEPS, RING,
            )),
        ],
        [WARPS, 1],
        [REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
