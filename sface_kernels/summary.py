"""What is reported of a step beside its loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import IGNORED, INVALID, RowStats, SFaceRowStats, SFaceStats


def row_weights(sample_weight: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """v_i `[N]`, 0 for ignored rows whatever they hold."""
    return torch.where(target == IGNORED, 0, sample_weight.reshape(-1).to(dtype))


def describe_rows(rows: RowStats, hardest_class: Tensor, target: Tensor) -> SFaceRowStats:
    """`target` `[N]`: what `ops.prepare_labels` makes of labels."""
    return SFaceRowStats(
        intra=rows.intra,
        inter=rows.inter,
        cos_target=rows.cos_target,
        angle=torch.where(target == IGNORED, 0, torch.where(target == INVALID, torch.nan, rows.cos_target.acos())),
        cos_hardest=rows.hardest,
        hardest_class=hardest_class,
        dropped=rows.dropped,
    )


def summarise(row_stats: Tensor, counts: Tensor, target: Tensor, counted: Tensor, classes: int) -> SFaceStats:
    """`row_stats` `[6, N]` and `counts` `[2]` of `types.Forward`; `counted`: rows that are not ignored, at least 1."""
    rows = RowStats(*row_stats.unbind(0))
    active_pairs, dense_pairs = counts.unbind(0)
    correct = (rows.cos_target > rows.hardest) & (target != IGNORED)
    return SFaceStats(
        intra=rows.intra.sum() / counted,
        inter=rows.inter.sum() / counted,
        cos_target=rows.cos_target.sum() / counted,
        cos_other=rows.cos_other_sum.sum() / (counted * classes),
        accuracy=correct.to(row_stats.dtype).sum() / counted,
        active_pairs=active_pairs,
        dropped=rows.dropped.sum() / counted,
        dense_share=dense_pairs.to(row_stats.dtype) / (counted * classes),
    )
