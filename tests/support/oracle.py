"""The truth: the loss in plain fp64 PyTorch, written without the backends and differentiated by autograd.

`truth` evaluates equations (1)-(5) on fp64 copies of the inputs with p and q detached, so that autograd alone yields (7)
and (8). It also says how far roundings may move each result (`Bounds`), the part of a tolerance that does not come from
measuring the reference, and how far the filter may (`missing_*`).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sface_kernels.backends import native
from sface_kernels.backends.triton import device, plan
from sface_kernels.types import HyperParameters

DEFAULTS = {"s": 64.0, "k": 80.0, "a": 0.80, "b": 1.23}


def int8_screen(features: int, k: float) -> bool:
    """Whether the C++ backend screens such rows in int8 here, where it screens at all: docs/math.md, 3."""
    if native.missing is not None:
        return False
    chosen = os.environ.get("SFACE_CPU_ISA") or torch.ops.sface.native_instruction_sets()[0]
    return chosen in ("avx512_amx", "avx512_vnni") and features >= 256 and k <= 160


# How far a screen may move a cosine, in six standard deviations of its roundings.
def step_error(x_steps: Tensor, w_steps: Tensor) -> Tensor:
    """Inner products of unit rows rounded to steps `[N, 1]` and `[C, 1]`: each row adds an error of standard deviation
    step/√12 whatever D is, as the other row has norm 1."""
    return 6 * ((x_steps**2 + w_steps.t() ** 2) / 12).sqrt()


def int8_steps(unit: Tensor) -> Tensor:
    """`[N, 1]`: int8 of a row's largest component / 127."""
    return unit.abs().amax(1, keepdim=True) / 127


def native_screen_error(x_unit: Tensor, w_unit: Tensor, k: float) -> Tensor:
    if int8_screen(x_unit.shape[1], k):
        return step_error(int8_steps(x_unit), int8_steps(w_unit))
    return step_error(*(torch.full((len(rows), 1), 1 / 32766, dtype=torch.float64) for rows in (x_unit, w_unit)))


def triton_screen_error(x_unit: Tensor, w_unit: Tensor, k: float, b: float, filter_eps: float) -> Tensor:
    """In fp16 each component moves by a relative 2⁻¹¹/√3 at most, or by half a subnormal step."""
    family = device.gpu_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")).family
    if plan.screens_int8(HyperParameters(1.0, k, k, 0.8, b, filter_eps), x_unit.shape[1], family):
        return step_error(int8_steps(x_unit), int8_steps(w_unit))
    relative = (x_unit**2 @ (w_unit**2).t()).sqrt() * 2.0**-11
    return 6 * (2 / 3) ** 0.5 * (relative + 2.0**-25)


class Bounds(NamedTuple):
    """How far roundings may move a result, at their worst signs."""

    loss: Tensor  # [N], |error| of l_i
    x: Tensor  # [N], norm of the error of ∂x_i
    w: Tensor  # [C]


class Truth(NamedTuple):
    row_loss: Tensor  # [N]
    intra: Tensor  # [N]
    inter: Tensor  # [N]
    cos: Tensor  # [N, C]
    q: Tensor  # [N, C], 0 at the own class and in ignored rows
    active: Tensor  # [N, C] bool, pairs that the filter keeps; never the own class
    borderline: Tensor  # [N, C] bool, pairs that computation in `dtype` may put on either side of the filter
    dropped: Tensor  # [N], Σ of the dropped q
    grad_x: Tensor  # [N, D], of Σ_i u_i l_i with the dropped pairs left out
    grad_w: Tensor  # [C, D]
    full_grad_x: Tensor  # [N, D], with every pair
    full_grad_w: Tensor  # [C, D]
    missing_x: Tensor  # [N], bound of ‖full_grad_x − grad_x‖ from the dropped q alone
    missing_w: Tensor  # [C]
    flip_x: Tensor  # [N], what the borderline pairs weigh, whichever side they fall on
    flip_w: Tensor  # [C]
    one_rounding: Bounds  # of every cosine, angle and term, at its own scale
    worst: Bounds  # the a-priori bound that any correct computation keeps: `worst_cosine_roundings`
    screen_loss: dict[
        str, Tensor
    ]  # [N] by backend, what taking the dropped pairs' cosines from its screen may move in l_i


def threshold_angle(k: float, b: float, filter_eps: float) -> float:
    """The angle at which sigmoid(−k (θ − b)) equals filter_eps."""
    eps = torch.tensor(filter_eps, dtype=torch.float64)
    return float(b + torch.log((1 - eps) / eps) / k)


def borderline_width(cos: Tensor, features: int, k: float, unit: float) -> Tensor:
    """Relative width of q within which arithmetic of unit roundoff `unit` may decide the filter either way.

    ln q moves by k·δθ, up to roundings of q. δθ is the rounding of the angle itself (two ulp of a value below π) plus
    δc/√(1 − c²), δc as in `worst_cosine_roundings`.
    """
    sine = (1 - cos.clamp(-1, 1) ** 2).sqrt().clamp_min(unit**0.5)
    return k * unit * (worst_cosine_roundings(features) / sine + 2 * torch.pi) + 8 * unit


def worst_cosine_roundings(features: int) -> float:
    """Bound in units of u of the error of a cosine: D for the inner product, D/2 + 2 for each norm, 4 for the divisions.

    By Cauchy-Schwarz it needs no factor, as the rows have norm 1; any order of summation stays within it.
    """
    return 2 * features + 8


def truth(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    upstream: Tensor | None = None,
    *,
    s: float = 64.0,
    k: float = 80.0,
    a: float = 0.80,
    b: float = 1.23,
    k_inter: float | None = None,
    filter_eps: float = 0.0,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float32,
) -> Truth:
    """Everything about Σ_i upstream_i l_i. `dtype` is what the result under test computes in."""
    k_inter = k if k_inter is None else k_inter
    unit = torch.finfo(dtype).eps / 2
    x64 = x.detach().double().cpu().clone().requires_grad_()
    w64 = w.detach().double().cpu().clone().requires_grad_()
    y = labels.detach().cpu().reshape(-1).long()
    counted = y != ignore_index
    u = torch.ones(len(x), dtype=torch.float64) if upstream is None else upstream.detach().double().cpu()
    u = torch.where(counted, u, 0)

    with torch.enable_grad():
        cos = F.normalize(x64) @ F.normalize(w64).t()
    c = cos.detach()
    theta = c.clamp(-1, 1).acos()
    own = torch.zeros_like(c, dtype=torch.bool)
    own[counted, y[counted]] = True
    others = ~own & counted.unsqueeze(1)
    p = torch.where(own, s * torch.sigmoid(k * (theta - a)), 0)
    q = torch.where(others, s * torch.sigmoid(-k_inter * (theta - b)), 0)
    active = others & (q >= filter_eps * s)
    dropped_q = torch.where(active, 0, q)

    with torch.enable_grad():
        every = (u * ((q - p) * cos).sum(1)).sum()
        kept = (u * ((torch.where(active, q, 0) - p) * cos).sum(1)).sum()
    full_x, full_w = torch.autograd.grad(every, (x64, w64), retain_graph=True)
    kept_x, kept_w = torch.autograd.grad(kept, (x64, w64))

    log_ratio = torch.log(q / (filter_eps * s)) if filter_eps > 0 else torch.full_like(q, torch.inf)
    borderline = others & (log_ratio.abs() <= borderline_width(c, x.shape[1], k_inter, unit))
    border_q = torch.where(borderline, q, 0)

    x_scale = u.abs() / x64.detach().norm(dim=1).clamp_min(1e-12)
    w_scale = 1 / w64.detach().norm(dim=1).clamp_min(1e-12)

    def on_x(coefficients: Tensor) -> Tensor:
        """Norm of ∂x_i if every pair added its coefficient times a unit vector, all parallel."""
        return x_scale * coefficients.sum(1)

    def on_w(coefficients: Tensor) -> Tensor:
        return w_scale * (u.abs().unsqueeze(1) * coefficients).sum(0)

    # |∂(p + q)/∂θ| of (3) and (4), and what the roundings of a cosine and an angle make of it
    slope = p * (1 - p / s) * k + q * (1 - q / s) * k_inter
    sine = (1 - c.clamp(-1, 1) ** 2).sqrt().clamp_min(unit**0.5)

    def bounds(cos_error: Tensor | float, roundings: float) -> Bounds:
        coefficient = slope * (unit * theta + cos_error / sine) + unit * (p + q) + s * torch.finfo(dtype).tiny
        # each coefficient multiplies a cosine, or a tangent: the difference of two vectors no longer than 1
        product = coefficient + unit * roundings * (p + q)
        return Bounds((coefficient * c.abs() + unit * roundings * (p + q)).sum(1), on_x(product), on_w(product))

    worst = worst_cosine_roundings(x.shape[1])
    sensitivity = torch.where(active, 0, q + q * (1 - q / s) * k_inter * c.abs() / sine)  # [N, C], of l_i to a cosine
    units = F.normalize(x64.detach()), F.normalize(w64.detach())
    screens = {
        "native": native_screen_error(*units, k_inter),
        "triton": triton_screen_error(*units, k_inter, b, filter_eps),
    }
    # an int8 cosine may be off by so much that q does not follow it in a straight line
    steepness = {name: (k_inter * error / sine).clamp(1e-12, 300) for name, error in screens.items()}  # no 0 · ∞
    return Truth(
        row_loss=((q - p) * c).sum(1),
        intra=(-p * c).sum(1),
        inter=(q * c).sum(1),
        cos=c,
        q=q,
        active=active,
        borderline=borderline,
        dropped=dropped_q.sum(1),
        grad_x=kept_x,
        grad_w=kept_w,
        full_grad_x=full_x,
        full_grad_w=full_w,
        missing_x=on_x(dropped_q),
        missing_w=on_w(dropped_q),
        flip_x=on_x(border_q),
        flip_w=on_w(border_q),
        one_rounding=bounds(unit * c.abs(), 1),
        worst=bounds(unit * worst, worst),
        screen_loss={
            name: (sensitivity * error * torch.expm1(steepness[name]) / steepness[name]).sum(1)
            for name, error in screens.items()
        },
    )
