"""Portable PyTorch over blocks of classes: no compiler, no Triton, any device.

Reads `w` once in the forward (and again in the backward only for the rows of active pairs). A block's cosines
`[N, chunk]` are the largest temporary; N×C is never materialised. Active pairs are listed for the backward; a block
with too many of them, or past the list's capacity, takes matrix products instead and is recomputed in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..types import IGNORED, INVALID, Forward, HyperParameters, RowStats

NORM_EPS = 1e-12  # torch.nn.functional.normalize's
CHUNK_ELEMENTS = 1 << 18  # N·chunk: 1 MiB of fp32 cosines stays in a CPU's cache
DENSE_FRACTION = 0.02  # active share of a block above which a product beats gathering rows (measured, D=512)
SCATTER_PAIRS = 4096  # pairs whose [pairs, D] terms exist at once
DENSE = -1  # in chunk_pairs: this block is recomputed with products


def unavailable(device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    return None


def chunk_size(rows: int) -> int:
    """Classes per block for `rows` samples."""
    return max(256, min(8192, CHUNK_ELEMENTS // max(rows, 1)))


def forward(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool
) -> Forward:
    row_loss, row_stats, counts, unit_grad_x, *saved = torch.ops.sface.chunked_forward(
        x, w, target, *hp, need_x, need_w, chunk_size(x.shape[0])
    )
    return Forward(
        row_loss=row_loss,
        rows=RowStats(*row_stats.unbind(0)),
        active_pairs=counts[0],
        dense_blocks=counts[1],
        unit_grad_x=unit_grad_x if need_x else None,
        saved=tuple(saved) if need_w else (),
    )


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    return torch.ops.sface.chunked_grad_weight(
        x, w, target, grad_row, *hp, chunk_size(x.shape[0]), *saved
    )


def _unit_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(t, dim=1)  # [rows]
    return t / norm.clamp_min(NORM_EPS).unsqueeze(1), norm


def _tangent(grad_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient through normalisation, (7) and (8): drop the part along the unit row, divide by the norm."""
    along = (grad_unit * unit).sum(1)  # [rows]
    along = torch.where(norm < NORM_EPS, torch.zeros_like(along), along)
    return (grad_unit - along.unsqueeze(1) * unit) / norm.clamp_min(NORM_EPS).unsqueeze(1)


class _Block:
    """Cosines and coefficients of one block of classes, (1), (2), (4), with the targets taken out."""

    def __init__(self, x_unit: Tensor, w: Tensor, start: int, chunk: int, target: Tensor, hp: HyperParameters):
        self.w_unit, self.w_norm = _unit_rows(w[start : start + chunk].to(x_unit.dtype))  # [chunk, D], [chunk]
        cos = (x_unit @ self.w_unit.t()).clamp_(-1, 1)  # [N, chunk], (1)
        column = target - start
        # rows whose target lies in another block write to column 0 what already stands there
        inside = ((column >= 0) & (column < cos.shape[1])).unsqueeze(1)  # [N, 1]
        column = column.clamp(0, cos.shape[1] - 1).unsqueeze(1)  # [N, 1]
        self.inside, self.column = inside, column
        self.cos_target = torch.where(inside, cos.gather(1, column), 0).squeeze(1)  # [N]
        q = torch.acos(cos).neg_().add_(hp.b).mul_(hp.k_inter).sigmoid_().mul_(hp.s)  # [N, chunk], (4)
        q.scatter_(1, column, torch.where(inside, 0, q.gather(1, column)))
        cos.scatter_(1, column, torch.where(inside, 0, cos.gather(1, column)))
        self.cos, self.q = cos, q

    def kept(self, hp: HyperParameters) -> Tensor:
        """Which entries of (6) have a gradient; NaN counts, so that it gets there."""
        kept = (self.q < hp.filter_eps * hp.s).logical_not_()
        return kept.scatter_(1, self.column, kept.gather(1, self.column) & ~self.inside)


def _forward(
    x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, chunk
) -> tuple[Tensor, ...]:
    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    dtype, (n, d), classes = ops.compute_dtype(x, w), x.shape, w.shape[0]
    # a row that counts nowhere has no other classes either; as zeros it cannot spread a NaN
    counted = target != IGNORED
    x_unit, x_norm = _unit_rows(torch.where(counted.unsqueeze(1), x.to(dtype), 0))
    inter, cos_target, cos_sum, dropped = torch.zeros(4, n, dtype=dtype, device=x.device).unbind(0)
    hardest = torch.full_like(inter, -torch.inf)
    unit_grad = torch.zeros(n if need_grad_x else 0, d, dtype=dtype, device=x.device)
    capacity = min(n * classes, ops.CHUNKED_MAX_PAIRS) if need_grad_w else 0
    pairs = torch.empty(2, capacity + n if need_grad_w else 0, dtype=torch.int64, device=x.device)
    values = torch.empty(2, pairs.shape[1], dtype=dtype, device=x.device)  # coefficient and cosine
    chunk_pairs = torch.zeros(-(-classes // chunk) + 1, dtype=torch.int64)
    listed = active = dense_blocks = 0

    for index, start in enumerate(range(0, classes, chunk)):
        block = _Block(x_unit, w, start, chunk, target, hp)
        cos_target += block.cos_target
        inter += torch.linalg.vecdot(block.q, block.cos)
        cos_sum += block.cos.sum(1)
        others = block.cos.scatter(1, block.column, torch.where(block.inside, -torch.inf, block.cos.gather(1, block.column)))
        hardest = torch.maximum(hardest, others.amax(1))
        kept = block.kept(hp) & counted.unsqueeze(1)
        found = int(kept.sum())
        active += found
        dropped += block.q.masked_fill(kept, 0).sum(1)
        dense = found > DENSE_FRACTION * kept.numel() or (need_grad_w and listed + found > capacity)
        if dense:
            dense_blocks += 1
            chunk_pairs[index] = DENSE
            if need_grad_x:
                unit_grad += block.q.masked_fill(~kept, 0) @ block.w_unit
        elif found:
            i, j = kept.nonzero(as_tuple=True)
            q = block.q[i, j]
            if need_grad_x:
                for part in range(0, found, SCATTER_PAIRS):
                    p = slice(part, part + SCATTER_PAIRS)
                    unit_grad.index_add_(0, i[p], q[p].unsqueeze(1) * block.w_unit[j[p]])
            if need_grad_w:
                new = slice(listed, listed + found)
                pairs[0, new], pairs[1, new] = i, j + start
                values[0, new], values[1, new] = q, block.cos[i, j]
                listed += found
                chunk_pairs[index] = found

    theta = torch.acos(cos_target)
    has_target = target >= 0
    p = torch.where(has_target, hp.s * torch.sigmoid(hp.k_intra * (theta - hp.a)), 0)  # [N], (3)
    intra = -p * cos_target
    invalid = target == INVALID
    intra = torch.where(invalid, torch.nan, intra)
    rows = has_target.nonzero().squeeze(1)
    if need_grad_x:
        w_own, _ = _unit_rows(w[target[rows]].to(dtype))
        unit_grad.index_add_(0, rows, -p[rows].unsqueeze(1) * w_own)
        unit_grad = _tangent(unit_grad, x_unit, x_norm)  # (7)
        unit_grad = torch.where(invalid.unsqueeze(1), torch.nan, unit_grad)
        unit_grad = torch.where(counted.unsqueeze(1), unit_grad, 0)
    if need_grad_w:
        own = slice(listed, listed + len(rows))
        pairs[0, own], pairs[1, own] = rows, target[rows]
        values[0, own], values[1, own] = -p[rows], cos_target[rows]
        chunk_pairs[-1] = len(rows)
    stats = torch.where(counted, torch.stack([intra, inter, cos_target, cos_sum, hardest, dropped]), 0)
    counts = torch.tensor([active, dense_blocks], device=x.device)
    return stats[0] + stats[1], stats, counts, unit_grad, pairs, values, chunk_pairs


def _grad_weight(
    x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, chunk, pairs, values, chunk_pairs
) -> Tensor:
    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    dtype = values.dtype
    counted = (target != IGNORED).unsqueeze(1)
    x_unit, _ = _unit_rows(torch.where(counted, x.to(dtype), 0))
    grad_row = torch.where(counted.squeeze(1), grad_row.to(dtype), 0)
    grad = torch.zeros(w.shape, dtype=dtype, device=w.device)

    for index, count in enumerate(chunk_pairs[:-1].tolist()):
        if count == DENSE:
            start = index * chunk
            block = _Block(x_unit, w, start, chunk, target, hp)
            g = block.q.masked_fill_(~block.kept(hp), 0).mul_(grad_row.unsqueeze(1))  # [N, chunk], u_i g_ij
            grad[start : start + chunk] = _tangent(g.t() @ x_unit, block.w_unit, block.w_norm)  # (8)

    total = int(chunk_pairs.clamp_min(0).sum())
    for part in range(0, total, SCATTER_PAIRS):
        p = slice(part, min(part + SCATTER_PAIRS, total))
        i, j, (g, cos) = pairs[0, p], pairs[1, p], values[:, p]
        w_unit, w_norm = _unit_rows(w[j].to(dtype))
        scale = grad_row[i] * g / w_norm.clamp_min(NORM_EPS)  # [pairs]
        along = torch.where(w_norm < NORM_EPS, 0, cos)
        grad.index_add_(0, j, scale.unsqueeze(1) * (x_unit[i] - along.unsqueeze(1) * w_unit))  # (8), a pair at a time
    return grad.to(w.dtype)


ops.implement("chunked_forward", _forward)
ops.implement("chunked_grad_weight", _grad_weight)
