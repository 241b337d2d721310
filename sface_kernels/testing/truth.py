"""The loss and its gradients in float64, by equations (1) to (8), and errors against them.

Three float64 matrix products over blocks of classes, 6·N·C·D flop. Never materialised: N×C. The largest
tensor is the gradient of w, 8·C·D bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .workloads import A, B, K, S

NEGLIGIBLE = 1e-20  # a gradient below this norm counts as zero (D = 1 has none): its error stays absolute
NOTHING = 1e-300  # for a loss without terms
BLOCK_ELEMENTS = 1 << 21  # N·block and block·D stay near 16 MiB of float64 each


class Errors(NamedTuple):
    """Relative errors: |loss error| / magnitude, and Frobenius norms for the gradients."""

    loss: float
    grad_x: float
    grad_w: float


class Truth(NamedTuple):
    """Of the mean over rows; `magnitude`, the mean of the terms' absolute values, scales the loss's error."""

    loss: float
    magnitude: float
    grad_x: Tensor  # [N, D] float64
    grad_w: Tensor  # [C, D] float64
    rounding: Errors  # what the roundings may cost at most, and pairs on the edge of the filter
    dropped_loss: float  # share of `magnitude` in the terms of dropped pairs


@torch.no_grad()
def compute_truth(
    x: Tensor,
    w: Tensor,
    y: Tensor,
    filter_eps: float = 0.0,
    dtype: torch.dtype = torch.float32,
    any_order: bool = False,
) -> Truth:
    """Of `x` [N, D], `w` [C, D] of any float dtype, taken at their stored values, and `y` [N] class numbers,
    negative for a row that does not count.

    With `filter_eps`, what a filtered backend is meant to return: gradients without the entries whose
    q_ij < filter_eps·s, projected with the sum over the entries kept, and the loss of all pairs. `dtype` is what
    the result to be judged is computed in. `any_order` counts every rounding of its sums, as is needed where no
    reference tells how they add up: an a-priori bound, some hundred times what is seen.
    """
    counted = y >= 0
    (n, d), c, rows = x.shape, w.shape[0], max(1, int(counted.sum()))
    x_unit, x_norm = _unit_rows(torch.where(counted.unsqueeze(1), x, 0))
    block = max(256, BLOCK_ELEMENTS // max(n, d))
    row_loss, row_magnitude, row_kept, row_dropped, error_loss, error_x = x_unit.new_zeros(6, n)
    error_w, grad_w, grad_x_unit = x_unit.new_zeros(c), x_unit.new_empty(c, d), torch.zeros_like(x_unit)
    for start in range(0, c, block):
        w_unit, w_norm = _unit_rows(w[start : start + block])
        cos = (x_unit @ w_unit.t()).clamp_(-1, 1)  # [N, block], (1)
        theta = torch.acos(cos)
        coef = S * torch.sigmoid(-K * (theta - B))  # (4)
        coef[~counted] = 0
        dropped = coef < filter_eps * S
        own = ((y >= start) & (y < start + block)).nonzero().squeeze(1)
        column = y[own] - start
        coef[own, column] = -S * torch.sigmoid(K * (theta[own, column] - A))  # (3), (6)
        dropped[own, column] = False
        terms = coef * cos
        row_loss += terms.sum(1)  # (5)
        row_magnitude += terms.abs().sum(1)
        of_loss, of_coef = _roundings(coef, cos, theta, filter_eps, d, any_order, dtype)
        error_loss += of_loss.sum(1)
        error_x += of_coef.sum(1)
        error_w[start : start + block] = of_coef.sum(0) / w_norm.squeeze(1)
        row_dropped += torch.where(dropped, terms.abs(), 0).sum(1)
        coef.masked_fill_(dropped, 0)
        terms.masked_fill_(dropped, 0)
        row_kept += terms.sum(1)
        grad_x_unit += coef @ w_unit
        grad_w_unit = coef.t() @ x_unit - terms.sum(0).unsqueeze(1) * w_unit  # [block, D]
        grad_w[start : start + block] = grad_w_unit / (rows * w_norm)  # (8)
    grad_x = (grad_x_unit - row_kept.unsqueeze(1) * x_unit) / (rows * x_norm)  # (7)
    magnitude = float(row_magnitude.sum()) / rows
    loss, loss_rounding, dropped_loss = (float(t.sum()) / rows for t in (row_loss, error_loss, row_dropped))
    rounding = Errors(
        loss_rounding / max(magnitude, NOTHING),
        float((error_x / x_norm.squeeze(1)).norm()) / rows / _size(grad_x),
        float(error_w.norm()) / rows / _size(grad_w),
    )
    return Truth(loss, magnitude, grad_x, grad_w, rounding, dropped_loss / max(magnitude, NOTHING))


def measure_errors(truth: Truth, loss: Tensor, grad_x: Tensor, grad_w: Tensor) -> Errors:
    """Errors of a loss and its two gradients; not a number where something is not finite."""

    def distance(ours: Tensor, exact: Tensor) -> float:
        parts = zip(ours.split(8192), exact.split(8192), strict=True)  # no second copy in float64
        return math.sqrt(sum(float((a.double() - b).square().sum()) for a, b in parts)) / _size(exact)

    of_loss = abs(float(loss) - truth.loss) / max(truth.magnitude, NOTHING)
    return Errors(of_loss, distance(grad_x, truth.grad_x), distance(grad_w, truth.grad_w))


def _unit_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.double()
    norm = t.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return t / norm, norm


def _size(grad: Tensor) -> float:
    return max(float(grad.norm()), NEGLIGIBLE) if grad.numel() else 1.0


def _roundings(
    coef: Tensor, cos: Tensor, theta: Tensor, filter_eps: float, d: int, any_order: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Per pair `[N, block]`, what the roundings move in a term of the loss and in a coefficient, at most: one rounding
    of each, or those of sums over D terms in any order. On either side of the filter is a whole coefficient."""
    unit, size = torch.finfo(dtype).eps / 2, coef.abs()
    worst = 2 * d + 8  # of a cosine, in units of the roundoff: D for the product, D/2 + 2 a norm, 4 for the divisions
    sums, cos_scale = (worst, torch.ones_like(cos)) if any_order else (1, cos.abs())
    sine = (1 - cos**2).sqrt_().clamp_min_(unit**0.5)
    slope = K * size * (1 - size / S)  # |∂p/∂θ|, |∂q/∂θ|
    of_coef = slope * unit * (theta + sums * cos_scale / sine) + 2 * unit * sums * size
    of_loss = of_coef * cos.abs() + unit * size
    if filter_eps:
        width = K * unit * (worst / sine + 2 * math.pi) + 8 * unit
        of_coef += torch.where((coef > 0) & ((coef / (filter_eps * S)).log().abs() <= width), coef, 0)
    return of_loss, of_coef
