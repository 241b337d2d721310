"""Forward and backward as fixed sequences of launches, by lists or by dense products.

Which of the two is the caller's to say; nothing waits for a count.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import IGNORED, NO_TARGET, HyperParameters
from . import tiles
from .buffers import OUTPUTS, SAVED, allocate, cdiv, lists
from .device import gpu_of
from .kernels.coefficients import coefficients
from .kernels.dense import class_gradient, row_gradient, scale
from .kernels.finish import finish_samples
from .kernels.regroup import regroup
from .kernels.rescore import rescore
from .kernels.scatter import scatter_classes
from .kernels.screen import screen
from .launch import SUM_PLANES, Call, kind_of, launched_alone


def forward(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    hp: HyperParameters,
    need_grad_x: bool,
    need_grad_w: bool,
    dense: bool,
    multiprocessors: int,
    int8: bool = False,
    reduction: str = "",
    ignore_index: int = IGNORED,
    no_target: int = NO_TARGET,
) -> tuple[Tensor, ...]:
    """The operator's outputs. A call that is not `dense` is screened in fp16, or in `int8`. With a `reduction`, "mean"
    or "sum", a dense call makes ∂w of the reduced loss. A row whose label is `ignore_index` is ignored, one whose label
    is `no_target` has its class elsewhere."""
    if x.shape[0] == 0:
        sizes = lists(0, w.shape[0], w.shape[1], multiprocessors)
        outputs = allocate(x, w, need_grad_x, need_grad_w, dense, *sizes, reduction)
        for output in outputs:
            output.zero_()
        outputs[-3].fill_(1)  # samples that count, at least 1
        return outputs
    kind = kind_of(x, w, hp, dense, int8, multiprocessors, reduction != "")
    outputs = allocate(x, w, need_grad_x, need_grad_w, dense, *kind.lists, reduction)
    call = Call(
        kind,
        x.device,
        x_ptr=x,
        w_ptr=w,
        label_ptr=labels,
        ignore_index=ignore_index,
        no_target=no_target,
        NEED_GRAD=need_grad_x,
        NEED_GRAD_W=reduction != "",
        MEAN=reduction == "mean",
        LINKS=need_grad_w and not dense,
        BACKWARD=False,
        OWN_U=False,
        **dict(zip(OUTPUTS, outputs, strict=True)),
    )
    # unit rows and sums over classes, in chunks, then every sample's results
    call.make("sums_ptr", SUM_PLANES, kind.stripes, kind.padded_n)
    call.make("best_class_ptr", kind.stripes, kind.padded_n, dtype=torch.int32)
    call.make("count_ptr", kind.stripes, kind.padded_n, dtype=torch.int32)
    (_products if dense else _screen)(call)
    call.launch(finish_samples, kind.n)
    return outputs


def _screen(call: Call) -> None:
    """Every class past every sample: the sums and the lists."""
    own, stripes = call.kind.own["screen"], call.kind.stripes
    call.unit_rows(own)
    for classes in call.chunks():
        call.launch(screen, own["row_blocks"] * stripes, tiles=cdiv(classes, own["BLOCK_C"]))
    call.make("begin_ptr", stripes, call.kind.padded_n, dtype=torch.int32)
    call.launch(regroup, own["row_blocks"] * stripes)
    if (parts := call.kind.list_parts) > 1:
        # the chunk's unit rows are no longer needed
        call.arguments["part_ptr"] = call.arguments["unit_w_ptr"].view(-1).view(torch.float32)
        call.launch(rescore, call.kind.n, parts)


def _products(call: Call) -> None:
    """The sums over all classes, ∂x in parts and ∂w, as far as they are asked for."""
    kind, need_x, need_w = call.kind, call.arguments["NEED_GRAD"], call.arguments["NEED_GRAD_W"]
    own, rows_of, classes_of = (kind.own[name] for name in ("coefficients", "row_gradient", "class_gradient"))
    chunk = call.unit_rows(own)
    if need_x:
        call.make("row_coefficient_ptr", kind.padded_n, kind.parts * chunk, dtype=kind.unit_dtype)
        call.make("grad_ptr", rows_of["splits"], kind.padded_n, kind.d)
        if kind.parts == 2:
            call.make("row_shift_ptr", chunk // own["BLOCK_C"], kind.padded_n, dtype=torch.int32)
    if need_w:
        call.make("class_coefficient_ptr", kind.padded_n, kind.parts * chunk, dtype=kind.unit_dtype)
        call.make("along_ptr", own["row_blocks"], chunk)
        call.make("class_shift_ptr", own["row_blocks"], chunk, dtype=torch.int32)
    call.arguments["splits"] = rows_of["splits"]
    for rows in call.chunks():
        call.launch(coefficients, own["row_blocks"] * kind.stripes, tiles=cdiv(rows, own["BLOCK_C"]))
        if need_x:
            grid = rows_of["row_blocks"] * rows_of["splits"], cdiv(kind.d, rows_of["BLOCK_C"])
            call.launch(row_gradient, *grid, steps=cdiv(rows, rows_of["BLOCK_K"]))
        if need_w:
            call.launch(class_gradient, cdiv(rows, classes_of["BLOCK_C"]), cdiv(kind.d, classes_of["BLOCK_N"]))


class Move(NamedTuple):
    """An optimizer's step: its state `[C, D]`, all float32 and contiguous as the weight is, and its numbers.

    w and what the names say are moved as in torch.optim.sgd and torch.optim.adamw: "sgd" without and "momentum" with a
    buffer, `first`, "nesterov", and "adamw".
    """

    rule: str
    lr: float
    weight_decay: float  # with "adamw" times lr
    first: Tensor | None = None
    second: Tensor | None = None
    keep: float = 0.0  # momentum
    take: float = 1.0  # 1 − dampening, or 1 − β₁
    keep_second: float = 0.0  # β₂
    take_second: float = 1.0  # 1 − β₂, which fp32 would get wrong
    eps: float = 0.0
    correction: float = 1.0  # 1/√(1 − β₂ᵗ)
    sign: float = 1.0  # −1 to maximize


def grad_weight(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    grad_row: Tensor,
    hp: HyperParameters,
    dense: bool,
    saved: list[Tensor],
    move: Move | None = None,
) -> Tensor:
    """∂w `[C, D]` in the dtype of w, equation (8), by the way that the forward took; or w moved (by lists alone)."""
    if x.shape[0] == 0:
        return torch.zeros(w.shape, dtype=w.dtype, device=w.device)
    gpu = gpu_of(x.device)
    kind = kind_of(x, w, hp, dense, False, gpu.multiprocessors)
    own_u = grad_row.stride(0) != 0
    if not own_u:  # of a mean or a sum: one element, which is the largest too
        largest = grad_row
    else:
        grad_row = grad_row.contiguous()
        largest = torch.linalg.vector_norm(grad_row, math.inf)  # NaN where an element is
    given: dict[str, Any] = dict(zip(SAVED, saved, strict=True))
    given |= {"x_ptr": x, "w_ptr": w, "target_ptr": target, "grad_row_ptr": grad_row, "largest_ptr": largest}
    if dense:
        given |= {"BACKWARD": True, "OWN_U": own_u, "MEAN": False}
        given |= {"NEED_GRAD": False, "NEED_GRAD_W": True, "LINKS": False}
    if move is None:
        call = Call(kind, x.device, **given, RULE="")
        # the interpreter cuts off what a cast to bf16 should round
        stored = torch.float32 if gpu.family == "interpreter" else w.dtype
        grad = call.make("grad_w_ptr", kind.c, kind.d, dtype=stored)
    else:
        call = Call(kind, x.device, **given, RULE=move.rule, first_ptr=move.first, second_ptr=move.second)
        call.arguments |= move._asdict() | {"s": hp.s * move.sign}
        grad = w
    if dense:
        _products_again(call)
    else:
        block_c, block_d = (kind.own["scatter_classes"][name] for name in ("BLOCK_C", "BLOCK_D"))
        if move is not None:  # whole rows: of a sample without a list a program reads the row that another would move
            block_c, block_d = max(1, block_c * block_d // kind.block_d), kind.block_d
        blocks, d_blocks = cdiv(kind.c, block_c), cdiv(kind.d, block_d)
        rounds = max(1, min(tiles.SCATTER_ROUNDS, blocks * d_blocks // (8 * gpu.multiprocessors)))
        grid, slots = (cdiv(blocks, rounds), d_blocks), call.arguments["links_ptr"].shape[0] - kind.n
        call.arguments |= {"slots": slots, "rounds": rounds, "grad_row_step": grad_row.stride(0)}
        call.launch(scatter_classes, *grid, BLOCK_C=block_c, BLOCK_D=block_d)
    return grad.to(w.dtype)


def _products_again(call: Call) -> None:
    """∂w by dense products; what else `prepare` writes is not looked at."""
    kind, target = call.kind, call.arguments["target_ptr"]
    call.make("norm_ptr", kind.padded_n)
    call.make("inv_norm_ptr", kind.c)
    call.make("counts_ptr", 2, dtype=torch.int64)
    call.make("counted_ptr", dtype=torch.int64)
    call.make("flags_ptr", 2, dtype=torch.int32)
    call.make("head_ptr", 2, dtype=torch.int32)
    call.make("target_ptr", kind.n, dtype=torch.int64)
    call.arguments |= {"label_ptr": target, "ignore_index": IGNORED, "no_target": NO_TARGET}
    _products(call)


def scale_by(grad_w: Tensor, factor: Tensor) -> None:
    """Multiplies a ∂w `[C, D]` that a forward made by an upstream gradient, a tensor of one number, in place."""
    size, block = grad_w.numel(), tiles.ROW_ELEMENTS
    programs = min(8 * gpu_of(grad_w.device).multiprocessors, cdiv(size, block))
    launched_alone(scale, programs, grad_w_ptr=grad_w, factor_ptr=factor, size=size, BLOCK=block)
