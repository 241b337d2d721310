"""The published arithmetic as shipped: what users have now, and what the package is compared with.

One N×C float32 tensor written and read once moves 8·N·C bytes. This makes 16 new ones in the forward and 5 in the
backward, and 9 of size C×D in the backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .workloads import A, B, K, S


class ReferenceOutputs(NamedTuple):
    """The six values of the published module."""

    logits: Tensor  # [N, C], s·cos
    loss: Tensor
    intra: Tensor
    inter: Tensor
    cos_target: Tensor
    cos_other: Tensor  # mean over N·C with 0 at the target


def reference(x: Tensor, w: Tensor, y: Tensor) -> ReferenceOutputs:
    """The published module's arithmetic: one-hot masks, arccos without a clamp, every step a new N×C tensor.

    A cosine rounded past 1 gives NaN, as it does there.
    """
    logits = F.linear(F.normalize(x), F.normalize(w)) * S  # [N, C]
    own = torch.zeros_like(logits).scatter_(1, y.view(-1, 1), 1)
    other = torch.ones_like(logits).scatter_(1, y.view(-1, 1), 0)

    logit_target = (own * logits).sum(1)  # [N]
    with torch.no_grad():
        weight_target = 1.0 / (1.0 + torch.exp(-K * (torch.acos(logit_target / S) - A)))
    intra = -weight_target * logit_target

    logit_other = other * logits  # [N, C]
    with torch.no_grad():
        weight_other = 1.0 / (1.0 + torch.exp(K * (torch.acos(logit_other / S) - B)))
    inter = (weight_other * logit_other).sum(1)

    loss = intra.mean() + inter.mean()
    cos_target, cos_other = (logit_target / S).mean(), (logit_other / S).mean()
    return ReferenceOutputs(logits, loss, intra.mean(), inter.mean(), cos_target, cos_other)
