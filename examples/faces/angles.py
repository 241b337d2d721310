"""Where the angles of eq. (2) lie after training: to the own class centre, and to the others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import FaceSet
from .verification import embed

BINS = 180  # of one degree, over 0 … π
MAX_IMAGES = 1000
CLASSES = 4096  # angles to this many centres exist at once


@torch.no_grad()
def angle_histograms(
    backbone: nn.Module, weight: Tensor, faces: FaceSet, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Counts of the angles between training faces (not augmented) and class centres.

    Args:
        backbone: `[N, 1, H, W]` → `[N, D]`.
        weight: `[C, D]` class centres, on `device`.
        faces: at most MAX_IMAGES, evenly spaced, are taken.
        device: of the backbone.

    Returns:
        Counts over BINS bins of 0 … π, float64: angles to the own centre, and to all others.
    """
    rows = torch.linspace(0, len(faces.labels) - 1, min(MAX_IMAGES, len(faces.labels))).round().long()
    unit = embed(backbone, faces.images[rows], device)  # [M, D]
    centres = F.normalize(weight.detach()).cpu()  # [C, D]
    labels = faces.labels[rows]

    def counts(cosines: Tensor) -> Tensor:
        angles = cosines.clamp(-1, 1).acos()
        return torch.histc(angles.float(), BINS, 0, math.pi).double()

    own = counts((unit * centres[labels]).sum(1))
    every = torch.zeros(BINS, dtype=torch.float64)
    for part in centres.split(CLASSES):
        every += counts(unit @ part.t())
    return own, (every - own).clamp_min(0)  # a bin edge may round apart in the two products
