"""A plain `SFaceLoss` whose weight somebody spread over processes: refused, or right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

from sface_kernels import sface_loss
from tests.distributed.batches import single, split
from tests.support.cases import f64


def spread():
    batch = split("even", (24, 9, 16), f64)
    x, labels = batch.x[batch.mine], batch.labels[batch.mine]
    mesh = init_device_mesh("cpu", (2,))
    words = "weight: expected a plain tensor, got a DTensor; .*sface_kernels.distributed.ClassParallelSFaceLoss"
    for placement in (Shard(0), Replicate()):
        with pytest.raises(TypeError, match=words):
            sface_loss(x, distribute_tensor(batch.w, mesh, [placement]), labels)
    with pytest.raises(TypeError, match=words):
        distribute_module(single(batch.w), mesh)(x, labels)
    with pytest.raises(TypeError, match="embeddings: expected a plain tensor"):
        sface_loss(distribute_tensor(batch.x, mesh, [Shard(0)]), batch.w, batch.labels)


def gathered_by_fsdp():
    """`fully_shard` gathers the weight for the forward, so the head is an ordinary data-parallel one: the gradient is
    the mean over processes of each one's own mean loss."""
    batch = split("even", (24, 9, 16), f64)
    head: Any = fully_shard(single(batch.w))
    loss = head(batch.x[batch.mine], batch.labels[batch.mine])
    loss.backward()
    expected = torch.zeros_like(batch.w)
    for rows in (slice(0, 12), slice(12, 24)):
        plain = single(batch.w)
        plain(batch.x[rows], batch.labels[rows]).backward()
        expected += plain.weight.grad / 2
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected)


def test_a_spread_weight_is_refused(pool):
    pool.run(2, spread)


def test_fully_shard(pool):
    pool.run(2, gathered_by_fsdp)
