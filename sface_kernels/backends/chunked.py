"""Portable PyTorch over blocks of classes: no compiler, no Triton, any device.

Reads `w` once in the forward (and again in the backward only for the rows that have a gradient). A block's cosines
`[chunk, N]` are the largest temporary; N×C is never materialised. Active pairs are listed for the backward; a block
with too many of them, or past the list's capacity, takes matrix products instead and is recomputed in the backward.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..pages import in_huge_pages
from ..precision import full_precision
from ..types import IGNORED, INVALID, NORM_EPS, Forward, HyperParameters, Request

CHUNK_ELEMENTS = 1 << 18  # chunk·N: 1 MiB of fp32 cosines stays in a CPU's cache
DENSE_FRACTION = 0.25  # active share of a block above which products beat lists (measured at D=512 and 128)
COSINE_SLACK = 1e-5  # far more than rounding moves a cosine across the filter
DENSE = -1  # in chunk_pairs: this block is recomputed with products


def unavailable(request: Request) -> str | None:
    return None


def chunk_size(rows: int) -> int:
    """Classes per block for `rows` samples, which may be symbolic."""
    return torch.sym_max(256, torch.sym_min(4096, CHUNK_ELEMENTS // torch.sym_max(rows, 1)))


def forward(x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, need_x: bool, need_w: bool) -> Forward:
    chunk = chunk_size(x.shape[0])
    return Forward.of(torch.ops.sface.chunked_forward(x, w, target, *hp, need_x, need_w, chunk))


def grad_weight(
    x: Tensor, w: Tensor, target: Tensor, hp: HyperParameters, grad_row: Tensor, saved: tuple[Tensor, ...]
) -> Tensor:
    return torch.ops.sface.chunked_grad_weight(x, w, target, grad_row, *hp, chunk_size(x.shape[0]), *saved)


class_block = chunk_size


def narrow(saved: tuple[Tensor, ...], rows: int, first: int, end: int) -> tuple[Tensor, ...]:
    pairs, coefficients, chunk_pairs = saved
    chunk = chunk_size(rows)
    before = int(chunk_pairs[: first // chunk].clamp_min(0).sum())
    return pairs[before:], coefficients[before:], chunk_pairs[first // chunk : -(-end // chunk)]


def _unit_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(t, dim=1)  # [rows]
    return t / norm.clamp_min(NORM_EPS).unsqueeze(1), norm


def _tangent_(grad_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """Gradient through normalisation, (7) and (8), in place: drop the part along the unit row, divide by the norm."""
    along = torch.linalg.vecdot(grad_unit, unit)  # [rows]
    along = torch.where(norm < NORM_EPS, 0, along)
    return grad_unit.addcmul_(unit, along.unsqueeze(1), value=-1).div_(norm.clamp_min(NORM_EPS).unsqueeze(1))


def _weighted_sums(rows: Tensor, which: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Σ weights·rows[which] over consecutive stretches of `counts` pairs, `[len(counts), D]`, in a fixed order."""
    return F.embedding_bag(which, rows, counts.cumsum(0) - counts, mode="sum", per_sample_weights=weights)


def _own_pairs(target: Tensor, classes: int, chunk: int) -> list[Tensor]:
    """The pairs of a sample and its own class in each block, by class, as numbers (class − start)·N + sample."""
    own, sample = target.sort(stable=True)  # [N]; rows without a class come first
    starts = torch.arange(0, classes + chunk, chunk, device=target.device)
    bounds = torch.searchsorted(own, starts).tolist()
    return [
        (own[low:high] - block * chunk) * len(target) + sample[low:high]
        for block, (low, high) in enumerate(itertools.pairwise(bounds))
    ]


def _surely_dropped_below(hp: HyperParameters) -> float:
    """A cosine below which no pair has a gradient."""
    if hp.filter_eps == 0:
        return -math.inf
    angle = hp.b + math.log(1 / hp.filter_eps - 1) / hp.k_inter
    return math.cos(max(angle, 0.0)) - COSINE_SLACK if angle < math.pi else -math.inf


class _Block:
    """One block of classes against all samples: cosines (1), and coefficients g_ij/s of (6), `[chunk, N]`.

    Classes come first as `w @ x̂ᵀ` is 1.6 times as fast as its transpose on a CPU (measured), and pairs in memory order
    are then sorted by class.
    """

    def __init__(
        self,
        x_unit: Tensor,
        w: Tensor,
        start: int,
        chunk: int,
        own: Tensor,
        hp: HyperParameters,
        hardest: Tensor | None = None,  # [N], of the blocks before
    ):
        self.own = own  # pairs of a sample and its own class
        self.w = w[start : start + chunk].to(x_unit.dtype)  # [chunk, D]
        self.w_norm = torch.linalg.vector_norm(self.w, dim=1)  # [chunk]
        self.inv_norm = self.w_norm.clamp_min(NORM_EPS).reciprocal().unsqueeze(1)  # [chunk, 1]
        if x_unit.dtype == torch.float64:  # used to check others by: round as the reference does
            cos = (self.w * self.inv_norm) @ x_unit.t()
        else:  # scaling the products instead of the rows spares a pass over w
            cos = (self.w @ x_unit.t()).mul_(self.inv_norm)
        self.cos = cos.clamp_(-1, 1)  # (1), 0 at own classes from here on
        self.cos_own = self.cos.view(-1)[own]
        self.cos.view(-1)[own] = -torch.inf
        self.hardest = self.cos.amax(0)  # [N], max_{j≠y} c_ij
        if hardest is not None:
            # of these rows alone the class is sought, as amax is several times as fast as what finds it
            self.harder = (self.hardest > hardest).nonzero().squeeze(1)
            self.harder_class = start + self.cos[:, self.harder].argmax(0)  # the lowest of equals
        self.cos.view(-1)[own] = 0
        self.coef = torch.acos(self.cos).sub_(hp.b).mul_(-hp.k_inter).sigmoid_()  # (2), (4)
        self.coef.view(-1)[own] = -torch.acos(self.cos_own).sub_(hp.a).mul_(hp.k_intra).sigmoid_()  # (3)

    def kept(self, filter_eps: float) -> Tensor:
        """Which entries have a gradient `[chunk, N]`; NaN counts, so that it gets there."""
        kept = (self.coef < filter_eps).logical_not_()
        kept.view(-1)[self.own] = True
        return kept


def _counted_rows(target: Tensor) -> Tensor:
    """Numbers of the rows that are not ignored; the others take part in nothing, whatever they hold."""
    return (target != IGNORED).nonzero().squeeze(1)


def _forward(  # type: ignore[no-untyped-def]
    x, w, target, s, k_intra, k_inter, a, b, filter_eps, need_grad_x, need_grad_w, chunk
) -> tuple[Tensor, ...]:
    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    dtype, (rows, d), classes = ops.compute_dtype(x, w), x.shape, w.shape[0]
    counted = _counted_rows(target)
    target, n = target[counted], len(counted)
    x_unit, x_norm = _unit_rows(x[counted].to(dtype))  # [N, D], [N]
    inter, cos_own, cos_sum, dropped = torch.zeros(4, n, dtype=dtype, device=x.device).unbind(0)
    hardest = torch.full_like(inter, -torch.inf)
    hardest_class = torch.full((n,), -1, dtype=torch.int64, device=x.device)
    unit_grad = torch.zeros(n if need_grad_x else 0, d, dtype=dtype, device=x.device)
    capacity = min(rows * classes, ops.CHUNKED_MAX_PAIRS)
    pairs = torch.empty(capacity + rows if need_grad_w else 0, dtype=torch.int64, device=x.device)
    coefficients = torch.empty(len(pairs), dtype=dtype, device=x.device)  # g_ij / s
    chunk_pairs = torch.zeros(-(-classes // chunk), dtype=torch.int64, device="cpu")
    listed = active = listed_active = dense_pairs = 0
    dropped_below = _surely_dropped_below(hp)

    for index, own in enumerate(_own_pairs(target, classes, chunk)):
        block = _Block(x_unit, w, index * chunk, chunk, own, hp, hardest)
        cos_own[own % n] = block.cos_own
        cos_sum += block.cos.sum(0)
        hardest = torch.maximum(hardest, block.hardest)
        hardest_class[block.harder] = block.harder_class
        inter += block.cos.mul_(block.coef).sum(0)
        # false for NaN, which is looked for pair by pair
        kept = None if bool((block.hardest < dropped_below).all()) else block.kept(filter_eps)
        found = 0 if kept is None else int(torch.count_nonzero(kept)) - len(own)
        active += found
        too_many = need_grad_w and listed_active + found > capacity
        if kept is not None and (too_many or found > DENSE_FRACTION * kept.numel()):
            dense_pairs += kept.numel()
            chunk_pairs[index] = DENSE
            g = block.coef * kept  # a product with 0 and 1 is three times as fast as masking (measured)
            dropped += block.coef.sub_(g).sum(0)
            if need_grad_x:
                unit_grad += g.mul_(block.inv_norm).t() @ block.w
            continue
        flat = own if kept is None else kept.view(-1).nonzero().squeeze(1)
        g = block.coef.view(-1)[flat]  # [pairs]
        block.coef.view(-1)[flat] = 0
        dropped += block.coef.sum(0)
        if need_grad_x and len(flat):
            j, i = flat // n, flat % n
            by_sample = i.argsort(stable=True)
            scaled = (g * block.inv_norm.view(-1)[j])[by_sample]
            unit_grad += _weighted_sums(block.w, j[by_sample], scaled, torch.bincount(i, minlength=n))
        if need_grad_w:
            new = slice(listed, listed + len(flat))
            pairs[new], coefficients[new], chunk_pairs[index] = flat, g, len(flat)
            listed, listed_active = listed + len(flat), listed_active + found

    p_own = torch.sigmoid(hp.k_intra * (torch.acos(cos_own) - hp.a))  # [N], (3) without s
    intra = (-p_own * cos_own).where(target >= 0, 0).masked_fill_(target == INVALID, torch.nan)
    stats = torch.zeros(6, rows, dtype=dtype, device=x.device)
    stats[:, counted] = torch.stack([hp.s * intra, hp.s * inter, cos_own, cos_sum, hardest, hp.s * dropped])
    grad_x = torch.zeros(rows if need_grad_x else 0, d, dtype=dtype, device=x.device)
    if need_grad_x:
        unit_grad = _tangent_(unit_grad, x_unit, x_norm).mul_(hp.s)  # (7)
        grad_x[counted] = unit_grad.masked_fill_((target == INVALID).unsqueeze(1), torch.nan)
    class_of_hardest = torch.full((rows,), -1, dtype=torch.int64, device=x.device)
    class_of_hardest[counted] = torch.where(hardest.isfinite(), hardest_class, -1)
    counts = torch.tensor([active, dense_pairs], device=x.device)
    return stats[0] + stats[1], stats, class_of_hardest, counts, grad_x, pairs, coefficients, chunk_pairs


def _grad_weight(  # type: ignore[no-untyped-def]
    x, w, target, grad_row, s, k_intra, k_inter, a, b, filter_eps, chunk, pairs, coefficients, chunk_pairs
) -> Tensor:
    hp = HyperParameters(s, k_intra, k_inter, a, b, filter_eps)
    dtype, counted = coefficients.dtype, _counted_rows(target)
    target, n = target[counted], len(counted)
    x_unit, _ = _unit_rows(x[counted].to(dtype))
    u = grad_row[counted].to(dtype) * hp.s
    # all written now: every thread faults pages then, where scattered rows would leave the faults to one
    grad = in_huge_pages(torch.empty(w.shape, dtype=w.dtype, device=w.device)).zero_()
    if not bool(u.isfinite().all()):  # times the least coefficient it is NaN, and every class has one
        return grad.fill_(torch.nan)
    used = 0

    for index, (count, own) in enumerate(zip(chunk_pairs.tolist(), _own_pairs(target, w.shape[0], chunk), strict=True)):
        start = index * chunk
        w_block, grad_block = w[start : start + chunk], grad[start : start + chunk]
        if count == DENSE:
            block = _Block(x_unit, w, start, chunk, own, hp)
            g = block.coef.mul_(block.kept(filter_eps)).mul_(u)  # u_i g_ij
            grad_block.copy_(_tangent_(g @ x_unit, block.w * block.inv_norm, block.w_norm))  # (8)
        elif count > 0:
            flat, g = pairs[used : used + count], coefficients[used : used + count]
            used += count
            i, per_class = flat % n, torch.bincount(flat // n, minlength=len(w_block))
            # where most classes have a pair, all of them cost less than gathering and scattering rows
            which = slice(None) if count > len(w_block) else per_class.nonzero().squeeze(1)
            w_unit, w_norm = _unit_rows(w_block[which].to(dtype))
            sums = _weighted_sums(x_unit, i, u[i] * g, per_class[which])
            grad_block[which] = _tangent_(sums, w_unit, w_norm).to(w.dtype)  # (8)
    return grad


ops.implement("chunked_forward", full_precision(_forward))
ops.implement("chunked_grad_weight", full_precision(_grad_weight))
