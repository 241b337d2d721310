"""The heads that a run can train, by name."""

from __future__ import annotations

from sface_kernels import SFaceLoss

from .options import TrainOptions

BACKENDS = {"fused": "auto", "reference": "reference"}


def build_head(name: str, options: TrainOptions, classes: int) -> SFaceLoss:
    """The head on the CPU, its weight drawn from torch's generator."""
    constants = {key: getattr(options, key) for key in ("s", "k", "a", "b")}
    return SFaceLoss(options.embedding_size, classes, backend=BACKENDS[name], **constants)
