"""∂w as a sequence of launches, by the way that the forward took: from its lists, or by dense products again."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...types import HyperParameters
from . import tiles
from .buffers import Saved, cdiv
from .kernels.dense import class_gradient, coefficients
from .kernels.scatter import scatter_classes
from .launch import KINDS, Call, Kind, launch
from .launch_forward import Preparation, dense_chunk


@functools.lru_cache(maxsize=KINDS)
def _scatter_constants(kind: Kind, slots: int, block_c: int, block_d: int) -> dict[str, Any]:
    return {
        **kind.x,
        **kind.w,
        **kind.target,
        **kind.pairs,
        "d": kind.d,
        "slots": slots,
        "s": kind.hp.s,
        "BLOCK_C": block_c,
        "BLOCK_D": block_d,
        "num_warps": tiles.SCATTER_WARPS,
    }


def _from_lists(call: Call, saved: Saved, common: dict[str, Any]) -> None:
    block_c = tiles.rows_at_once(tiles.SCATTER_CLASSES, call.family)
    block_d = min(call.block_d, tiles.SCATTER_FEATURES)
    launch(
        scatter_classes,
        (cdiv(call.c, block_c), cdiv(call.d, block_d)),
        **_scatter_constants(call.kind, saved.links.shape[1], block_c, block_d),
        **call.pointers,
        **common,
        norm_ptr=saved.norm,
        inv_norm_ptr=saved.inv_norm,
        flags_ptr=saved.flags,
        overflowed_ptr=saved.overflowed,
        head_ptr=saved.head,
        link_ptr=saved.links,
        list_weight_ptr=saved.list_weight,
        list_cos_ptr=saved.list_cos,
        grad_row_step=common["grad_row_ptr"].stride(0),
    )


def _dense(call: Call, common: dict[str, Any]) -> None:
    chunk = dense_chunk(call, 1)
    norm, inv_norm = call.empty(call.padded_n), call.empty(call.c)
    counts, flags, head = (call.empty(2, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.int32))
    counted, target = call.empty(dtype=torch.int64), call.empty(call.n, dtype=torch.int64)
    prepared = Preparation(call, chunk, norm, inv_norm, counts, counted, target, flags, head)
    coefficients_of, gradient_of = call.tile("coefficients"), call.tile("class_gradient")
    row_blocks = call.row_blocks("coefficients")
    shared = {
        "unit_x_ptr": prepared.unit_x,
        "coefficient_ptr": call.coefficients(chunk),
        "along_ptr": call.empty(chunk),
        "shift_ptr": call.empty(row_blocks, chunk, dtype=torch.int32),
        "largest_ptr": common["largest_ptr"],
        "padded_chunk": chunk,
        "PADDED_D": call.padded_d,
        "PRECISION": call.precision,
    }
    weighed = {
        **shared,
        **call.target,
        **call.pairs,
        "unit_w_ptr": prepared.unit_w,
        "sums_ptr": norm,
        "best_class_ptr": flags,
        "active_ptr": flags,
        "grad_row_ptr": common["grad_row_ptr"],
        "padded_n": call.padded_n,
        "row_blocks": row_blocks,
        "tiles": 0,
        "stripes": 1,
        "begun": 0,
        "BACKWARD": True,
        "NEED_GRAD": True,
        **call.product("coefficients"),
    }
    multiplied = {
        **shared,
        **call.w,
        "inv_norm_ptr": prepared.inv_norm,
        "grad_w_ptr": common["grad_w_ptr"],
        "n": call.n,
        "c": call.c,
        "d": call.d,
        "s": call.hp.s,
        **call.product("class_gradient"),
        "ROWS": coefficients_of.block_n,
        "BLOCK_K": min(gradient_of.block_k, coefficients_of.block_n),
    }
    d_blocks = cdiv(call.d, gradient_of.block_n)
    for first, rows in call.chunks(chunk):
        prepared.launch(first, rows)
        launch(coefficients, (cdiv(rows, coefficients_of.block_c),), **weighed, first_class=first)
        launch(class_gradient, (cdiv(rows, gradient_of.block_c), d_blocks), **multiplied, first_class=first)


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, grad_row: Tensor, hp: HyperParameters, dense: bool, saved: Saved
) -> Tensor:
    """∂w `[C, D]` in the dtype of w, equation (8)."""
    call = Call(x, w, target, hp, dense)
    # the interpreter cuts off what a cast to bf16 should round
    stored = torch.float32 if call.family == "interpreter" else w.dtype
    grad = call.empty(call.c, call.d, dtype=stored)
    if not dense and grad_row.stride(0) == 0:  # of a mean or a sum: one element, which is the largest too
        largest = grad_row
    else:
        grad_row = grad_row.contiguous()
        largest = torch.linalg.vector_norm(grad_row, math.inf)  # NaN where an element is
    common = {"grad_row_ptr": grad_row, "largest_ptr": largest, "grad_w_ptr": grad}
    if dense:
        _dense(call, common)
    else:
        _from_lists(call, saved, common)
    return grad.to(w.dtype)
