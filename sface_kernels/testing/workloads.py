"""Named shapes and geometries: embeddings, weights and labels, all from a seed and never all zeros.

Geometries:
    random: what a head sees at initialisation: x ~ N(0, 1), w ~ N(0, 2·√(2/C)), labels uniform.
    trained: what a well-trained head sees: clusters of look-alike classes, impostor cosines of standard
        deviation 1.4/√D (0.062 at D=512) with a heavy tail, positives 0.70 ± 0.06, log-normal norms. At D=512
        about 1e-3 of the pairs are active at 2⁻¹⁶.
    dense: a requested share of active pairs, from 1e-6 to 1. Every sample and class carries a common
        direction with a weight of its own, as embeddings of an early epoch do; its overall strength is found
        by bisection. Classes are in random order, so the active pairs are scattered over all of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..pages import in_huge_pages
from ..types import DEFAULTS

GEOMETRIES = ("random", "trained", "dense")
CLASSES = {"casia": 10_575, "ms1mv2": 85_742, "glint360k": 360_232, "wf42m": 2_059_906, "4m": 4_000_000}  # identities
S, K, A, B = DEFAULTS
FAST_EPS = 2.0**-16  # the filter at which densities are requested and reported
MAX_PAIRS = 1 << 24  # pairs looked at when a density is measured; 64 MiB of cosines
SOUGHT_ACTIVE = 20_000  # active pairs in the sample on which a density is bisected: noise below 1 %


class Shape(NamedTuple):
    """Samples, classes, features."""

    n: int
    c: int
    d: int


class Case(NamedTuple):
    """One workload by its description; equal cases give equal tensors on one kind of device."""

    shape: Shape
    geometry: str = "random"
    density: float | None = None  # requested share of active pairs, for "dense" only
    seed: int = 0

    @property
    def name(self) -> str:
        extra = f"({self.density:g})" if self.density is not None else ""
        return f"N={self.shape.n} C={self.shape.c} D={self.shape.d} {self.geometry}{extra}"


class Workload(NamedTuple):
    """The tensors of a case."""

    case: Case
    x: Tensor  # [N, D], in the dtype asked for
    w: Tensor  # [C, D] float32, master weights
    y: Tensor  # [N] int64
    density: float  # measured share of non-target pairs that are active at FAST_EPS


def active_cosine(filter_eps: float) -> float:
    """The cosine from which a pair is active, q_ij >= filter_eps·s."""
    return math.cos(min(math.pi, B + math.log(1 / filter_eps - 1) / K))


def make_workload(case: Case, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Workload:
    """The tensors of `case`, drawn on `device`, with the embeddings rounded to `dtype`."""
    (n, c, d), generator = case.shape, torch.Generator(device).manual_seed(case.seed)
    y = torch.randint(c, (n,), generator=generator, device=device)  # [N]
    if case.geometry == "random":
        x, w = _normal(generator, n, d), _normal(generator, c, d).mul_(_init_std(c))
    elif case.geometry == "trained":
        x, w = _trained(case.shape, y, generator)
    elif case.geometry == "dense":
        x, w = _dense(case.shape, y, 0.05 if case.density is None else case.density, generator)
    else:
        raise ValueError(f"geometry: expected one of {GEOMETRIES}, got {case.geometry!r}")
    x, w = x.to(dtype), in_huge_pages(torch.empty_like(w)).copy_(w)  # w as the one of a head lies in memory
    step = _class_step(n, c, MAX_PAIRS)
    return Workload(case, x, w, y, _active_share(x.float(), w[::step], y, step))


def _class_step(n: int, c: int, pairs: float) -> int:
    """Every how many-th class is looked at so that about `pairs` pairs are."""
    return max(1, int(n * c / pairs))


def _active_share(x: Tensor, w: Tensor, y: Tensor, step: int) -> float:
    """Share of the non-target pairs that are active at FAST_EPS, where `w` holds every `step`-th class."""
    active = _unit(x) @ _unit(w).t() >= active_cosine(FAST_EPS)  # [N, C/step]
    shown = (y % step == 0).nonzero().squeeze(1)  # rows whose target is among the columns
    found = int(active.sum()) - int(active[shown, y[shown] // step].sum())
    return found / max(1, active.numel() - len(shown))


def _normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator, device=generator.device)


def _uniform(generator: torch.Generator, low: float, high: float, size: int) -> Tensor:
    return torch.empty(size, 1, device=generator.device).uniform_(low, high, generator=generator)


def _unit(t: Tensor) -> Tensor:
    return t / t.norm(dim=1, keepdim=True)


def _init_std(c: int) -> float:
    return 2 * math.sqrt(2 / c)


def _spectrum(d: int) -> Tensor:
    """Standard deviations per feature for which unit vectors have cosines of standard deviation 1.4/√D.

    Directions with covariance diag(λ), Σλ = 1, have cosine variance Σλ²; λ falls as a power of the index.
    """
    index = torch.arange(1, d + 1, dtype=torch.float64, device="cpu")
    low, high = 0.0, 2.0
    for _ in range(40):
        power = (low + high) / 2
        variances = index**-power
        variances /= variances.sum()
        low, high = (power, high) if float((variances**2).sum()) < 1.96 / d else (low, power)
    return (variances * d).sqrt().float()  # [D]


def _trained(shape: Shape, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    n, c, d = shape
    scale = _spectrum(d).to(generator.device)
    clusters = max(1, min(900, c // 4))
    cluster = torch.randint(clusters, (c,), generator=generator, device=generator.device)  # [C]
    middle = _unit(_normal(generator, clusters, d) * scale)  # [clusters, D]
    likeness = _uniform(generator, 0.1, 0.6, clusters)  # cosine of two classes of one cluster
    w = _normal(generator, c, d).mul_(scale)
    w.div_(w.norm(dim=1, keepdim=True)).mul_((1 - likeness[cluster]).sqrt())
    w.add_(middle[cluster].mul_(likeness[cluster].sqrt()))
    w.div_(w.norm(dim=1, keepdim=True))

    own = w[y]  # [N, D]
    other = _normal(generator, n, d) * scale
    other = _unit(other - (other * own).sum(1, keepdim=True) * own)
    cos = (0.70 + 0.06 * _normal(generator, n, 1)).clamp_(0.3, 0.95)  # [N, 1]
    x = cos * own + (1 - cos**2).sqrt() * other
    x.mul_(20 * (0.25 * _normal(generator, n, 1)).exp())
    w.mul_(_init_std(c) * math.sqrt(d) * (0.3 * _normal(generator, c, 1)).exp())
    return x, w


def _dense(shape: Shape, y: Tensor, density: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if not 0 < density <= 1:
        raise ValueError(f"density: expected a number in (0, 1], got {density!r}")
    n, c, d = shape
    x, w = _unit(_normal(generator, n, d)), _normal(generator, c, d)
    w.div_(w.norm(dim=1, keepdim=True))
    common = _unit(_normal(generator, 1, d))  # [1, D]
    alpha, beta = _uniform(generator, 0.5, 1.5, n), _uniform(generator, 0.5, 1.5, c)  # [N, 1], [C, 1]

    # x_i + |t| α_i m and w_j + t β_j m have cosines that rise with t
    step = _class_step(n, c, min(MAX_PAIRS, max(1 << 20, SOUGHT_ACTIVE / density)))
    low, high = -8.0, 8.0  # mean cosines near −1 and +1
    for _ in range(30):
        t = (low + high) / 2
        share = _active_share(x + abs(t) * alpha * common, w[::step] + t * beta[::step] * common, y, step)
        low, high = (t, high) if share < min(density, 0.99999) else (low, t)
    x.add_(abs(high) * alpha * common)
    return x.mul_(math.sqrt(d)), w.addcmul_(high * beta, common).mul_(_init_std(c) * math.sqrt(d))
