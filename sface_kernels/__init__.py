"""SFace, the sigmoid-constrained hypersphere loss, as fused kernels under a plain PyTorch API."""

from .dispatch import available_backends, explain
from .loss import SFaceLoss, sface_loss
from .types import SFaceStats

from ._version import __version__

__all__ = ["SFaceLoss", "SFaceStats", "available_backends", "explain", "sface_loss"]
