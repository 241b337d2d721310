"""Forward and backward as fixed sequences of launches, by lists or by dense products.

Which of the two is the caller's to say; nothing waits for a count.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...types import IGNORED, NO_TARGET, HyperParameters
from . import buffers, tiles
from .buffers import OUTPUTS, SAVED, cdiv
from .device import gpu_of
from .kernels.coefficients import coefficients
from .kernels.dense import class_gradient, row_gradient, scale
from .kernels.finish import finish_samples
from .kernels.regroup import regroup
from .kernels.rescore import rescore
from .kernels.scatter import scatter_classes
from .kernels.screen import screen
from .kinds import KINDS, kind_of
from .launch import SUM_PLANES, Call, launched_alone

_outputs = functools.lru_cache(maxsize=KINDS)(buffers.outputs)


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
    (n, d), c, makes_grad_w = x.shape, w.shape[0], reduction != ""
    if n == 0:
        of_lists = buffers.lists(0, c, d, multiprocessors)
        layout = buffers.outputs(0, c, d, need_grad_x, need_grad_w, dense, *of_lists, makes_grad_w)
        outputs = buffers.empty(layout, x.device)
        for output in outputs:
            output.zero_()
        outputs[-3].fill_(1)  # samples that count, at least 1
        return tuple(outputs)
    kind = kind_of(x, w, hp, dense, int8, multiprocessors, makes_grad_w)
    layout = _outputs(n, c, d, need_grad_x, need_grad_w, dense, *kind.lists, makes_grad_w)
    outputs = buffers.empty(layout, x.device)
    common = {
        "ignore_index": ignore_index,
        "no_target": no_target,
        "NEED_GRAD": need_grad_x,
        "NEED_GRAD_W": makes_grad_w,
        "MEAN": reduction == "mean",
        "LINKS": need_grad_w and not dense,
        "BACKWARD": False,
        "OWN_U": False,
    }
    own = {"x_ptr": x, "w_ptr": w, "label_ptr": labels, **dict(zip(OUTPUTS, outputs, strict=True))}
    Call(kind, x.device, common, own).run(_forward, [x, w, labels])
    return tuple(outputs)


def _forward(call: Call) -> None:
    """Unit rows and sums over classes, in chunks, then every sample's results."""
    kind = call.kind
    call.make("sums_ptr", SUM_PLANES, kind.stripes, kind.padded_n)
    call.make("best_class_ptr", kind.stripes, kind.padded_n, dtype=torch.int32)
    call.make("count_ptr", kind.stripes, kind.padded_n, dtype=torch.int32)
    (_products if kind.dense else _screen)(call)
    call.launch(finish_samples, kind.n)


def _screen(call: Call) -> None:
    """Every class past every sample: the sums and the lists."""
    own, stripes = call.kind.own["screen"], call.kind.stripes
    kernel, programs = screen, own["row_blocks"] * stripes
    if call.kind.specialised:
        from .kernels import specialised

        kernel, programs = specialised.screen, own["row_blocks"] * cdiv(stripes, 2)
    call.unit_rows(own)
    for classes in call.chunks():
        call.launch(kernel, programs, tiles=cdiv(classes, own["BLOCK_C"]))
    call.make("begin_ptr", stripes, call.kind.padded_n, dtype=torch.int32)
    call.launch(regroup, own["row_blocks"] * stripes)
    if (parts := call.kind.list_parts) > 1:
        # the chunk's unit rows are no longer needed
        call.also("part_ptr", "unit_w_ptr", call.own["unit_w_ptr"].view(-1).view(torch.float32))
        call.launch(rescore, call.kind.n, parts)


def _products(call: Call) -> None:
    """The sums over all classes, ∂x in parts and ∂w, as far as they are asked for."""
    kind, need_x, need_w = call.kind, call.common["NEED_GRAD"], call.common["NEED_GRAD_W"]
    own, rows_of, classes_of = (kind.own[name] for name in ("coefficients", "row_gradient", "class_gradient"))
    call.unit_rows(own)
    if need_x:
        call.make("row_coefficient_ptr", kind.padded_n, kind.parts * kind.chunk, dtype=kind.unit_dtype)
        call.make("grad_ptr", rows_of["splits"], kind.padded_n, kind.d)
        if kind.parts == 2:
            call.make("row_shift_ptr", kind.chunk // own["BLOCK_C"], kind.padded_n, dtype=torch.int32)
    if need_w:
        call.make("class_coefficient_ptr", kind.padded_n, kind.parts * kind.chunk, dtype=kind.unit_dtype)
        call.make("along_ptr", own["row_blocks"], kind.chunk)
        call.make("class_shift_ptr", own["row_blocks"], kind.chunk, dtype=torch.int32)
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
    own: dict[str, Any] = {"x_ptr": x, "w_ptr": w, "grad_row_ptr": grad_row, "largest_ptr": largest}
    given = [x, w, target, grad_row, *saved]
    if move is None:
        # the interpreter cuts off what a cast to bf16 should round
        stored = torch.float32 if gpu.family == "interpreter" else w.dtype
        (grad,) = buffers.empty([((kind.c, kind.d), (kind.d, 1), stored)], x.device)
        own["grad_w_ptr"] = grad
    else:
        grad = w
        own |= {**move._asdict(), "first_ptr": move.first, "second_ptr": move.second, "s": hp.s * move.sign}
        given += [state for state in (move.first, move.second) if state is not None]
    if dense:
        own["label_ptr"] = target
        common: dict[str, Any] = {"BACKWARD": True, "OWN_U": own_u, "MEAN": False, "LINKS": False}
        common |= {"NEED_GRAD": False, "NEED_GRAD_W": True, "ignore_index": IGNORED, "no_target": NO_TARGET}
        Call(kind, x.device, common, own).run(_products_again, given)
    else:
        own |= zip(SAVED, saved, strict=True)
        own |= {"target_ptr": target, "grad_row_step": grad_row.stride(0), "slots": own["links_ptr"].shape[0] - kind.n}
        Call(kind, x.device, {"RULE": "" if move is None else move.rule}, own).run(_scatter, given)
    return grad if grad.dtype == w.dtype else grad.to(w.dtype)


def _scatter(call: Call) -> None:
    """∂w of the links, or w moved by it."""
    kind, own = call.kind, call.kind.own["scatter_classes"]
    block_c, block_d = own["BLOCK_C"], own["BLOCK_D"]
    if call.common["RULE"]:  # whole rows: of a sample without a list a program reads the row that another would move
        block_c, block_d = max(1, block_c * block_d // kind.block_d), kind.block_d
    blocks, d_blocks = cdiv(kind.c, block_c), cdiv(kind.d, block_d)
    rounds = max(1, min(tiles.SCATTER_ROUNDS, blocks * d_blocks // (8 * gpu_of(call.device).multiprocessors)))
    call.launch(scatter_classes, cdiv(blocks, rounds), d_blocks, BLOCK_C=block_c, BLOCK_D=block_d, rounds=rounds)


def _products_again(call: Call) -> None:
    """∂w by dense products; what else `prepare` writes is not looked at."""
    kind = call.kind
    call.make("norm_ptr", kind.padded_n)
    call.make("inv_norm_ptr", kind.c)
    call.make("counts_ptr", 2, dtype=torch.int64)
    call.make("counted_ptr", dtype=torch.int64)
    call.make("flags_ptr", 2, dtype=torch.int32)
    call.make("head_ptr", 2, dtype=torch.int32)
    call.make("target_ptr", kind.n, dtype=torch.int64)
    _products(call)


def scale_by(grad_w: Tensor, factor: Tensor) -> None:
    """Multiplies a ∂w `[C, D]` that a forward made by an upstream gradient, a tensor of one number, in place."""
    size, block = grad_w.numel(), tiles.ROW_ELEMENTS
    programs = min(8 * gpu_of(grad_w.device).multiprocessors, cdiv(size, block))
    launched_alone(scale, grad_w.device, programs, grad_w_ptr=grad_w, factor_ptr=factor, size=size, BLOCK=block)
