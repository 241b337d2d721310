"""The forward as a sequence of launches: samples, then classes by one of two ways, then every sample's results.

With lists: the screen in chunks of classes, and the samples whose list overflowed. Dense: coefficients and their
product with the unit rows, in chunks. Which of the two is the caller's to say; nothing waits for a count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import IGNORED, Forward, HyperParameters
from . import buffers, tiles
from .buffers import FLAGS, Saved, cdiv
from .kernels.dense import row_coefficients, row_gradient
from .kernels.finish import finish_samples
from .kernels.overflow import overflow_samples
from .kernels.prepare import prepare_classes, prepare_samples
from .kernels.screen import screen
from .launch import Call, block_parts, launch
from .plan import make_rules
from .tiles import GRANULE

SUM_PLANES = 4  # per sample: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine


class ExactSums(NamedTuple):
    """Sums per part of the classes and sample, of computed pairs: those of overflowed samples, or of a dense call."""

    sums: Tensor  # [SUM_PLANES, parts, padded N]
    best_class: Tensor  # [parts, padded N] int32, of the largest cosine
    active: Tensor  # [parts, padded N] int32
    grad: Tensor  # [grad parts, padded N, D], Σ weight·ŵ


def _exact_sums(call: Call, parts: int, grad_parts: int) -> ExactSums:
    return ExactSums(
        sums=call.empty(SUM_PLANES, parts, call.padded_n),
        best_class=call.empty(parts, call.padded_n, dtype=torch.int32),
        active=call.empty(parts, call.padded_n, dtype=torch.int32),
        grad=call.empty(grad_parts, call.padded_n, call.d),
    )


def prepare_rows(call: Call, norm: Tensor, overflowed: Tensor, flags: Tensor) -> Tensor:
    """The samples' unit rows `[padded N, padded D]`; fills `norm`, and sets `overflowed` and `flags` to their start."""
    unit = call.unit_rows(call.padded_n)
    rows = min(call.padded_n, call.row_block)
    launch(
        prepare_samples,
        (cdiv(call.padded_n, rows),),
        **call.x,
        **call.target,
        d=call.d,
        unit_ptr=unit,
        norm_ptr=norm,
        overflowed_ptr=overflowed,
        flags_ptr=flags,
        all_exact=int(call.dense),
        BLOCK_N=rows,
        BLOCK_D=call.block_d,
        PADDED_D=call.padded_d,
        FLAGS=FLAGS,
        num_warps=tiles.ROW_WARPS,
    )
    return unit


def preparing(call: Call, unit: Tensor, inv_norm: Tensor, flags: Tensor) -> dict[str, Any]:
    """Arguments of `prepare_classes` but the chunk's first class."""
    return {
        **call.w,
        "unit_ptr": unit,
        "inv_norm_ptr": inv_norm,
        "flags_ptr": flags,
        "c": call.c,
        "d": call.d,
        "BLOCK_C": call.row_block,
        "BLOCK_D": call.block_d,
        "PADDED_D": call.padded_d,
        "num_warps": tiles.ROW_WARPS,
    }


def prepare_chunk(call: Call, arguments: dict[str, Any], first: int, rows: int) -> None:
    """Unit rows and inverse norms of `rows` classes from `first` on."""
    launch(prepare_classes, (cdiv(rows, call.row_block),), **arguments, first_class=first)


def dense_granules(call: Call) -> int:
    """How many granules of classes a chunk of a dense call may have."""
    bytes_of_a_class = (call.padded_d + call.padded_n) * call.unit_dtype.itemsize
    return max(1, buffers.CHUNK_BYTES // (bytes_of_a_class * GRANULE))


def dense_chunk(call: Call, stripes: int) -> int:
    """Classes in a chunk of a dense call: whole rounds of `stripes` granules."""
    rounds = max(1, dense_granules(call) // stripes)
    return min(rounds * stripes, cdiv(call.c, GRANULE)) * GRANULE


def _screen(
    call: Call, unit: Tensor, saved: Saved, threshold: float, cheap: bool, stripes: int, capacity: int
) -> dict[str, Tensor]:
    """Every class past every sample; the sums and lists, under the names that `finish_samples` knows them by."""
    made = {
        "sums_ptr": call.empty(SUM_PLANES, stripes, call.padded_n),
        "best_class_ptr": call.empty(stripes, call.padded_n, dtype=torch.int32),
        "count_ptr": saved.list_counts,
        "list_ptr": saved.list_classes,
    }
    name = "screen" if cheap else "screen_full"
    block_c, row_blocks = call.tile(name).block_c, call.row_blocks(name)
    rounds = max(1, buffers.CHUNK_BYTES // (2 * call.padded_d * GRANULE * stripes))
    chunk = min(rounds * stripes, cdiv(call.c, GRANULE)) * GRANULE
    unit_w = call.unit_rows(chunk)
    prepared = preparing(call, unit_w, saved.inv_norm, saved.flags)
    screened = {
        **made,
        **call.target,
        "unit_x_ptr": unit,
        "unit_w_ptr": unit_w,
        "norm_ptr": saved.norm,
        "overflowed_ptr": saved.overflowed,
        "flags_ptr": saved.flags,
        "c": call.c,
        "padded_n": call.padded_n,
        "row_blocks": row_blocks,
        "stripes": stripes,
        "capacity": capacity,
        "threshold": threshold,
        "k_inter": call.hp.k_inter,
        "b": call.hp.b,
        "PADDED_D": call.padded_d,
        "CHEAP": cheap,
        **call.product(name),
    }
    for first, rows in call.chunks(chunk):
        prepare_chunk(call, prepared, first, rows)
        begun = 0 if first == 0 else call.padded_n
        launch(
            screen,
            (row_blocks * stripes,),
            **screened,
            first_class=first,
            tiles=cdiv(rows, block_c),
            begun=begun,
        )
    return made


def _overflow(call: Call, saved: Saved, need_grad: bool, multiprocessors: int) -> ExactSums:
    t, row_blocks = call.tile("overflow_samples"), call.row_blocks("overflow_samples")
    # three TF32 products for one keep two parts of each operand
    block_d = min(call.block_d, tiles.GRADIENT_FEATURES // (1 if call.precision == "half" else 2))
    d_blocks = cdiv(call.d, block_d)
    in_memory = buffers.PARTIAL_BYTES // (4 * call.padded_n * call.d)
    parts = buffers.shares(row_blocks * d_blocks, min(max(2, in_memory), cdiv(call.c, t.block_c)), multiprocessors)
    exact = _exact_sums(call, parts, parts if need_grad else 0)
    launch(
        overflow_samples,
        (row_blocks * parts, d_blocks if need_grad else 1),
        **call.rows,
        **call.inter,
        norm_ptr=saved.norm,
        inv_norm_ptr=saved.inv_norm,
        overflowed_ptr=saved.overflowed,
        sums_ptr=exact.sums,
        best_class_ptr=exact.best_class,
        active_ptr=exact.active,
        grad_ptr=exact.grad,
        c=call.c,
        row_blocks=row_blocks,
        splits=parts,
        BLOCK_D=block_d,
        NEED_GRAD=need_grad,
        PRECISION=call.precision,
        **call.product("overflow_samples"),
    )
    return exact


def _dense(call: Call, unit: Tensor, saved: Saved, need_grad: bool, multiprocessors: int) -> ExactSums:
    coefficients_of, gradient_of = call.tile("row_coefficients"), call.tile("row_gradient")
    row_blocks, gradient_blocks = call.row_blocks("row_coefficients"), call.row_blocks("row_gradient")
    granules = cdiv(call.c, GRANULE)
    stripes = buffers.shares(row_blocks, min(granules, dense_granules(call)), multiprocessors)
    d_blocks = cdiv(call.d, gradient_of.block_c)
    in_memory = buffers.PARTIAL_BYTES // (4 * call.padded_n * call.d)
    splits = buffers.shares(gradient_blocks * d_blocks, min(max(2, in_memory), granules), multiprocessors)
    exact = _exact_sums(call, stripes, splits if need_grad else 0)
    chunk = dense_chunk(call, stripes)
    unit_w = call.unit_rows(chunk)
    prepared = preparing(call, unit_w, saved.inv_norm, saved.flags)
    shared = {
        "unit_w_ptr": unit_w,
        "coefficient_ptr": call.empty(call.padded_n if need_grad else 0, chunk, dtype=call.unit_dtype),
        "padded_n": call.padded_n,
        "padded_chunk": chunk,
        "PADDED_D": call.padded_d,
        "PRECISION": call.precision,
    }
    weighed = {
        **shared,
        **call.target,
        **call.inter,
        "unit_x_ptr": unit,
        "sums_ptr": exact.sums,
        "best_class_ptr": exact.best_class,
        "active_ptr": exact.active,
        "c": call.c,
        "row_blocks": row_blocks,
        "stripes": stripes,
        "NEED_GRAD": need_grad,
        **call.product("row_coefficients"),
    }
    multiplied = {
        **shared,
        "grad_ptr": exact.grad,
        "d": call.d,
        "row_blocks": gradient_blocks,
        "splits": splits,
        **call.product("row_gradient"),
    }
    for first, rows in call.chunks(chunk):
        begun = 0 if first == 0 else call.padded_n
        prepare_chunk(call, prepared, first, rows)
        launch(
            row_coefficients,
            (row_blocks * stripes,),
            **weighed,
            first_class=first,
            tiles=cdiv(rows, coefficients_of.block_c),
            begun=begun,
        )
        if need_grad:
            launch(
                row_gradient,
                (gradient_blocks * splits, d_blocks),
                **multiplied,
                steps=cdiv(rows, gradient_of.block_k),
                begun=begun,
            )
    return exact


def forward(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, dense: bool, multiprocessors: int, result: Forward
) -> None:
    """Fills `result`, of `buffers.allocate` for the same call."""
    call = Call(x, w, target, hp, dense)
    saved = Saved(*result.saved)
    stripes, capacity = saved.list_classes.shape[1:]
    need_x, need_w = result.row_grad_x.shape[0] > 0, saved.list_weight.shape[0] > 0
    unit = prepare_rows(call, saved.norm, saved.overflowed, saved.flags)
    if dense:
        exact = _dense(call, unit, saved, need_x, multiprocessors)
        # not read where every sample is exact
        listed = {"count_ptr": saved.list_counts, "list_ptr": saved.list_classes}
        listed["sums_ptr"] = listed["best_class_ptr"] = saved.list_counts
    else:
        rules = make_rules(hp, call.d)
        listed = _screen(call, unit, saved, rules.threshold, rules.cheap, stripes, capacity)
        exact = _overflow(call, saved, need_x, multiprocessors)
    active = call.empty(call.n, dtype=torch.int32)
    parts = exact.sums.shape[1]
    launch(
        finish_samples,
        (call.n,),
        **call.rows,
        **call.intra,
        **call.inter,
        **listed,
        s=hp.s,
        norm_ptr=saved.norm,
        inv_norm_ptr=saved.inv_norm,
        flags_ptr=saved.flags,
        overflowed_ptr=saved.overflowed,
        list_weight_ptr=saved.list_weight,
        list_cos_ptr=saved.list_cos,
        exact_sums_ptr=exact.sums,
        exact_class_ptr=exact.best_class,
        exact_active_ptr=exact.active,
        exact_grad_ptr=exact.grad,
        row_loss_ptr=result.row_loss,
        stats_ptr=result.row_stats,
        hardest_class_ptr=result.hardest_class,
        active_ptr=active,
        row_grad_x_ptr=result.row_grad_x,
        target_weight_ptr=saved.target_weight,
        cos_target_ptr=saved.cos_target,
        stripes=stripes,
        parts=parts,
        grad_parts=exact.grad.shape[0],
        capacity=capacity,
        BLOCK_D=call.block_d,
        BLOCK_E=tiles.entries(min(tiles.FINISH_ENTRIES, call.row_block), call.family),
        BLOCK_PARTS=block_parts(stripes, parts),
        ALL_EXACT=dense,
        NEED_GRAD=need_x,
        NEED_LISTS=need_w and not dense,
        num_warps=tiles.ROW_WARPS,
    )
    exact_samples = (target != IGNORED).sum() if dense else saved.overflowed.sum()
    torch.stack([active.sum(), exact_samples.to(torch.int64) * call.c], out=result.counts)
