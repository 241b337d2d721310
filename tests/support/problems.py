"""Inputs for the tests: three geometries that drive the sparse, the dense and the empty paths, and shapes with reasons."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.oracle import threshold_angle


class Problem(NamedTuple):
    x: Tensor  # [N, D]
    w: Tensor  # [C, D]
    labels: Tensor  # [N]
    upstream: Tensor  # [N], not uniform, with negatives and zeros

    def to(self, device: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> Problem:
        return Problem(
            self.x.to(device, dtype), self.w.to(device, weight_dtype), self.labels.to(device), self.upstream.to(device)
        )


# (N, C, D). Sizes that must not matter: 6 and 12 classes in a register tile, 48 in a block, panels of 8 to 32 samples, groups of
# 256, features padded to 32, chunks of 256 and more classes.
SHAPES = {
    "one of each": (1, 1, 1),
    "one sample, two classes": (1, 2, 2),
    "two samples, one class": (2, 1, 3),
    "below every tile": (3, 5, 7),
    "one under a panel, block and pad": (15, 47, 31),
    "exactly a panel, block and pad": (16, 48, 32),
    "one over a panel, block and pad": (17, 49, 33),
    "prime everything": (31, 101, 61),
    "strip remainder 1": (33, 97, 15),
    "strip remainder 5, odd features": (65, 95, 123),
    "half the classes of a block": (64, 24, 16),
    "one under a group": (255, 53, 17),
    "exactly a group": (256, 48, 64),
    "one over a group": (257, 331, 127),
    "two groups and one": (513, 145, 65),
    "several chunks, prime C": (7, 8209, 40),
    "C over one chunk, wide": (128, 2087, 128),
    "the usual D": (31, 1009, 512),
    "large D": (5, 389, 1024),
    "long D, odd": (9, 211, 1031),
}
FEW_SHAPES = {
    name: SHAPES[name] for name in ("below every tile", "prime everything", "one over a group", "the usual D")
}


def _upstream(n: int, g: torch.Generator) -> Tensor:
    u = torch.randn(n, generator=g)
    if n > 2:
        u[1::5] = 0
    return u


def _norms(n: int, g: torch.Generator) -> Tensor:
    return torch.randn(n, 1, generator=g).mul(0.7).exp()


def _labels(n: int, c: int, g: torch.Generator) -> Tensor:
    """Any classes, the first and the last among them."""
    labels = torch.randint(0, c, (n,), generator=g)
    labels[-1] = 0
    labels[0] = c - 1
    return labels


def random_problem(n: int, c: int, d: int, seed: int = 0) -> Problem:
    """Independent directions: cosines 0 ± 1/√D, so few or no active pairs at large D and many at small D."""
    g = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(n, d, generator=g) * _norms(n, g) * 3
    w = torch.randn(c, d, generator=g) * _norms(c, g) * 0.1
    return Problem(x, w, _labels(n, c, g), _upstream(n, g))


def trained_problem(n: int, c: int, d: int, seed: int = 0) -> Problem:
    """Groups of about six look-alike classes, and samples at a cosine of 0.7 to their own centre."""
    g = torch.Generator().manual_seed(2000 + seed)
    families = F.normalize(torch.randn(-(-c // 6), d, generator=g))[torch.arange(c) // 6]
    w = F.normalize(families * 0.55 + F.normalize(torch.randn(c, d, generator=g)) * 0.835)
    labels = _labels(n, c, g)
    x = 0.7 * w[labels] + math.sqrt(1 - 0.49) * F.normalize(torch.randn(n, d, generator=g))
    return Problem(x * _norms(n, g) * 20, w * _norms(c, g), labels, _upstream(n, g))


def collapsed_problem(n: int, c: int, d: int, seed: int = 0) -> Problem:
    """All embeddings nearly equal, every class at a cosine of 0.7 to 0.99 to them: every pair is active."""
    g = torch.Generator().manual_seed(3000 + seed)
    axis = F.normalize(torch.randn(1, d, generator=g))
    cos = torch.linspace(0.7, 0.99, c).unsqueeze(1)[torch.randperm(c, generator=g)]
    side = torch.randn(c, d, generator=g)
    side = F.normalize(side - (side @ axis.t()) * axis)
    w = cos * axis + (1 - cos**2).sqrt() * side
    x = axis + 0.01 * F.normalize(torch.randn(n, d, generator=g))
    return Problem(x * _norms(n, g) * 5, w * _norms(c, g), _labels(n, c, g), _upstream(n, g))


GEOMETRIES = {"random": random_problem, "trained": trained_problem, "collapsed": collapsed_problem}


def rows_at_cosines(axis: Tensor, cos: Tensor, seed: int = 0) -> Tensor:
    """Unit rows `[len(cos), D]` in fp64 whose cosine to `axis` `[D]` is as given."""
    g = torch.Generator().manual_seed(4000 + seed)
    axis = F.normalize(axis.double(), dim=0)
    side = torch.randn(len(cos), len(axis), generator=g, dtype=torch.float64)
    side = F.normalize(side - (side @ axis).unsqueeze(1) * axis)
    cos = cos.double().unsqueeze(1)
    return cos * axis + (1 - cos**2).clamp_min(0).sqrt() * side


def threshold_cosine(k: float, b: float, filter_eps: float) -> float:
    """The cosine at which a pair just has a gradient."""
    return math.cos(min(max(threshold_angle(k, b, filter_eps), 0.0), math.pi))
