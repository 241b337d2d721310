"""SFace, the sigmoid-constrained hypersphere loss, as fused kernels under a plain PyTorch API."""

from ._version import __version__
from .dispatch import available_backends, explain
from .loss import SFaceLoss, sface_loss
from .types import SFaceRowStats, SFaceStats

__all__ = ["SFaceLoss", "SFaceRowStats", "SFaceStats", "__version__", "available_backends", "explain", "sface_loss"]
