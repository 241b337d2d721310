"""Inputs made on the GPU, three densities of active pairs, and the truth in fp64 for a few rows of each result."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

S, K, A, B = 64.0, 80.0, 0.80, 1.23
FAST_EPS = 2.0**-16
DEVICE = "cuda"
ACTIVE_COSINE = math.cos(B + math.log(1 / FAST_EPS - 1) / K)  # from which a pair is active at FAST_EPS


class Inputs(NamedTuple):
    x: Tensor  # [N, D]
    w: Tensor  # [C, D]
    y: Tensor  # [N]


def leaves(inputs: Inputs) -> Inputs:
    """The same values, asking for gradients."""
    return Inputs(inputs.x.detach().requires_grad_(), inputs.w.detach().requires_grad_(), inputs.y)


def random(n: int, c: int, d: int, dtype=torch.bfloat16, weight_dtype=torch.float32, seed: int = 0) -> Inputs:
    """A head at initialisation: independent directions, positives included."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    x = torch.randn(n, d, generator=g, device=DEVICE).to(dtype)
    w = torch.empty(c, d, device=DEVICE, dtype=weight_dtype).normal_(0, 2 * math.sqrt(2 / c), generator=g)
    return Inputs(x, w, torch.randint(0, c, (n,), generator=g, device=DEVICE))


def dense(
    n: int, c: int, d: int, share: float, dtype=torch.bfloat16, weight_dtype=torch.float32, seed: int = 0
) -> Inputs:
    """An early epoch: a common direction in every row, as strong as makes `share` of the pairs active at FAST_EPS."""
    x, w, y = random(n, c, d, torch.float32, torch.float32, seed)
    g = torch.Generator(DEVICE).manual_seed(seed + 1)
    axis = F.normalize(torch.randn(d, generator=g, device=DEVICE), dim=0)
    x_part, w_part = (0.5 + torch.rand(size, 1, generator=g, device=DEVICE) for size in (n, c))
    x, w = F.normalize(x), w.div_(w.norm(dim=1, keepdim=True))

    def mixed(strength: float, rows: Tensor, part: Tensor) -> Tensor:
        return rows + (strength * part) * axis

    low, high = 0.0, 2.0
    step = max(1, c // 8192)
    for _ in range(20):
        strength = (low + high) / 2
        cos = F.normalize(mixed(strength, x, x_part)) @ F.normalize(mixed(strength, w[::step], w_part[::step])).t()
        low, high = (strength, high) if (cos >= ACTIVE_COSINE).float().mean() < share else (low, strength)
    x = mixed(high, x, x_part)
    w += (high * w_part) * axis
    return Inputs(x.to(dtype), w.to(weight_dtype), y)


class Truth(NamedTuple):
    """fp64 results of some rows and classes of Σ_i u_i l_i, every pair counted."""

    row_loss: Tensor  # [rows]
    grad_x: Tensor  # [rows, D]
    grad_w: Tensor  # [classes, D]


def truth(inputs: Inputs, rows: Tensor, classes: Tensor, upstream: Tensor) -> Truth:
    """Equations (1) to (8) for `rows` against every class, and for `classes` against every row."""

    def coefficients(cos: Tensor, own: Tensor) -> Tensor:
        theta = cos.clamp(-1, 1).acos()
        return torch.where(own, -S * torch.sigmoid(K * (theta - A)), S * torch.sigmoid(-K * (theta - B)))

    c = len(inputs.w)
    x, w, y = inputs.x[rows].double(), inputs.w, inputs.y[rows]
    unit_x = F.normalize(x)
    loss = torch.zeros(len(rows), dtype=torch.float64, device=x.device)
    raw = torch.zeros_like(x)
    for first in range(0, c, 1 << 17):
        unit_w = F.normalize(w[first : first + (1 << 17)].double())
        cos = unit_x @ unit_w.t()
        own = torch.arange(first, first + len(unit_w), device=x.device) == y[:, None]
        g = coefficients(cos, own)
        loss += (g * cos).sum(1)
        raw += g @ unit_w
    tangent = raw - (raw * unit_x).sum(1, keepdim=True) * unit_x
    grad_x = upstream[rows, None].double() * tangent / x.norm(dim=1, keepdim=True)

    unit_x, rows_w = F.normalize(inputs.x.double()), w[classes].double()
    unit_w = F.normalize(rows_w)
    cos = unit_x @ unit_w.t()
    g = coefficients(cos, inputs.y[:, None] == classes) * upstream[:, None].double()
    raw = g.t() @ unit_x
    grad_w = (raw - (raw * unit_w).sum(1, keepdim=True) * unit_w) / rows_w.norm(dim=1, keepdim=True)
    return Truth(loss, grad_x, grad_w)
