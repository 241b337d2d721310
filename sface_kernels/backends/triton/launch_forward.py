"""The forward as a sequence of launches: unit rows and sums over classes, in chunks, then every sample's results.

By lists the screen makes the sums, and in a dense call coefficients and their product with the unit rows. Which of the
two is the caller's to say; nothing waits for a count.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...types import Forward, HyperParameters
from . import buffers, tiles
from .buffers import Saved, cdiv
from .kernels.dense import coefficients, row_gradient
from .kernels.finish import finish_samples
from .kernels.prepare import prepare
from .kernels.screen import LANES, screen
from .launch import Call, block_parts, launch
from .plan import threshold_of
from .tiles import GRANULE

# Triton before 3.6 spills under the limit that makes room for two programs.
LIMITS_REGISTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
SUM_PLANES = 4  # per sample: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine


def makes_links(call: Call, head: Tensor) -> bool:
    """Whether the forward leaves lists for the backward; `head` has memory for one element where it does not."""
    return not call.dense and head.stride(0) == 1


class Preparation:
    """Unit rows of all samples `[padded N, …]`, and of one chunk of classes after the other `[chunk, …]`.

    The first launch fills `norm` and sets `counts` and `flags` to 0, each its classes' part of `inv_norm` and `head`.
    """

    def __init__(
        self, call: Call, chunk: int, norm: Tensor, inv_norm: Tensor, counts: Tensor, flags: Tensor, head: Tensor
    ):
        self.unit_x, self.unit_w = call.unit_rows(call.padded_n), call.unit_rows(chunk)
        self.inv_norm, self.row_block = inv_norm, call.row_block
        self.sample_blocks = cdiv(call.padded_n, call.row_block)
        self.arguments = {
            **call.x,
            **call.w,
            **call.target,
            "unit_x_ptr": self.unit_x,
            "unit_w_ptr": self.unit_w,
            "norm_ptr": norm,
            "inv_norm_ptr": inv_norm,
            "counts_ptr": counts,
            "flags_ptr": flags,
            "head_ptr": head,
            "c": call.c,
            "d": call.d,
            "padded_n": call.padded_n,
            "BLOCK": call.row_block,
            "BLOCK_D": call.block_d,
            "PADDED_D": call.padded_d,
            "PARTS": call.parts,
            "LINKS": makes_links(call, head),
            "num_warps": tiles.ROW_WARPS,
        }

    def launch(self, first: int, rows: int) -> None:
        """Unit rows and inverse norms of `rows` classes from `first` on, and with the first chunk the samples."""
        samples = self.sample_blocks if first == 0 else 0
        blocks = samples + cdiv(rows, self.row_block)
        launch(prepare, (blocks,), **self.arguments, sample_blocks=samples, first_class=first)


def dense_granules(call: Call) -> int:
    """How many granules of classes a chunk of a dense call may have."""
    bytes_of_a_class = (call.padded_d + call.padded_n) * call.parts * call.unit_dtype.itemsize
    return max(1, buffers.CHUNK_BYTES // (bytes_of_a_class * GRANULE))


def dense_chunk(call: Call, stripes: int) -> int:
    """Classes in a chunk of a dense call: whole rounds of `stripes` granules."""
    rounds = max(1, dense_granules(call) // stripes)
    return min(rounds * stripes, cdiv(call.c, GRANULE)) * GRANULE


def screen_operands(call: Call, prepared: Preparation) -> dict[str, Any]:
    """Unit rows as the screen takes them on this GPU, and what follows from how."""
    tile, tma = call.tile("screen"), call.family in tiles.BY_DESCRIPTOR
    unit_x, unit_w = prepared.unit_x, prepared.unit_w
    if tma:
        unit_x = TensorDescriptor.from_tensor(unit_x, [tile.block_n, tile.block_k])
        unit_w = TensorDescriptor.from_tensor(unit_w, [tile.block_c, tile.block_k])
    limit = tiles.most_registers(call.family, tile.warps) if LIMITS_REGISTERS else None
    return {
        "unit_x": unit_x,
        "unit_w": unit_w,
        "RUN": min(tiles.RUN[call.family], tile.block_c // LANES.value),
        "TMA": tma,
        **({"maxnreg": limit} if limit else {}),
    }


def _screen(call: Call, result: Forward, stripes: int, capacity: int, threshold: float) -> dict[str, Any]:
    """Every class past every sample; the sums and lists, under the names that `finish_samples` knows them by."""
    saved = Saved(*result.saved)
    made = {
        "sums_ptr": call.empty(SUM_PLANES, stripes, call.padded_n),
        "best_class_ptr": call.empty(stripes, call.padded_n, dtype=torch.int32),
        "count_ptr": call.empty(stripes, call.padded_n, dtype=torch.int32),
        "list_ptr": saved.links,
    }
    block_c, row_blocks = call.tile("screen").block_c, call.row_blocks("screen")
    rounds = max(1, buffers.CHUNK_BYTES // (2 * call.padded_d * GRANULE * stripes))
    chunk = min(rounds * stripes, cdiv(call.c, GRANULE)) * GRANULE
    prepared = Preparation(call, chunk, saved.norm, saved.inv_norm, result.counts, saved.flags, saved.head)
    screened = {
        **made,
        **call.target,
        "c": call.c,
        "padded_n": call.padded_n,
        "row_blocks": row_blocks,
        "stripes": stripes,
        "capacity": capacity,
        "slots": saved.links.shape[1],
        "threshold": threshold,
        "k_inter": call.hp.k_inter,
        "b": call.hp.b,
        "PADDED_D": call.padded_d,
        **screen_operands(call, prepared),
        **call.product("screen"),
    }
    if call.padded_d > tiles.DEEP_FEATURES:
        screened["num_stages"] = min(screened["num_stages"], tiles.DEEP_STAGES)
    for first, rows in call.chunks(chunk):
        prepared.launch(first, rows)
        begun = 0 if first == 0 else call.padded_n
        launch(
            screen,
            (row_blocks * stripes,),
            **screened,
            first_class=first,
            tiles=cdiv(rows, block_c),
            begun=begun,
        )
    return {**made, "parts": stripes, "grad_parts_ptr": made["sums_ptr"], "grad_parts": 0}


def _dense(call: Call, result: Forward, need_grad: bool, multiprocessors: int) -> dict[str, Any]:
    """The sums over all classes and of ∂x, in parts, under the names that `finish_samples` knows them by."""
    saved = Saved(*result.saved)
    coefficients_of, gradient_of = call.tile("coefficients"), call.tile("row_gradient")
    row_blocks, gradient_blocks = call.row_blocks("coefficients"), call.row_blocks("row_gradient")
    block_k = min(gradient_of.block_k, coefficients_of.block_c)
    granules = cdiv(call.c, GRANULE)
    stripes = buffers.shares(row_blocks, min(granules, dense_granules(call)), multiprocessors)
    d_blocks = cdiv(call.d, gradient_of.block_c)
    in_memory = buffers.PARTIAL_BYTES // (4 * call.padded_n * call.d)
    splits = buffers.shares(gradient_blocks * d_blocks, min(max(2, in_memory), granules), multiprocessors)
    sums = call.empty(SUM_PLANES, stripes, call.padded_n)
    best_class = call.empty(stripes, call.padded_n, dtype=torch.int32)
    active = call.empty(stripes, call.padded_n, dtype=torch.int32)
    grad = call.empty(splits if need_grad else 0, call.padded_n, call.d)
    chunk = dense_chunk(call, stripes)
    prepared = Preparation(call, chunk, saved.norm, saved.inv_norm, result.counts, saved.flags, saved.head)
    shifts = need_grad and call.precision == "split"
    shared = {
        "unit_w_ptr": prepared.unit_w,
        "coefficient_ptr": call.coefficients(chunk if need_grad else 0),
        "shift_ptr": call.empty(chunk // coefficients_of.block_c if shifts else 0, call.padded_n, dtype=torch.int32),
        "padded_n": call.padded_n,
        "padded_chunk": chunk,
        "PADDED_D": call.padded_d,
        "PRECISION": call.precision,
    }
    weighed = {
        **shared,
        **call.target,
        **call.pairs,
        "unit_x_ptr": prepared.unit_x,
        "sums_ptr": sums,
        "best_class_ptr": best_class,
        "active_ptr": active,
        "grad_row_ptr": sums,
        "largest_ptr": sums,
        "along_ptr": sums,
        "row_blocks": row_blocks,
        "stripes": stripes,
        "BACKWARD": False,
        "NEED_GRAD": need_grad,
        **call.product("coefficients"),
    }
    multiplied = {
        **shared,
        "grad_ptr": grad,
        "d": call.d,
        "row_blocks": gradient_blocks,
        "splits": splits,
        **call.product("row_gradient"),
        "COLUMNS": coefficients_of.block_c,
        "BLOCK_K": block_k,
    }
    for first, rows in call.chunks(chunk):
        begun = 0 if first == 0 else call.padded_n
        prepared.launch(first, rows)
        launch(
            coefficients,
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
                steps=cdiv(rows, block_k),
                begun=begun,
            )
    made = {"sums_ptr": sums, "count_ptr": active, "best_class_ptr": best_class, "list_ptr": active}
    return {**made, "parts": stripes, "grad_parts_ptr": grad, "grad_parts": splits}


def forward(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, dense: bool, multiprocessors: int, result: Forward
) -> None:
    """Fills `result`, of `buffers.allocate` for the same call."""
    call = Call(x, w, target, hp, dense)
    saved = Saved(*result.saved)
    need_x = result.row_grad_x.shape[0] > 0
    stripes, capacity = buffers.lists(call.n, call.c, call.d, multiprocessors)
    threshold = threshold_of(hp, call.d) or 0.0
    if dense:
        sums = _dense(call, result, need_x, multiprocessors)
    else:
        sums = _screen(call, result, stripes, capacity, threshold)
    launch(
        finish_samples,
        (call.n,),
        **call.x,
        **call.w,
        **call.target,
        **call.pairs,
        **sums,
        norm_ptr=saved.norm,
        inv_norm_ptr=saved.inv_norm,
        flags_ptr=saved.flags,
        overflowed_ptr=saved.overflowed,
        head_ptr=saved.head,
        list_weight_ptr=saved.list_weight,
        list_cos_ptr=saved.list_cos,
        row_loss_ptr=result.row_loss,
        stats_ptr=result.row_stats,
        hardest_class_ptr=result.hardest_class,
        counts_ptr=result.counts,
        row_grad_x_ptr=result.row_grad_x,
        d=call.d,
        padded_n=call.padded_n,
        capacity=capacity,
        slots=saved.links.shape[1],
        threshold=threshold,
        s=hp.s,
        BLOCK_D=call.block_d,
        BLOCK_E=tiles.rows_at_once(min(tiles.FINISH_ENTRIES, call.row_block), call.family),
        BLOCK_PARTS=block_parts(sums["parts"]),
        DENSE=dense,
        NEED_GRAD=need_x,
        LINKS=makes_links(call, saved.head),
        num_warps=tiles.ROW_WARPS,
    )
