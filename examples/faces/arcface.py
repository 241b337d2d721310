"""ArcFace in plain PyTorch, to compare with: N×C tensors, and nothing clever."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sface_kernels import SFaceStats

MARGIN = 0.5  # radians, the paper's m


class ArcFaceLoss(nn.Module):
    """The additive angular margin loss of Deng et al., "ArcFace", CVPR 2019: cross entropy over s·cos θ_ij, with
    s·cos(θ_iy + m) in the place of the target's.

    Past θ_iy = π − m, where cos(θ + m) turns upwards again, the target's is s·(cos θ_iy − m·sin m), as in the authors'
    code. Its `weight` `[C, D]` is drawn as that of `SFaceLoss` is, so that two heads start alike.
    """

    def __init__(self, in_features: int, out_features: int, s: float = 64.0, margin: float = MARGIN) -> None:
        super().__init__()
        self.s, self.margin = s, margin
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=2 * math.sqrt(2 / out_features))

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, SFaceStats]:
        """The mean loss of `embeddings` `[N, D]` with `labels` `[N]`; with `return_stats`, (loss, SFaceStats).

        In the statistics `intra` is the mean of minus the target's logit and `inter` that of the log-sum-exp, so that
        loss = intra + inter as it is for SFace.
        """
        cos = F.normalize(embeddings) @ F.normalize(self.weight).t()  # [N, C]
        own = F.one_hot(labels, cos.shape[1]).bool()  # [N, C]
        target = cos[own]  # [N]
        sine = (1 - target.square()).clamp_min(1e-12).sqrt()  # 1e-12: its slope at 0 is infinite
        moved = target * math.cos(self.margin) - sine * math.sin(self.margin)  # cos(θ + m)
        past = target <= math.cos(math.pi - self.margin)
        moved = torch.where(past, target - self.margin * math.sin(self.margin), moved)
        logits = self.s * torch.where(own, moved.unsqueeze(1), cos)
        loss = F.cross_entropy(logits, labels)
        if not return_stats:
            return loss
        intra = -self.s * moved.mean()
        others = cos.masked_fill(own, 0)
        hardest = cos.masked_fill(own, -torch.inf).amax(1)
        zero = torch.zeros_like(loss)
        stats = SFaceStats(
            intra=intra,
            inter=loss - intra,
            cos_target=target.mean(),
            cos_other=others.mean(),
            accuracy=(target > hardest).to(cos.dtype).mean(),
            active_pairs=(~own).sum(),
            dropped=zero,
            dense_share=zero + 1,
        )
        return loss, SFaceStats(*(value.detach() for value in stats))
