"""The forward as a sequence of launches: samples, then classes by one of two ways, then every sample's results.

With lists: the screen in chunks of classes, and the samples whose list overflowed. Dense: coefficients and their
product with the unit rows, in chunks. Which of the two is the caller's to say; nothing waits for a count.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ... import ops
from ...types import IGNORED, HyperParameters
from . import tiles
from .kernels.dense import row_coefficients, row_gradient
from .kernels.finish import finish_samples
from .kernels.overflow import overflow_samples
from .kernels.prepare import prepare_classes, prepare_samples
from .kernels.screen import screen
from .launch import FLAGS, GRANULE, SUM_PLANES, Call, Saved, launch
from .rules import make_rules


class Samples:
    """The samples' unit rows and norms, and the call's flags."""

    def __init__(self, call: Call, threshold: float):
        self.unit = call.unit_rows(call.padded_n)
        self.norm = call.empty(call.padded_n)
        self.threshold = call.empty(1)
        self.dense_row = call.empty(call.padded_n, dtype=torch.int32)
        self.flags = call.empty(FLAGS, dtype=torch.int32)
        rows = min(call.padded_n, call.row_block)
        launch(
            prepare_samples,
            (triton.cdiv(call.padded_n, rows),),
            **call.x,
            **call.target,
            d=call.d,
            unit_ptr=self.unit,
            norm_ptr=self.norm,
            threshold_ptr=self.threshold,
            dense_row_ptr=self.dense_row,
            flags_ptr=self.flags,
            threshold=threshold,
            BLOCK_N=rows,
            BLOCK_D=call.block_d,
            PADDED_D=call.padded_d,
            FLAGS=FLAGS,
            num_warps=tiles.ROW_WARPS,
        )


class Partials:
    """Sums per part of the classes and sample: what `finish_samples` adds up for dense samples."""

    def __init__(self, call: Call, parts: int, grad_parts: int):
        self.parts, self.grad_parts = parts, grad_parts
        self.sums = call.empty(SUM_PLANES, parts, call.padded_n)
        self.active = call.empty(parts, call.padded_n, dtype=torch.int32)
        self.grad = call.empty(grad_parts, call.padded_n, call.d)


def prepare_chunk(call: Call, unit: Tensor, inv_norm: Tensor, flags: Tensor, first: int, rows: int) -> None:
    """Unit rows and inverse norms of `rows` classes from `first` on."""
    launch(
        prepare_classes,
        (triton.cdiv(rows, call.row_block),),
        **call.w,
        unit_ptr=unit,
        inv_norm_ptr=inv_norm,
        flags_ptr=flags,
        c=call.c,
        d=call.d,
        first_class=first,
        BLOCK_C=call.row_block,
        BLOCK_D=call.block_d,
        PADDED_D=call.padded_d,
        num_warps=tiles.ROW_WARPS,
    )


def dense_granules(call: Call) -> int:
    """How many granules of classes a chunk of a dense call may have."""
    bytes_of_a_class = (call.padded_d + call.padded_n) * call.unit_dtype.itemsize
    return max(1, ops.TRITON_CHUNK_BYTES // (bytes_of_a_class * GRANULE))


def dense_chunk(call: Call, stripes: int) -> int:
    """Classes in a chunk of a dense call: whole rounds of `stripes` granules."""
    rounds = max(1, dense_granules(call) // stripes)
    return min(rounds * stripes, triton.cdiv(call.c, GRANULE)) * GRANULE


def _screen(call: Call, samples: Samples, inv_norm: Tensor, cheap: bool) -> dict[str, Tensor]:
    """Every class past every sample; the sums and lists, under the names that `finish_samples` knows them by."""
    made = {
        "sums_ptr": call.empty(SUM_PLANES, call.stripes, call.padded_n),
        "best_class_ptr": call.empty(call.stripes, call.padded_n, dtype=torch.int32),
        "count_ptr": call.empty(call.stripes, call.padded_n, dtype=torch.int32),
        "list_ptr": call.empty(call.slots, dtype=torch.int32),
    }
    name = "screen" if cheap else "screen_full"
    block_c, row_blocks = call.tile(name).block_c, call.row_blocks(name)
    rounds = max(1, ops.TRITON_CHUNK_BYTES // (2 * call.padded_d * GRANULE * call.stripes))
    chunk = min(rounds * call.stripes, triton.cdiv(call.c, GRANULE)) * GRANULE
    unit_w = call.unit_rows(chunk)
    for first, rows in call.chunks(chunk):
        prepare_chunk(call, unit_w, inv_norm, samples.flags, first, rows)
        launch(
            screen,
            (row_blocks * call.stripes,),
            **made,
            **call.target,
            unit_x_ptr=samples.unit,
            unit_w_ptr=unit_w,
            norm_ptr=samples.norm,
            threshold_ptr=samples.threshold,
            dense_row_ptr=samples.dense_row,
            flags_ptr=samples.flags,
            c=call.c,
            padded_n=call.padded_n,
            row_blocks=row_blocks,
            first_class=first,
            tiles=triton.cdiv(rows, block_c),
            stripes=call.stripes,
            capacity=call.capacity,
            first_chunk=int(first == 0),
            k_inter=call.hp.k_inter,
            b=call.hp.b,
            PADDED_D=call.padded_d,
            CHEAP=cheap,
            **call.product(name),
        )
    return made


def _overflow(call: Call, samples: Samples, inv_norm: Tensor, need_grad: bool) -> Partials:
    t, row_blocks = call.tile("overflow_samples"), call.row_blocks("overflow_samples")
    # three TF32 products for one keep two parts of each operand
    block_d = min(call.block_d, tiles.GRADIENT_FEATURES // (1 if call.precision == "half" else 2))
    d_blocks = triton.cdiv(call.d, block_d)
    in_memory = ops.TRITON_PARTIAL_BYTES // (4 * call.padded_n * call.d)
    parts = max(
        1, min(ops.TRITON_PROGRAMS // (row_blocks * d_blocks), max(2, in_memory), triton.cdiv(call.c, t.block_c))
    )
    partials = Partials(call, parts, parts if need_grad else 0)
    launch(
        overflow_samples,
        (row_blocks * parts, d_blocks if need_grad else 1),
        **call.rows,
        **call.inter,
        norm_ptr=samples.norm,
        inv_norm_ptr=inv_norm,
        dense_row_ptr=samples.dense_row,
        sums_ptr=partials.sums,
        active_ptr=partials.active,
        grad_ptr=partials.grad,
        c=call.c,
        row_blocks=row_blocks,
        splits=parts,
        BLOCK_D=block_d,
        NEED_GRAD=need_grad,
        PRECISION=call.precision,
        **call.product("overflow_samples"),
    )
    return partials


def _dense(call: Call, samples: Samples, inv_norm: Tensor, need_grad: bool) -> Partials:
    t, rows_of = call.tile("row_gradient"), call.row_blocks
    granules = triton.cdiv(call.c, GRANULE)
    stripes = max(1, min(ops.TRITON_PROGRAMS // rows_of("row_coefficients"), granules, dense_granules(call)))
    d_blocks = triton.cdiv(call.d, t.block_c)
    in_memory = ops.TRITON_PARTIAL_BYTES // (4 * call.padded_n * call.d)
    splits = max(1, min(ops.TRITON_PROGRAMS // (rows_of("row_gradient") * d_blocks), max(2, in_memory), granules))
    partials = Partials(call, stripes, splits if need_grad else 0)
    chunk = dense_chunk(call, stripes)
    unit_w = call.unit_rows(chunk)
    coefficients = call.empty(call.padded_n if need_grad else 0, chunk, dtype=call.unit_dtype)
    shared = {"unit_w_ptr": unit_w, "coefficient_ptr": coefficients, "padded_n": call.padded_n, "padded_chunk": chunk}
    for first, rows in call.chunks(chunk):
        prepare_chunk(call, unit_w, inv_norm, samples.flags, first, rows)
        launch(
            row_coefficients,
            (rows_of("row_coefficients") * stripes,),
            **shared,
            **call.target,
            **call.inter,
            unit_x_ptr=samples.unit,
            sums_ptr=partials.sums,
            active_ptr=partials.active,
            c=call.c,
            row_blocks=rows_of("row_coefficients"),
            first_class=first,
            tiles=triton.cdiv(rows, call.tile("row_coefficients").block_c),
            stripes=stripes,
            first_chunk=int(first == 0),
            PADDED_D=call.padded_d,
            NEED_GRAD=need_grad,
            PRECISION=call.precision,
            **call.product("row_coefficients"),
        )
        if need_grad:
            launch(
                row_gradient,
                (rows_of("row_gradient") * splits, d_blocks),
                **shared,
                grad_ptr=partials.grad,
                d=call.d,
                row_blocks=rows_of("row_gradient"),
                steps=triton.cdiv(rows, t.block_k),
                splits=splits,
                first_chunk=int(first == 0),
                PADDED_D=call.padded_d,
                PRECISION=call.precision,
                **call.product("row_gradient"),
            )
    return partials


def forward(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool, dense: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Saved]:
    """Row losses `[N]`, row statistics `[6, N]`, counts `[2]`, ∂l_i/∂x_i `[N, D]`, and what the backward needs."""
    call = Call(x, w, target, hp, dense)
    rules = make_rules(hp, call.d)
    samples = Samples(call, rules.threshold)
    inv_norm = call.empty(call.c)
    if dense:
        # finish_samples takes lists too: of no part and no entry
        listed = {name: call.empty(0, dtype=torch.int32) for name in ("sums_ptr", "best_class_ptr", "list_ptr")}
        listed["count_ptr"] = call.empty(0, call.padded_n, dtype=torch.int32)
        partials = _dense(call, samples, inv_norm, need_x)
    else:
        listed = _screen(call, samples, inv_norm, rules.cheap)
        partials = _overflow(call, samples, inv_norm, need_x)

    row_loss, stats = call.empty(call.n), call.empty(6, call.n)
    active = call.empty(call.n, dtype=torch.int32)
    unit_grad = call.empty(call.n if need_x else 0, call.d)
    target_weight, cos_target = call.empty(call.n), call.empty(call.n)
    list_weight, list_cos = (call.empty(call.slots if need_w else 0) for _ in range(2))
    launch(
        finish_samples,
        (call.n,),
        **call.rows,
        **call.intra,
        **call.inter,
        **listed,
        s=hp.s,
        norm_ptr=samples.norm,
        inv_norm_ptr=inv_norm,
        flags_ptr=samples.flags,
        dense_row_ptr=samples.dense_row,
        list_weight_ptr=list_weight,
        list_cos_ptr=list_cos,
        dense_sums_ptr=partials.sums,
        dense_active_ptr=partials.active,
        dense_grad_ptr=partials.grad,
        row_loss_ptr=row_loss,
        stats_ptr=stats,
        active_ptr=active,
        row_grad_x_ptr=unit_grad,
        target_weight_ptr=target_weight,
        cos_target_ptr=cos_target,
        stripes=call.stripes,
        parts=partials.parts,
        grad_parts=partials.grad_parts,
        capacity=call.capacity,
        BLOCK_D=call.block_d,
        BLOCK_E=tiles.entries(min(tiles.FINISH_ENTRIES, call.row_block), call.family),
        BLOCK_STRIPES=triton.next_power_of_2(call.stripes),
        BLOCK_PARTS=triton.next_power_of_2(partials.parts),
        ALL_ROWS=dense,
        NEED_GRAD=need_x,
        NEED_LISTS=need_w,
        num_warps=tiles.ROW_WARPS,
    )
    dense_samples = (target != IGNORED).sum() if dense else samples.dense_row.sum()
    counts = torch.stack([active.sum(), dense_samples.to(torch.int64) * call.c])
    saved = Saved(
        norm=samples.norm,
        inv_norm=inv_norm,
        dense_row=samples.dense_row,
        flags=samples.flags,
        target_weight=target_weight,
        cos_target=cos_target,
        counts=listed["count_ptr"],
        list_classes=listed["list_ptr"],
        list_weight=list_weight,
        list_cos=list_cos,
    )
    return row_loss, stats, counts, unit_grad, saved
