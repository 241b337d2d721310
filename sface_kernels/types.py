"""Small records and codes that every layer shares. A leaf: imports torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Codes that `ops.prepare_labels` writes beside the class numbers 0 … C−1.
NO_TARGET = -1  # the row's class lies outside this range of classes (a shard)
IGNORED = -2  # the label was ignore_index: the row counts nowhere
INVALID = -3  # the label was out of range and could not be raised: the row's loss is NaN

NORM_EPS = 1e-12  # rows shorter than this are divided by it, as torch.nn.functional.normalize does


class Defaults(NamedTuple):
    """The published hyper-parameters; a and b in radians."""

    s: float = 64.0
    k: float = 80.0
    a: float = 0.80
    b: float = 1.23


DEFAULTS = Defaults()


class Request(NamedTuple):
    """What decides which backends can run a call."""

    device: torch.device
    dtype: torch.dtype  # of the embeddings
    weight_dtype: torch.dtype
    features: int = 512  # D, size of an embedding


class HyperParameters(NamedTuple):
    """The constants of equations (3) and (4), and the filter of the gradient."""

    s: float
    k_intra: float
    k_inter: float
    a: float  # radians
    b: float  # radians
    filter_eps: float  # gradient entries with q_ij < filter_eps·s are dropped; 0 keeps every entry


class RowStats(NamedTuple):
    """The rows of `row_stats` `[6, N]`, in this order, all detached. Samples without a loss (ignored ones) hold 0."""

    intra: Tensor  # −p_i c_iy
    inter: Tensor  # Σ_{j≠y} q_ij c_ij over every pair, filtered or not
    cos_target: Tensor  # c_iy
    cos_other_sum: Tensor  # Σ_{j≠y} c_ij
    hardest: Tensor  # max_{j≠y} c_ij, −inf with no other class
    dropped: Tensor  # Σ of the q_ij that the filter dropped, which bounds what ∂l_i/∂x̂_i lacks


class Forward(NamedTuple):
    """What every backend's forward returns: the same tensors in the same order as its operator."""

    row_loss: Tensor  # [N], l_i of equation (5)
    row_stats: Tensor  # [6, N], the rows of RowStats
    hardest_class: Tensor  # [N] int64, the class of RowStats.hardest; −1 where that is not finite, and in ignored rows
    counts: Tensor  # [2] int64: active pairs (targets not counted), pairs computed by dense products
    row_grad_x: Tensor  # [N, D], ∂l_i/∂x_i (equation 7 without u_i); [0, D] where it was not asked for
    saved: tuple[Tensor, ...]  # what the backend's own grad_weight wants back
    counted: Tensor | None = None  # [] int64: rows that are not ignored, at least 1; None where they are not counted
    target: Tensor | None = None  # [N] int64, codes of raw labels; None where those were given
    made: Any = None  # what the forward has made of ∂w of the reduced loss, where it was asked for that: for `finish`
    coarse: bool = False  # whether the backend took a coarser screen than usual: to verification another way

    @classmethod
    def of(cls, outputs: Sequence[Tensor]) -> Forward:
        row_loss, row_stats, hardest_class, counts, row_grad_x, *saved = outputs
        return cls(row_loss, row_stats, hardest_class, counts, row_grad_x, tuple(saved))


class SFaceStats(NamedTuple):
    """Statistics of one step: 0-d tensors on the device of the embeddings, reading them is what synchronises.

    `loss = intra + inter` under `reduction="mean"`. Means run over the rows that are not ignored.
    """

    intra: Tensor  # mean of −p_i c_iy
    inter: Tensor  # mean over rows of the sum over other classes
    cos_target: Tensor  # mean cosine to the own class centre
    cos_other: Tensor  # mean cosine to the others: divides by N·C, the target counted as 0 (as the reference does)
    accuracy: Tensor  # share of rows whose own centre is strictly nearer than SFaceRowStats.cos_hardest, 0 … 1
    active_pairs: Tensor  # int64, non-target pairs that got a gradient
    dropped: Tensor  # mean over rows of Σ dropped q_ij, the bound on the missing gradient of §2 in docs/math.md
    dense_share: Tensor  # of all pairs, the share that was computed by dense products, 0 … 1


class SFaceRowStats(NamedTuple):
    """Statistics of one step, row by row: tensors `[N]` on the device of the embeddings, detached.

    Ignored rows hold 0, and −1 as `hardest_class`. What the rows' means are is in `SFaceStats`.
    """

    intra: Tensor  # −p_i c_iy
    inter: Tensor  # Σ q_ij c_ij over the other classes; the row's loss is intra + inter
    cos_target: Tensor  # c_iy, the cosine to the own class centre
    angle: Tensor  # θ_iy in radians, the angle to the own class centre
    # the largest cosine to another class; −inf with no other class. In a row without an active pair it may be short by
    # the error of the screen (§3 in docs/math.md), and its class another
    cos_hardest: Tensor
    hardest_class: Tensor  # int64, that class, the lowest of equals; −1 with no other class, or NaN in the row
    dropped: Tensor  # Σ of the q_ij that the filter dropped, the bound of §2 in docs/math.md
