"""The class-parallel head on torch.distributed: class centres spread over the processes of a group."""

from .clipping import clip_grad_norm_
from .head import ClassParallelSFaceLoss
from .shard import ShardRows, sface_shard_loss

__all__ = ["ClassParallelSFaceLoss", "ShardRows", "clip_grad_norm_", "sface_shard_loss"]
