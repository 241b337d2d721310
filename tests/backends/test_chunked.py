"""What only the portable backend does: blocks of any size, a bounded list of pairs, and blocks computed twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import ops
from sface_kernels.backends import chunked
from sface_kernels.ops import prepare_labels
from sface_kernels.types import NO_TARGET
from sface_kernels.validation import make_hyperparameters
from tests.support.cases import Case, f32
from tests.support.checks import Judge, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES

CASE = Case("chunked", "cpu", f32, f32)


# A few classes at a time; no divisor of C, which is prime; C in one block; more than C.
@pytest.mark.parametrize("chunk", [7, 48, 256, 331, 5000])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-12])
def test_any_chunk_size(monkeypatch, geometry, filter_eps, chunk):
    """A sum over chunks is the sum, wherever it is cut: the row losses, the gradients, and what is kept."""
    problem = GEOMETRIES[geometry](33, 331, 96)
    monkeypatch.setattr(chunked, "chunk_size", lambda rows: chunk)
    result = run(CASE, problem, filter_eps=filter_eps)
    Judge(problem, filter_eps=filter_eps).check(result, "chunked")
    t = truth(*problem, filter_eps=filter_eps)
    assert abs(int(result.stats.active_pairs) - int(t.active.sum())) <= int(t.borderline.sum())
    assert float(result.stats.cos_other) == pytest.approx(
        float(t.cos.sum() - t.cos[torch.arange(33), problem.labels].sum()) / t.cos.numel(), abs=1e-6
    )
    assert float(result.stats.dropped) == pytest.approx(float(t.dropped.mean()), rel=1e-3, abs=2.0**-12)


def test_dense_and_listed_blocks(monkeypatch):
    """What is dropped counts in both; and a range of classes behind a dense block finds its own pairs in the lists."""
    problem = GEOMETRIES["trained"](33, 331, 96)
    x, w = (F.normalize(rows) for rows in (problem.x, problem.w))
    x[:, 0] += 1
    w[:64, 0] += 0.5  # most of these are near every sample
    problem, eps = problem._replace(x=x, w=w), 2.0**-10
    monkeypatch.setattr(chunked, "chunk_size", lambda rows: 64)
    t = truth(*problem, filter_eps=eps)
    result = run(CASE, problem, filter_eps=eps)
    assert 0 < float(result.stats.dense_share) < 1
    assert float(result.stats.dropped) == pytest.approx(float(t.dropped.mean()), rel=1e-3)

    hp = make_hyperparameters(64.0, 80.0, 0.8, 1.23, None, eps, f32, 96)
    target = prepare_labels(problem.labels, 331, -100, True)
    saved = chunked.forward(x, w, target, hp, False, True).saved
    whole = chunked.grad_weight(x, w, target, hp, problem.upstream, saved)
    for first in range(0, 331, 64):
        end = min(first + 64, 331)
        here = torch.where((target >= first) & (target < end), target - first, NO_TARGET)
        part = chunked.narrow(saved, 33, first, end)
        rows = chunked.grad_weight(x, w[first:end], here, hp, problem.upstream, part)
        assert torch.equal(rows, whole[first:end])


@pytest.mark.parametrize("capacity", [0, 1, 40, 300])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_any_capacity(monkeypatch, geometry, capacity):
    """Blocks whose pairs do not fit the list are computed again in the backward, beside those that did fit."""
    problem = GEOMETRIES[geometry](33, 3001, 128)
    monkeypatch.setattr(chunked, "chunk_size", lambda rows: 100)
    roomy = run(CASE, problem, filter_eps=2.0**-12)
    monkeypatch.setattr(ops, "CHUNKED_MAX_PAIRS", capacity)
    tight = run(CASE, problem, filter_eps=2.0**-12)
    Judge(problem, filter_eps=2.0**-12).check(tight, "chunked")
    assert int(tight.stats.active_pairs) == int(roomy.stats.active_pairs)
    if geometry == "trained":
        assert float(roomy.stats.dense_share) == 0 < float(tight.stats.dense_share)


@pytest.mark.parametrize("filter_eps, many", [(2.0**-12, True), (2.0**-8, False)])
def test_many_and_few_pairs(monkeypatch, filter_eps, many):
    """With more pairs than classes in a block all its rows of ∂w are computed, else those of the listed classes alone."""
    problem = GEOMETRIES["trained"](65, 331, 96)
    monkeypatch.setattr(chunked, "chunk_size", lambda rows: 331)
    monkeypatch.setattr(chunked, "DENSE_FRACTION", 1.0)
    result = run(CASE, problem, filter_eps=filter_eps)
    active = int(result.stats.active_pairs)
    assert active > 100 and (active + 65 > 331) == many and float(result.stats.dense_share) == 0
    Judge(problem, filter_eps=filter_eps).check(result, "chunked")
