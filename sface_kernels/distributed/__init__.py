"""The class-parallel head on torch.distributed: class centres spread over the processes of a group."""

from .shard import ShardRows, sface_shard_loss

__all__ = ["ShardRows", "sface_shard_loss"]
