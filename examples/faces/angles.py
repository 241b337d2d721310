"""Where the angles of eq. (2) lie after training: to the own class centre, and to the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sface_kernels.angles import AngleHistograms, count_angles

from .data import FaceSet
from .verification import embed

MAX_IMAGES = 1000


def angle_histograms(backbone: nn.Module, weight: Tensor, faces: FaceSet, device: torch.device) -> AngleHistograms:
    """Angles between training faces (not augmented) and class centres, counted on the CPU.

    Args:
        backbone: `[N, 1, H, W]` → `[N, D]`.
        weight: `[C, D]` class centres.
        faces: at most MAX_IMAGES, evenly spaced, are taken.
        device: of the backbone.
    """
    rows = torch.linspace(0, len(faces.labels) - 1, min(MAX_IMAGES, len(faces.labels))).round().long()
    return count_angles(embed(backbone, faces.images[rows], device), weight.detach().cpu(), faces.labels[rows])
