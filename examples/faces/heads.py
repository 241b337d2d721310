"""The heads that a run can train, by name."""

from __future__ import annotations

from sface_kernels import SFaceLoss
from sface_kernels.distributed import ClassParallelSFaceLoss

from .options import TrainOptions

BACKENDS = {"fused": "auto", "reference": "reference"}


def build_head(name: str, options: TrainOptions, classes: int) -> SFaceLoss | ClassParallelSFaceLoss:
    """The head, its weight drawn from torch's generator: on the CPU, or spread over the processes where they are."""
    constants = {key: getattr(options, key) for key in ("s", "k", "a", "b")}
    if options.class_parallel:
        return ClassParallelSFaceLoss(options.embedding_size, classes, **constants)
    return SFaceLoss(options.embedding_size, classes, backend=BACKENDS[name], **constants)
