"""∂w as a sequence of launches, by the way that the forward took: from its lists, or by dense products again."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...types import HyperParameters
from . import tiles
from .kernels.dense import class_coefficients, class_gradient
from .kernels.scatter import link_pairs, prepare_upstream, scatter_classes
from .launch import Call, Saved, launch
from .launch_forward import Samples, dense_chunk, prepare_chunk


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
    head = torch.full((call.c,), -1, dtype=torch.int32, device=call.device)
    links = call.empty(call.slots + call.n, dtype=torch.int32)
    launch(
        link_pairs,
        (call.n,),
        target_ptr=call.target["target_ptr"],
        dense_row_ptr=saved.dense_row,
        count_ptr=saved.counts,
        list_ptr=saved.list_classes,
        list_weight_ptr=saved.list_weight,
        head_ptr=head,
        next_ptr=links,
        padded_n=call.padded_n,
        stripes=call.stripes,
        capacity=call.capacity,
        slots=call.slots,
        BLOCK_E=tiles.entries(tiles.LINK_ENTRIES, call.family),
        BLOCK_STRIPES=triton.next_power_of_2(call.stripes),
        num_warps=tiles.ROW_WARPS,
    )
    block_d = min(call.block_d, tiles.GRADIENT_FEATURES)
    launch(
        scatter_classes,
        (triton.cdiv(call.c, call.tile("scatter_classes").block_c), triton.cdiv(call.d, block_d)),
        **call.rows,
        **call.intra,
        **call.inter,
        **common,
        c=call.c,
        s=call.hp.s,
        norm_ptr=saved.norm,
        inv_norm_ptr=saved.inv_norm,
        flags_ptr=saved.flags,
        dense_row_ptr=saved.dense_row,
        list_weight_ptr=saved.list_weight,
        list_cos_ptr=saved.list_cos,
        target_weight_ptr=saved.target_weight,
        cos_target_ptr=saved.cos_target,
        head_ptr=head,
        next_ptr=links,
        per_sample=call.stripes * call.capacity,
        slots=call.slots,
        BLOCK_D=block_d,
        PRECISION=call.precision,
        **call.product("scatter_classes"),
    )


def _dense(call: Call, common: dict[str, Any]) -> None:
    samples = Samples(call, threshold=-2.0)
    chunk = dense_chunk(call, 1)
    unit_w = call.unit_rows(chunk)
    along, inv_norm = call.empty(chunk), call.empty(call.c)
    shared = {
        "unit_x_ptr": samples.unit,
        "coefficient_ptr": call.empty(call.padded_n, chunk, dtype=call.unit_dtype),
        "along_ptr": along,
        "upstream_ptr": common["upstream_ptr"],
        "padded_chunk": chunk,
        "n": call.n,
        "c": call.c,
        "PADDED_D": call.padded_d,
        "PRECISION": call.precision,
    }
    t = call.tile("class_gradient")
    for first, rows in call.chunks(chunk):
        prepare_chunk(call, unit_w, inv_norm, samples.flags, first, rows)
        launch(
            class_coefficients,
            (triton.cdiv(rows, call.tile("class_coefficients").block_c),),
            **shared,
            **call.intra,
            **call.inter,
            target_ptr=call.target["target_ptr"],
            unit_w_ptr=unit_w,
            grad_row_ptr=common["grad_row_ptr"],
            first_class=first,
            **call.product("class_coefficients"),
        )
        launch(
            class_gradient,
            (triton.cdiv(rows, t.block_c), triton.cdiv(call.d, t.block_n)),
            **shared,
            **call.w,
            inv_norm_ptr=inv_norm,
            grad_w_ptr=common["grad_w_ptr"],
            d=call.d,
            first_class=first,
            s=call.hp.s,
            **call.product("class_gradient"),
        )


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
