"""Sampled classes: the estimate is unbiased (over every subset, exactly), seeded, and no more is updated than was drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sface_kernels.distributed import ClassParallelSFaceLoss
from sface_kernels.distributed.sampling import Sampling, draw, sampled_rows, split_classes
from sface_kernels.distributed.shard import shard_rows
from sface_kernels.ops import prepare_labels
from sface_kernels.types import IGNORED
from sface_kernels.validation import make_hyperparameters
from tests.support.cases import f64
from tests.support.problems import trained_problem

N, C, D = 9, 12, 8
HP = make_hyperparameters(64.0, 80.0, 0.8, 1.23, None, 0.0, f64, D)
SUMS = ("intra", "inter", "cos_target", "cos_other_sum", "dropped")


def problem():
    p = trained_problem(N, C, D)
    labels = torch.tensor([0, 2, 2, 5, 11, 5, 0, -100, 30])  # 30 is another shard's
    return p.x.double(), p.w.double(), prepare_labels(labels, 40, -100, True, 0, C), p.upstream.double()


def gradients(rows, x, w, upstream):
    return torch.autograd.grad(rows.loss, (x, w), upstream)


def test_mean_over_every_subset_is_the_full_sum():
    """Losses, statistics and both gradients; with 8 classes outside the batch and 3 drawn that is 56 subsets."""
    x, w, target, upstream = problem()
    x.requires_grad_(), w.requires_grad_()
    near, others = split_classes(target, C)
    assert near.tolist() == [0, 2, 5, 11]
    whole = shard_rows(x, w, target, HP, "reference")
    expected = [whole.loss.detach(), *gradients(whole, x, w, upstream), *(getattr(whole.stats, n) for n in SUMS)]
    cos = torch.nn.functional.normalize(x.detach()) @ torch.nn.functional.normalize(w.detach()).t()
    cos[target >= 0, target[target >= 0]] = -torch.inf
    means, spread = [torch.zeros_like(t) for t in expected], 0.0
    subsets = list(itertools.combinations(others.tolist(), 3))
    for subset in subsets:
        rows = sampled_rows(x, w, target, HP, "reference", near, torch.tensor(subset))
        grads = gradients(rows, x, w, upstream)
        undrawn = sorted(set(others.tolist()) - set(subset))
        assert not grads[1][undrawn].any() and grads[1][near].any(1).all()
        assert (rows.stats.hardest <= whole.stats.hardest).all()
        compared = {*near.tolist(), *subset}
        among = cos.clone()
        among[:, [j for j in range(C) if j not in compared]] = -torch.inf
        assert torch.equal(rows.hardest_class, torch.where(target == IGNORED, -1, among.argmax(1)))
        spread = max(spread, float((rows.loss - whole.loss).abs().max()))
        for mean, value in zip(
            means, [rows.loss.detach(), *grads, *(getattr(rows.stats, n) for n in SUMS)], strict=True
        ):
            mean += value / len(subsets)
    assert spread > 0.1, "no subset differed from the whole"
    for mean, value in zip(means, expected, strict=True):
        torch.testing.assert_close(mean, value, rtol=1e-10, atol=1e-10)


def test_draws_are_uniform_and_seeded():
    others = torch.arange(20) * 3
    counts, draws = torch.zeros(60), 4000
    for step in range(draws):
        drawn = draw(others, Sampling(0.25, 1, step), first=0)
        assert len(drawn) == 5 and (drawn.diff() > 0).all()
        counts[drawn] += 1
    seen = counts[others]
    assert counts.sum() == 5 * draws and seen.sum() == counts.sum()
    assert (seen - draws / 4).abs().max() < 5 * math.sqrt(draws * 0.25 * 0.75)
    same = Sampling(0.25, 1, 7)
    assert torch.equal(draw(others, same, 0), draw(others, same, 0))
    for other, first in ((same._replace(seed=2), 0), (same._replace(step=8), 0), (same, 100)):
        assert not torch.equal(draw(others, same, 0), draw(others, other, first))


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [30, 30, 30, 30], [-100] * 4], ids=["all", "none here", "ignored"])
def test_nothing_to_draw_or_nothing_near(labels):
    x, w = torch.randn(4, D, dtype=f64), torch.randn(4, D, dtype=f64)
    target = prepare_labels(torch.tensor(labels), 40, -100, True, 0, 4)
    near, others = split_classes(target, 4)
    rows = sampled_rows(x, w, target, HP, "reference", near, others)
    torch.testing.assert_close(rows.loss, shard_rows(x, w, target, HP, "reference").loss)
    empty = sampled_rows(x, w[:0], torch.full((4,), -1), HP, "reference", near[:0], others[:0])
    assert not empty.loss.any()


def sampled_head():
    torch.manual_seed(0)
    x, labels = torch.randn(6, D), torch.arange(6)
    make = lambda **options: ClassParallelSFaceLoss(D, 101, filter_eps=0.0, sample_rate=0.3, **options)  # noqa: E731
    head, twin = make(), make(sample_seed=1)
    twin.load_state_dict(head.state_dict())
    assert list(head.state_dict()) == ["weight"]
    losses = [float(head(x, labels).detach()) for _ in range(3)]
    assert len(set(losses)) == 3 and float(twin(x, labels).detach()) != losses[0]
    resumed = make()
    resumed.load_state_dict(head.state_dict())
    resumed.sample_step = 2
    assert float(resumed(x, labels).detach()) == losses[2]
    loss, stats = head(x, labels, return_stats=True)
    assert float(loss.detach()) == pytest.approx(float(stats.intra + stats.inter), rel=1e-5)
    head.eval()
    whole = ClassParallelSFaceLoss(D, 101, filter_eps=0.0)
    whole.load_state_dict(head.state_dict())
    assert torch.equal(head(x, labels), whole(x, labels))
    return losses


def test_head(pool):
    results = pool.run(3, sampled_head)
    assert results[0] == results[1] == results[2]
    pool.run(1, sampled_head)
