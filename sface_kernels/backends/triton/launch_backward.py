"""∂w as a sequence of launches, by the way that the forward took: from its lists, or by dense products again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...types import HyperParameters
from . import tiles
from .buffers import FLAGS, Saved, cdiv
from .kernels.dense import class_coefficients, class_gradient
from .kernels.scatter import link_pairs, prepare_upstream, scatter_classes
from .launch import Call, block_parts, launch
from .launch_forward import dense_chunk, prepare_chunk, prepare_rows, preparing


def _prepare_upstream(call: Call, grad_row: Tensor, norm: Tensor) -> Tensor:
    upstream = call.empty(2)
    launch(
        prepare_upstream,
        (1,),
        grad_row_ptr=grad_row,
        norm_ptr=norm,
        upstream_ptr=upstream,
        n=call.n,
        BLOCK_N=1024,
        num_warps=tiles.ROW_WARPS,
    )
    return upstream


def _from_lists(call: Call, saved: Saved, common: dict[str, Any]) -> None:
    stripes, capacity = saved.list_classes.shape[1:]
    slots = saved.list_classes.numel()
    head = torch.full((call.c,), -1, dtype=torch.int32, device=call.device)
    links = call.empty(slots + call.n, dtype=torch.int32)
    launch(
        link_pairs,
        (call.n,),
        target_ptr=call.target["target_ptr"],
        overflowed_ptr=saved.overflowed,
        count_ptr=saved.list_counts,
        list_ptr=saved.list_classes,
        list_weight_ptr=saved.list_weight,
        head_ptr=head,
        next_ptr=links,
        padded_n=call.padded_n,
        stripes=stripes,
        capacity=capacity,
        slots=slots,
        BLOCK_E=tiles.entries(tiles.LINK_ENTRIES, call.family),
        BLOCK_PARTS=block_parts(stripes),
        num_warps=tiles.ROW_WARPS,
    )
    block_d = min(call.block_d, tiles.GRADIENT_FEATURES)
    launch(
        scatter_classes,
        (cdiv(call.c, call.tile("scatter_classes").block_c), cdiv(call.d, block_d)),
        **call.rows,
        **call.intra,
        **call.inter,
        **common,
        c=call.c,
        s=call.hp.s,
        norm_ptr=saved.norm,
        inv_norm_ptr=saved.inv_norm,
        flags_ptr=saved.flags,
        overflowed_ptr=saved.overflowed,
        list_weight_ptr=saved.list_weight,
        list_cos_ptr=saved.list_cos,
        target_weight_ptr=saved.target_weight,
        cos_target_ptr=saved.cos_target,
        head_ptr=head,
        next_ptr=links,
        per_sample=stripes * capacity,
        slots=slots,
        BLOCK_D=block_d,
        PRECISION=call.precision,
        **call.product("scatter_classes"),
    )


def _dense(call: Call, common: dict[str, Any]) -> None:
    norm, overflowed = call.empty(call.padded_n), call.empty(call.padded_n, dtype=torch.int32)
    flags = call.empty(FLAGS, dtype=torch.int32)
    unit_x = prepare_rows(call, norm, overflowed, flags)
    chunk = dense_chunk(call, 1)
    unit_w, inv_norm = call.unit_rows(chunk), call.empty(call.c)
    prepared = preparing(call, unit_w, inv_norm, flags)
    shared = {
        "unit_x_ptr": unit_x,
        "coefficient_ptr": call.empty(call.padded_n, chunk, dtype=call.unit_dtype),
        "along_ptr": call.empty(chunk),
        "upstream_ptr": common["upstream_ptr"],
        "padded_chunk": chunk,
        "n": call.n,
        "c": call.c,
        "PADDED_D": call.padded_d,
        "PRECISION": call.precision,
    }
    weighed = {
        **shared,
        **call.intra,
        **call.inter,
        "target_ptr": call.target["target_ptr"],
        "unit_w_ptr": unit_w,
        "grad_row_ptr": common["grad_row_ptr"],
        **call.product("class_coefficients"),
    }
    multiplied = {
        **shared,
        **call.w,
        "inv_norm_ptr": inv_norm,
        "grad_w_ptr": common["grad_w_ptr"],
        "d": call.d,
        "s": call.hp.s,
        **call.product("class_gradient"),
    }
    coefficients_of, gradient_of = call.tile("class_coefficients"), call.tile("class_gradient")
    d_blocks = cdiv(call.d, gradient_of.block_n)
    for first, rows in call.chunks(chunk):
        prepare_chunk(call, prepared, first, rows)
        launch(class_coefficients, (cdiv(rows, coefficients_of.block_c),), **weighed, first_class=first)
        launch(class_gradient, (cdiv(rows, gradient_of.block_c), d_blocks), **multiplied, first_class=first)


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, grad_row: Tensor, hp: HyperParameters, dense: bool, saved: Saved
) -> Tensor:
    """∂w `[C, D]` in the dtype of w, equation (8)."""
    call = Call(x, w, target, hp, dense)
    # the interpreter cuts off what a cast to bf16 should round
    stored = torch.float32 if call.family == "interpreter" else w.dtype
    grad = call.empty(call.c, call.d, dtype=stored)
    common = {
        "grad_row_ptr": grad_row,
        "upstream_ptr": _prepare_upstream(call, grad_row, saved.norm),
        "grad_w_ptr": grad,
    }
    if dense:
        _dense(call, common)
    else:
        _from_lists(call, saved, common)
    return grad.to(w.dtype)
