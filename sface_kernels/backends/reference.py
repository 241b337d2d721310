"""The reference module's arithmetic in plain PyTorch: equations (1)–(8) line by line, N×C materialised.

The oracle in fp64 and the opponent in fp32. Works on any device and any float dtype; memory is several N×C tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import full_precision
from ..types import IGNORED, INVALID, NORM_EPS, Forward, HyperParameters, Request, RowStats


def unavailable(request: Request) -> str | None:
    return None


def _unit_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(t, dim=1, keepdim=True)  # [rows, 1]
    return t / norm.clamp_min(NORM_EPS), norm


def _counted_rows(x: Tensor, target: Tensor) -> Tensor:
    """Ignored rows as zeros: whatever they hold, NaN included, must change nothing."""
    return torch.where((target == IGNORED).unsqueeze(1), 0, x)


def _tangent(grad_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """The gradient through normalisation: drop the part along the unit row, divide by the norm."""
    along = (grad_unit * unit).sum(1, keepdim=True)  # [rows, 1]
    # below NORM_EPS normalize divides by a constant, so nothing is projected away
    along = torch.where(norm < NORM_EPS, torch.zeros_like(along), along)
    return (grad_unit - along * unit) / norm.clamp_min(NORM_EPS)


@full_precision
def forward(x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool) -> Forward:
    dtype = torch.promote_types(x.dtype, w.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    x_unit, x_norm = _unit_rows(_counted_rows(x.to(dtype), target))  # [N, D], [N, 1]
    w_unit, _ = _unit_rows(w.to(dtype))  # [C, D]
    cos = (x_unit @ w_unit.t()).clamp(-1, 1)  # [N, C], (1)
    theta = torch.acos(cos)  # (2)
    p = hp.s * torch.sigmoid(hp.k_intra * (theta - hp.a))  # (3)
    q = hp.s * torch.sigmoid(-hp.k_inter * (theta - hp.b))  # (4)

    has_target = target >= 0
    is_target = torch.zeros_like(cos, dtype=torch.bool)
    is_target.scatter_(1, target.clamp_min(0).unsqueeze(1), has_target.unsqueeze(1))
    counts_row = (target != IGNORED).unsqueeze(1)  # [N, 1]
    is_other = ~is_target & counts_row

    zero = torch.zeros((), dtype=dtype, device=x.device)
    intra = torch.where(is_target, -p * cos, zero).sum(1)  # [N], (5)
    inter = torch.where(is_other, q * cos, zero).sum(1)  # [N], (5)
    invalid = target == INVALID
    intra = torch.where(invalid, torch.full_like(intra, torch.nan), intra)

    # NaN counts as kept, so that it reaches the gradient
    dropped = is_other & (q < hp.filter_eps * hp.s)
    kept = is_other & ~dropped
    g = torch.where(is_target, -p, torch.where(kept, q, zero))  # [N, C], (6)

    row_grad_x = x_unit.new_empty(0, x.shape[1])
    if need_x:
        row_grad_x = _tangent(g @ w_unit, x_unit, x_norm)  # [N, D], (7)
        row_grad_x = torch.where(invalid.unsqueeze(1), torch.full_like(row_grad_x, torch.nan), row_grad_x)
    hardest, hardest_class = torch.where(is_other, cos, -torch.inf).max(1)  # [N], the lowest class of equals
    rows = RowStats(
        intra=intra,
        inter=inter,
        cos_target=torch.where(is_target, cos, zero).sum(1),
        cos_other_sum=torch.where(is_other, cos, zero).sum(1),
        hardest=torch.where(target == IGNORED, 0, hardest),
        dropped=torch.where(dropped, q, zero).sum(1),
    )
    return Forward(
        row_loss=intra + inter,
        row_stats=torch.stack(rows),
        hardest_class=torch.where(hardest.isfinite(), hardest_class, -1),
        counts=torch.stack([kept.sum(), is_target.shape[1] * counts_row.sum()]),
        row_grad_x=row_grad_x,
        saved=(g,) if need_w else (),
    )


@full_precision
def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    (g,) = saved
    x_unit, _ = _unit_rows(_counted_rows(x.to(g.dtype), target))
    w_unit, w_norm = _unit_rows(w.to(g.dtype))
    return _tangent((grad_row.unsqueeze(1) * g).t() @ x_unit, w_unit, w_norm)  # [C, D], (8)


def narrow(saved: tuple[Tensor, ...], rows: int, first: int, end: int) -> tuple[Tensor, ...]:
    (g,) = saved
    return (g[:, first:end],)
