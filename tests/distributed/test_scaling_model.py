"""The scaling model's bytes are those that the head really hands to the collectives; its other counts are sane."""

from __future__ import annotations

import pytest
import torch

from benchmarks.scaling_model import EXCHANGES, H100, Problem, communication, partial_fc, published_head_seconds, sface
from sface_kernels.distributed import ClassParallelSFaceLoss
from tests.distributed.recording import recording


def recorded(rows, dtype):
    head = ClassParallelSFaceLoss(16, 40)
    x = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    with recording() as record:
        head(x, torch.arange(rows)).backward()
    return [exchange.bytes for exchange in record.exchanges]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_bytes_sent(pool, processes, dtype):
    sent = communication(Problem(processes, 40, rows=6, features=16, embedding_bytes=dtype.itemsize))
    for sizes in pool.run(processes, recorded, 6, dtype):
        assert sizes == list(sent) and len(sizes) == EXCHANGES and sum(sizes) == sent.total


def test_published_figures_lie_on_lines():
    """The step without the head comes out the same from the full and from the sampled figures, within 2 %."""
    (full, slope), (sampled, thin) = published_head_seconds(1.0), published_head_seconds(0.1)
    assert abs(full / sampled - 1) < 0.02 and slope > 5 * thin


def test_more_of_anything_costs_more():
    p = Problem(64, 10_000_000)
    cost = sface(p, H100)
    assert cost.communication < cost.seconds and cost.memory > 12 * p.shard * p.features
    assert sface(p._replace(classes=20_000_000), H100).seconds > cost.seconds
    assert sface(p._replace(active=0.1), H100).seconds > cost.seconds
    assert partial_fc(p, H100, 0.1).seconds < partial_fc(p, H100).seconds
