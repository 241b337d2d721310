"""The forward as a sequence of launches: unit rows and sums over classes, in chunks, then every sample's results.

By lists the screen makes the sums, and in a dense call coefficients and their product with the unit rows. Which of the
two is the caller's to say; nothing waits for a count.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...types import IGNORED, NO_TARGET, Forward, HyperParameters
from . import buffers, tiles
from .buffers import Saved, cdiv
from .kernels.dense import coefficients, row_gradient
from .kernels.finish import finish_samples
from .kernels.prepare import prepare
from .kernels.screen import LANES, screen
from .launch import KINDS, Call, Kind, block_parts, launch
from .tiles import GRANULE

# Triton before 3.6 spills under the limit that makes room for two programs.
LIMITS_REGISTERS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)
SUM_PLANES = 4  # per sample: Σ weight·cosine, Σ dropped weight, Σ cosine, the largest cosine


def makes_links(call: Call, head: Tensor) -> bool:
    """Whether the forward leaves lists for the backward; `head` has memory for one element where it does not."""
    return not call.dense and head.stride(0) == 1


@functools.lru_cache(maxsize=KINDS)
def _prepare_constants(kind: Kind, links: bool) -> dict[str, Any]:
    return {
        **kind.x,
        **kind.w,
        **kind.target,
        "c": kind.c,
        "d": kind.d,
        "padded_n": kind.padded_n,
        "BLOCK": kind.row_block,
        "BLOCK_D": kind.block_d,
        "PADDED_D": kind.padded_d,
        "PARTS": kind.parts,
        "LINKS": links,
        "num_warps": tiles.ROW_WARPS,
    }


class Preparation:
    """Unit rows of all samples `[padded N, …]`, and of one chunk of classes after the other `[chunk, …]`.

    The first launch fills `norm`, `counted` and `target` and sets `counts` and `flags` to 0, each its classes' part of
    `inv_norm` and `head`.
    """

    def __init__(
        self,
        call: Call,
        chunk: int,
        norm: Tensor,
        inv_norm: Tensor,
        counts: Tensor,
        counted: Tensor,
        target: Tensor,
        flags: Tensor,
        head: Tensor,
    ):
        self.unit_x, self.unit_w = call.unit_rows(call.padded_n), call.unit_rows(chunk)
        # of int8 rows
        self.rounding = dict.fromkeys(("step_x_ptr", "moved_x_ptr", "step_w_ptr", "moved_w_ptr"), norm)
        if call.int8:
            rows = {"x": len(self.unit_x), "w": len(self.unit_w)}
            self.rounding = {f"step_{name}_ptr": call.empty(count) for name, count in rows.items()}
            self.rounding |= {f"moved_{name}_ptr": call.empty(count // call.row_block) for name, count in rows.items()}
        self.inv_norm, self.row_block = inv_norm, call.row_block
        self.sample_blocks = cdiv(call.padded_n, call.row_block)
        self.arguments: dict[str, Any] = {
            **_prepare_constants(call.kind, makes_links(call, head)),
            **call.pointers,
            **call.labels,
            "target_ptr": target,
            "unit_x_ptr": self.unit_x,
            "unit_w_ptr": self.unit_w,
            **self.rounding,
            "norm_ptr": norm,
            "inv_norm_ptr": inv_norm,
            "counts_ptr": counts,
            "counted_ptr": counted,
            "flags_ptr": flags,
            "head_ptr": head,
        }

    def launch(self, first: int, rows: int) -> None:
        """Unit rows and inverse norms of `rows` classes from `first` on, and with the first chunk the samples."""
        samples = self.sample_blocks if first == 0 else 0
        blocks = samples + cdiv(rows, self.row_block)
        launch(prepare, (blocks,), **self.arguments, sample_blocks=samples, first_class=first)


def preparation(call: Call, chunk: int, result: Forward) -> Preparation:
    saved, counted, target = Saved(*result.saved), result.counted, result.target
    assert counted is not None and target is not None
    return Preparation(call, chunk, saved.norm, saved.inv_norm, result.counts, counted, target, saved.flags, saved.head)


def dense_granules(call: Call) -> int:
    """How many granules of classes a chunk of a dense call may have."""
    bytes_of_a_class = (call.padded_d + call.padded_n) * call.parts * call.unit_dtype.itemsize
    return max(1, buffers.CHUNK_BYTES // (bytes_of_a_class * GRANULE))


def dense_chunk(call: Call, stripes: int) -> int:
    """Classes in a chunk of a dense call: whole rounds of `stripes` granules."""
    rounds = max(1, dense_granules(call) // stripes)
    return min(rounds * stripes, cdiv(call.c, GRANULE)) * GRANULE


def screen_operands(call: Call, prepared: Preparation, block_n: int, block_c: int, block_k: int) -> dict[str, Any]:
    """Unit rows as the screen takes them on this GPU."""
    unit_x, unit_w = prepared.unit_x, prepared.unit_w
    if call.family in tiles.BY_DESCRIPTOR:
        unit_x = TensorDescriptor.from_tensor(unit_x, [block_n, block_k])
        unit_w = TensorDescriptor.from_tensor(unit_w, [block_c, block_k])
    return {"unit_x": unit_x, "unit_w": unit_w, **prepared.rounding}


@functools.lru_cache(maxsize=KINDS)
def _screen_constants(kind: Kind, stripes: int, capacity: int) -> dict[str, Any]:
    tile, product = kind.tile("screen"), kind.product("screen")
    if kind.padded_d > tiles.DEEP_FEATURES:
        product["num_stages"] = min(product["num_stages"], tiles.DEEP_STAGES)
    limit = tiles.most_registers(kind.family, tile.warps) if LIMITS_REGISTERS else None
    return {
        **kind.target,
        "c": kind.c,
        "padded_n": kind.padded_n,
        "row_blocks": kind.row_blocks("screen"),
        "stripes": stripes,
        "capacity": capacity,
        "slots": stripes * capacity + 1,
        "threshold": kind.threshold,
        "k_inter": kind.hp.k_inter,
        "b": kind.hp.b,
        "PADDED_D": kind.padded_d,
        "ROWS": kind.row_block,
        "INT8": kind.int8,
        "RUN": min(tiles.RUN[kind.family], tile.block_c // LANES.value),
        "TMA": kind.family in tiles.BY_DESCRIPTOR,
        **product,
        **({"maxnreg": limit} if limit else {}),
    }


def _screen(call: Call, result: Forward, stripes: int, capacity: int) -> dict[str, Any]:
    """Every class past every sample; the sums and lists, under the names that `finish_samples` knows them by."""
    saved = Saved(*result.saved)
    made = {
        "sums_ptr": call.empty(SUM_PLANES, stripes, call.padded_n),
        "best_class_ptr": call.empty(stripes, call.padded_n, dtype=torch.int32),
        "count_ptr": call.empty(stripes, call.padded_n, dtype=torch.int32),
        "list_ptr": saved.links,
    }
    constants = _screen_constants(call.kind, stripes, capacity)
    block_c, row_blocks = constants["BLOCK_C"], constants["row_blocks"]
    rounds = max(1, buffers.CHUNK_BYTES // (call.unit_dtype.itemsize * call.padded_d * GRANULE * stripes))
    chunk = min(rounds * stripes, cdiv(call.c, GRANULE)) * GRANULE
    prepared = preparation(call, chunk, result)
    screened = {
        **constants,
        **made,
        "target_ptr": call.pointers["target_ptr"],
        **screen_operands(call, prepared, constants["BLOCK_N"], block_c, constants["BLOCK_K"]),
    }
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
    prepared = preparation(call, chunk, result)
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


@functools.lru_cache(maxsize=KINDS)
def _finish_constants(kind: Kind, capacity: int, slots: int, parts: int, need_x: bool, links: bool) -> dict[str, Any]:
    return {
        **kind.x,
        **kind.w,
        **kind.target,
        **kind.pairs,
        "d": kind.d,
        "padded_n": kind.padded_n,
        "capacity": capacity,
        "slots": slots,
        "s": kind.hp.s,
        "BLOCK_D": kind.block_d,
        "BLOCK_E": tiles.rows_at_once(min(tiles.FINISH_ENTRIES, kind.row_block), kind.family),
        "BLOCK_PARTS": block_parts(parts),
        "DENSE": kind.dense,
        "NEED_GRAD": need_x,
        "LINKS": links,
        "num_warps": tiles.ROW_WARPS,
    }


def forward(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    hp: HyperParameters,
    dense: bool,
    multiprocessors: int,
    result: Forward,
    ignore_index: int = IGNORED,
    no_target: int = NO_TARGET,
) -> None:
    """Fills `result`, of `buffers.allocate` for the same call. A row whose label is `ignore_index` is ignored, one
    whose label is `no_target` has its class elsewhere."""
    assert result.target is not None
    call = Call(x, w, result.target, hp, dense)
    call.labels = {"label_ptr": labels, "ignore_index": ignore_index, "no_target": no_target}
    saved = Saved(*result.saved)
    need_x = result.row_grad_x.shape[0] > 0
    stripes, capacity = buffers.lists(call.n, call.c, call.d, multiprocessors)
    sums = _dense(call, result, need_x, multiprocessors) if dense else _screen(call, result, stripes, capacity)
    launch(
        finish_samples,
        (call.n,),
        **_finish_constants(
            call.kind,
            capacity,
            saved.links.shape[1],
            sums["parts"],
            need_x,
            makes_links(call, saved.head),
        ),
        **call.pointers,
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
    )
