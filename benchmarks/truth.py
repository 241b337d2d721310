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
BLOCK_ELEMENTS = 1 << 21  # N·block and block·D stay near 16 MiB of float64 each


class Truth(NamedTuple):
    """Of the mean over rows; `magnitude`, the mean of the terms' absolute values, scales the loss's error."""

    loss: float
    magnitude: float
    grad_x: Tensor  # [N, D] float64
    grad_w: Tensor  # [C, D] float64


class Errors(NamedTuple):
    """Relative errors: |loss error| / magnitude, and Frobenius norms for the gradients."""

    loss: float
    grad_x: float
    grad_w: float


def _unit_rows(t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.double()
    norm = t.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return t / norm, norm


@torch.no_grad()
def compute_truth(x: Tensor, w: Tensor, y: Tensor, filter_eps: float = 0.0) -> Truth:
    """Of `x` [N, D], `w` [C, D] of any float dtype, taken at their stored values, and `y` [N] class numbers.

    With `filter_eps`, what a filtered backend is meant to return: gradients without the entries whose
    q_ij < filter_eps·s, projected with the sum over the entries kept, and the loss of all pairs.
    """
    (n, d), c = x.shape, w.shape[0]
    x_unit, x_norm = _unit_rows(x)
    block = max(256, BLOCK_ELEMENTS // max(n, d))
    row_loss, row_magnitude, row_kept = torch.zeros(3, n, dtype=torch.float64)
    grad_x_unit = torch.zeros(n, d, dtype=torch.float64)
    grad_w = torch.empty(c, d, dtype=torch.float64)
    for start in range(0, c, block):
        w_unit, w_norm = _unit_rows(w[start : start + block])
        cos = (x_unit @ w_unit.t()).clamp_(-1, 1)  # [N, block], (1)
        coef = S * torch.sigmoid(-K * (torch.acos(cos) - B))  # (4)
        dropped = coef < filter_eps * S
        own = ((y >= start) & (y < start + block)).nonzero().squeeze(1)
        column = y[own] - start
        coef[own, column] = -S * torch.sigmoid(K * (torch.acos(cos[own, column]) - A))  # (3), (6)
        terms = coef * cos
        row_loss += terms.sum(1)  # (5)
        row_magnitude += terms.abs().sum(1)
        dropped[own, column] = False
        coef.masked_fill_(dropped, 0)
        terms.masked_fill_(dropped, 0)
        row_kept += terms.sum(1)
        grad_x_unit += coef @ w_unit
        grad_w_unit = coef.t() @ x_unit - terms.sum(0).unsqueeze(1) * w_unit  # [block, D]
        grad_w[start : start + block] = grad_w_unit / (n * w_norm)  # (8)
    grad_x = (grad_x_unit - row_kept.unsqueeze(1) * x_unit) / (n * x_norm)  # (7)
    return Truth(float(row_loss.mean()), float(row_magnitude.mean()), grad_x, grad_w)


def _distance(ours: Tensor, truth: Tensor) -> float:
    total = 0.0
    for start in range(0, truth.shape[0], 8192):
        rows = slice(start, start + 8192)
        total += float((ours[rows].double() - truth[rows]).square().sum())
    return math.sqrt(total) / max(float(truth.norm()), NEGLIGIBLE)


def measure_errors(truth: Truth, loss: Tensor, grad_x: Tensor, grad_w: Tensor) -> Errors:
    """Errors of a loss and its two gradients; not a number where something is not finite."""
    return Errors(
        loss=abs(float(loss) - truth.loss) / max(truth.magnitude, 1e-300),
        grad_x=_distance(grad_x, truth.grad_x),
        grad_w=_distance(grad_w, truth.grad_w),
    )
