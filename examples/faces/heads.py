"""The heads that a run can train, by name."""

from __future__ import annotations

import torch

from sface_kernels import SFaceLoss, explain
from sface_kernels.distributed import ClassParallelSFaceLoss

from .arcface import ArcFaceLoss
from .options import TrainOptions

BACKENDS = {"fused": "auto", "reference": "reference"}  # of the heads that are SFace


def build_head(name: str, options: TrainOptions, classes: int) -> SFaceLoss | ClassParallelSFaceLoss | ArcFaceLoss:
    """The head, its weight drawn from torch's generator: on the CPU, or spread over the processes where they are."""
    if name == "arcface":
        return ArcFaceLoss(options.embedding_size, classes, options.s)
    constants = {key: getattr(options, key) for key in ("s", "k", "a", "b")}
    if options.class_parallel:
        return ClassParallelSFaceLoss(options.embedding_size, classes, **constants)
    # which counts one batch in four, so that the median time of a head is without that
    return SFaceLoss(options.embedding_size, classes, backend=BACKENDS[name], angle_histogram=True, **constants)


def about(name: str, device: torch.device) -> str:
    """One line on what the head runs as."""
    if name == "arcface":
        return "ArcFace in plain PyTorch; --k, --a and --b are not used"
    return explain(device, backend=BACKENDS[name]).splitlines()[0]
