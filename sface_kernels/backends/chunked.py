"""Portable PyTorch over blocks of classes: no compiler, no Triton, any device.

Reads `w` once in the forward (and again in the backward only for the rows of active pairs). A block's cosines
`[N, chunk]` are the largest temporary; N×C is never materialised. Active pairs are listed for the backward; a block
with too many of them, or past the list's capacity, takes matrix products instead and is recomputed in the backward.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from .. import ops
from ..types import IGNORED, INVALID, Forward, HyperParameters, RowStats

NORM_EPS = 1e-12  # torch.nn.functional.normalize's
CHUNK_ELEMENTS = 1 << 18  # N·chunk: 1 MiB of fp32 cosines stays in a CPU's cache
DENSE_FRACTION = 0.02  # active share of a block above which a product beats gathering rows (measured, D=512)
HUGE_BYTES = 32 << 20
SCATTER_PAIRS = 4096  # pairs whose [pairs, D] terms exist at once
DENSE = -1  # in chunk_pairs: this block is recomputed with products


def unavailable(device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype) -> str | None:
    return None


def chunk_size(rows: int) -> int:
    """Classes per block for `rows` samples."""
    return max(256, min(8192, CHUNK_ELEMENTS // max(rows, 1)))


def forward(x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool) -> Forward:
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
    return torch.ops.sface.chunked_grad_weight(x, w, target, grad_row, *hp, chunk_size(x.shape[0]), *saved)


def _unit_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(t, dim=1)  # [rows]
    return t / norm.clamp_min(NORM_EPS).unsqueeze(1), norm


def _tangent(grad_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient through normalisation, (7) and (8): drop the part along the unit row, divide by the norm."""
    along = (grad_unit * unit).sum(1)  # [rows]
    along = torch.where(norm < NORM_EPS, torch.zeros_like(along), along)
    return (grad_unit - along.unsqueeze(1) * unit) / norm.clamp_min(NORM_EPS).unsqueeze(1)


class _Block:
    """One block of classes: cosines (1) and weights q_ij/s (4), the own classes taken out of both."""

    def __init__(self, x_unit: Tensor, w: Tensor, start: int, chunk: int, target: Tensor, hp: HyperParameters):
        self.w = w[start : start + chunk].to(x_unit.dtype)  # [chunk, D]
        self.w_norm = torch.linalg.vector_norm(self.w, dim=1)  # [chunk]
        self.inv_norm = self.w_norm.clamp_min(NORM_EPS).reciprocal()
        if x_unit.dtype == torch.float64:  # used to check others by: round as the reference does
            cos = x_unit @ (self.w * self.inv_norm.unsqueeze(1)).t()
        else:  # scaling the products instead of the rows spares a pass over w
            cos = (x_unit @ self.w.t()).mul_(self.inv_norm)
        self.cos = cos.clamp_(-1, 1)  # [N, chunk], (1)
        column = target - start
        self.inside = ((column >= 0) & (column < self.cos.shape[1])).unsqueeze(1)  # [N, 1]
        self.column = column.clamp(0, self.cos.shape[1] - 1).unsqueeze(1)  # [N, 1]
        self.cos_target = torch.where(self.inside, self.cos.gather(1, self.column), 0).squeeze(1)  # [N]
        theta = torch.acos(self.cos)  # (2)
        self.weight = theta.sub_(hp.b).mul_(-hp.k_inter).sigmoid_()  # [N, chunk], (4) without s
        self._set_own(self.weight, 0)
        self._set_own(self.cos, 0)

    def _set_own(self, values: Tensor, value: float) -> None:
        # rows whose class lies in another block write back what stands in column 0
        values.scatter_(1, self.column, values.gather(1, self.column).masked_fill_(self.inside, value))

    def hardest(self) -> Tensor:
        """max_{j≠y} c_ij over the block, `[N]`."""
        self._set_own(self.cos, -torch.inf)
        hardest = self.cos.amax(1)
        self._set_own(self.cos, 0)
        return hardest

    def kept(self, hp: HyperParameters, counted: Tensor) -> Tensor:
        """Which entries of (6) have a gradient `[N, chunk]`; NaN counts, so that it gets there."""
        kept = (self.weight < hp.filter_eps).logical_not_().logical_and_(counted)
        self._set_own(kept, False)
        return kept

    def unit_rows(self, rows: Tensor) -> Tensor:
        return self.w[rows] * self.inv_norm[rows].unsqueeze(1)


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; large ones on a Linux CPU in fresh huge pages, whose faults cost a quarter of small pages' (measured)."""
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or size < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    # private: the default would be shared with forked workers
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages: small ones then
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _forward(
    x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, chunk
) -> tuple[Tensor, ...]:
    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    dtype, (n, d), classes = ops.compute_dtype(x, w), x.shape, w.shape[0]
    # a row that counts nowhere has no other classes either; as zeros it cannot spread a NaN
    counted = (target != IGNORED).unsqueeze(1)  # [N, 1]
    x_unit, x_norm = _unit_rows(torch.where(counted, x.to(dtype), 0))
    inter, cos_target, cos_sum, dropped = torch.zeros(4, n, dtype=dtype, device=x.device).unbind(0)
    hardest = torch.full_like(inter, -torch.inf)
    unit_grad = torch.zeros(n if need_grad_x else 0, d, dtype=dtype, device=x.device)
    capacity = min(n * classes, ops.CHUNKED_MAX_PAIRS) if need_grad_w else 0
    pairs = torch.empty(2, capacity + n if need_grad_w else 0, dtype=torch.int64, device=x.device)
    values = torch.empty(2, pairs.shape[1], dtype=dtype, device=x.device)  # coefficient / s, and cosine
    chunk_pairs = torch.zeros(-(-classes // chunk) + 1, dtype=torch.int64)
    listed = active = dense_blocks = 0

    for index, start in enumerate(range(0, classes, chunk)):
        block = _Block(x_unit, w, start, chunk, target, hp)
        cos_target += block.cos_target
        inter += torch.linalg.vecdot(block.weight, block.cos)
        cos_sum += block.cos.sum(1)
        hardest = torch.maximum(hardest, block.hardest())
        kept = block.kept(hp, counted)
        found = int(kept.sum())
        active += found
        if found > DENSE_FRACTION * kept.numel() or (need_grad_w and listed + found > capacity):
            dense_blocks += 1
            chunk_pairs[index] = DENSE
            dropped += block.weight.masked_fill(kept, 0).sum(1)
            if need_grad_x:
                unit_grad += block.weight.masked_fill_(~kept, 0).mul_(block.inv_norm) @ block.w
            continue
        if found:
            i, j = kept.nonzero(as_tuple=True)
            weight = block.weight[i, j]  # [pairs]
            block.weight[i, j] = 0
            if need_grad_x:
                for part in range(0, found, SCATTER_PAIRS):
                    p = slice(part, part + SCATTER_PAIRS)
                    unit_grad.index_add_(0, i[p], weight[p].unsqueeze(1) * block.unit_rows(j[p]))
            if need_grad_w:
                new = slice(listed, listed + found)
                pairs[0, new], pairs[1, new] = i, j + start
                values[0, new], values[1, new] = weight, block.cos[i, j]
                listed += found
                chunk_pairs[index] = found
        dropped += block.weight.sum(1)

    p_own = torch.sigmoid(hp.k_intra * (torch.acos(cos_target) - hp.a))  # [N], (3) without s
    rows = (target >= 0).nonzero().squeeze(1)
    p_own = torch.where(target >= 0, p_own, 0)
    invalid = target == INVALID
    intra = torch.where(invalid, torch.nan, -p_own * cos_target)
    if need_grad_x:
        w_own, _ = _unit_rows(w[target[rows]].to(dtype))
        unit_grad.index_add_(0, rows, -p_own[rows].unsqueeze(1) * w_own)
        unit_grad = hp.s * _tangent(unit_grad, x_unit, x_norm)  # (7)
        unit_grad = torch.where(invalid.unsqueeze(1), torch.nan, unit_grad)
        unit_grad = torch.where(counted, unit_grad, 0)
    if need_grad_w:
        own = slice(listed, listed + len(rows))
        pairs[0, own], pairs[1, own] = rows, target[rows]
        values[0, own], values[1, own] = -p_own[rows], cos_target[rows]
        chunk_pairs[-1] = len(rows)
    stats = torch.stack([hp.s * intra, hp.s * inter, cos_target, cos_sum, hardest, hp.s * dropped])
    stats = torch.where(counted.squeeze(1), stats, 0)
    counts = torch.tensor([active, dense_blocks], device=x.device)
    return stats[0] + stats[1], stats, counts, unit_grad, pairs, values, chunk_pairs


def _grad_weight(
    x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, chunk, pairs, values, chunk_pairs
) -> Tensor:
    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    dtype = values.dtype
    counted = (target != IGNORED).unsqueeze(1)  # [N, 1]
    x_unit, _ = _unit_rows(torch.where(counted, x.to(dtype), 0))
    grad_row = torch.where(counted.squeeze(1), grad_row.to(dtype), 0) * hp.s
    grad = _zeros(w.shape, dtype, w.device)

    for index, count in enumerate(chunk_pairs[:-1].tolist()):
        if count == DENSE:
            start = index * chunk
            block = _Block(x_unit, w, start, chunk, target, hp)
            g = block.weight.masked_fill_(~block.kept(hp, counted), 0).mul_(grad_row.unsqueeze(1))  # u_i g_ij
            w_unit = block.w * block.inv_norm.unsqueeze(1)
            grad[start : start + chunk] = _tangent(g.t() @ x_unit, w_unit, block.w_norm)  # (8)

    total = int(chunk_pairs.clamp_min(0).sum())
    for part in range(0, total, SCATTER_PAIRS):
        p = slice(part, min(part + SCATTER_PAIRS, total))
        i, j, (g, cos) = pairs[0, p], pairs[1, p], values[:, p]
        w_unit, w_norm = _unit_rows(w[j].to(dtype))
        scale = grad_row[i] * g / w_norm.clamp_min(NORM_EPS)  # [pairs]
        along = torch.where(w_norm < NORM_EPS, 0, cos)
        # (8), a pair at a time
        grad.index_add_(0, j, scale.unsqueeze(1) * (x_unit[i] - along.unsqueeze(1) * w_unit))
    return grad.to(w.dtype)


ops.implement("chunked_forward", _forward)
ops.implement("chunked_grad_weight", _grad_weight)
