"""Sampled classes: the estimate is unbiased (over every subset, exactly), seeded, and no more is updated than was drawn."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

from sface_kernels.compat.partial_fc import PartialFCSFace
from sface_kernels.distributed import ClassParallelSFaceLoss
from sface_kernels.distributed.sampling import Sampling, draw, sampled_rows, split_classes, take_classes
from sface_kernels.distributed.shard import shard_rows
from sface_kernels.ops import prepare_labels
from sface_kernels.types import IGNORED
from sface_kernels.validation import make_hyperparameters
from tests.support.cases import f64
from tests.support.problems import trained_problem

N, C, D = 9, 12, 8
HP = make_hyperparameters(64.0, 80.0, 0.8, 1.23, None, 1e-3, f64, D)
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
        classes = take_classes(w, target, near, torch.tensor(subset))
        rows = sampled_rows(x, classes, HP, "reference")
        grads = gradients(rows, x, w, upstream)
        classes = take_classes(w, target, near, torch.tensor(subset))
        ahead = sampled_rows(x, classes, HP, "reference", with_grad_x=True)  # as the head wants it
        torch.testing.assert_close(ahead.grad_x * upstream.unsqueeze(1), grads[0])
        torch.testing.assert_close(torch.autograd.grad(ahead.loss, w, upstream)[0], grads[1])
        undrawn = sorted(set(others.tolist()) - set(subset))
        assert not grads[1][undrawn].any() and grads[1][near].any(1).all()
        # products of other shapes may add in another order
        assert (rows.stats.hardest <= whole.stats.hardest + 1e-14).all()
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
    rows = sampled_rows(x, take_classes(w, target, near, others), HP, "reference")
    torch.testing.assert_close(rows.loss, shard_rows(x, w, target, HP, "reference").loss)
    nothing = take_classes(w[:0], torch.full((4,), -1), near[:0], others[:0])
    empty = sampled_rows(x, nothing, HP, "reference")
    assert not empty.loss.any()


def make_sampled(**options):
    return ClassParallelSFaceLoss(D, 101, filter_eps=0.0, **{"sample_rate": 0.3, **options})


def sampled_head():
    x, labels = torch.randn(6, D), torch.arange(6)
    head, twin = make_sampled(), make_sampled(sample_seed=1)
    twin.load_state_dict(head.state_dict())
    losses = [float(head(x, labels).detach()) for _ in range(3)]
    assert len(set(losses)) == 3 and float(twin(x, labels).detach()) != losses[0]
    loss, stats = head(x, labels, return_stats=True)
    assert float(loss.detach()) == pytest.approx(float(stats.intra + stats.inter), rel=1e-5)
    head.eval()
    whole = make_sampled(sample_rate=1.0)
    whole.load_state_dict(head.state_dict())
    assert torch.equal(head(x, labels), whole(x, labels))
    return losses


def test_head(pool):
    results = pool.run(3, sampled_head)
    assert results[0] == results[1] == results[2]
    pool.run(1, sampled_head)


def classes_of_a_step(head):
    """The classes that a step compared with: those whose rows got a gradient."""
    torch.manual_seed(5 + dist.get_rank())
    x = torch.randn(4, D)
    head.zero_grad()
    head(x, torch.arange(4)).backward()
    grad = head.weight.grad
    return (grad.to_local() if isinstance(grad, DTensor) else grad).any(1).nonzero().squeeze(1).tolist()


def resumed_sampling(directory):
    """Stopped after two steps of four, by each way of saving: the last two compare with the same classes."""
    head = make_sampled()
    first = [classes_of_a_step(head) for _ in range(2)]
    torch.save(head.state_dict(), directory / f"{dist.get_rank()}.pt")
    dcp.save({"head": head.state_dict()}, checkpoint_id=directory / "dcp")
    whole, _ = get_state_dict(head, [], options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    whole = copy.deepcopy(whole)  # the counter goes on
    rest = [classes_of_a_step(head) for _ in range(2)]
    assert len({tuple(drawn) for drawn in first + rest}) == 4, "two steps drew the same classes"

    def by_file(other):
        other.load_state_dict(torch.load(directory / f"{dist.get_rank()}.pt", weights_only=False))

    def by_dcp(other):
        state, _ = get_state_dict(other, [])
        dcp.load({"head": state}, checkpoint_id=directory / "dcp")
        set_model_state_dict(other, state)

    def from_rank_0(other):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(other, whole if dist.get_rank() == 0 else {}, options=options)

    for load in (by_file, by_dcp, from_rank_0):
        other = make_sampled()
        load(other)
        assert int(other.sample_step) == 2
        assert [classes_of_a_step(other) for _ in range(2)] == rest, load.__name__


def test_a_resumed_run_draws_the_same_classes(pool, tmp_path):
    for processes in (1, 3):
        directory = tmp_path / str(processes)
        directory.mkdir()
        pool.run(processes, resumed_sampling, directory)


def state_with_and_without(directory):
    """The count is in the state dict of a head that samples, and no other head minds whether it is."""
    head, plain = make_sampled(), make_sampled(sample_rate=1.0)
    assert sorted(head.state_dict()) == ["sample_step", "weight"] and list(plain.state_dict()) == ["weight"]
    head(torch.randn(2, D), torch.arange(2))
    plain.load_state_dict(head.state_dict())
    head.load_state_dict({"weight": plain.full_weight()})
    assert int(head.sample_step) == 1
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        head.load_state_dict({"sample_step": torch.tensor(3)})
    dcp.save(plain.state_dict(), checkpoint_id=directory)
    with pytest.raises(dcp.api.CheckpointException, match=r"Missing key.*sample_step"):
        dcp.load(head.state_dict(), checkpoint_id=directory)
    partly = dcp.default_planner.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(head.state_dict(), checkpoint_id=directory, planner=partly)
    head.reset_parameters()
    assert int(head.sample_step) == 0


def test_state(pool, tmp_path):
    pool.run(2, state_with_and_without, tmp_path)


def rate_changes():
    """After the head was made: it counts from when it first samples, and what it counted stays in its state."""
    head = make_sampled()
    head(torch.randn(2, D), torch.arange(2))
    head.sample_rate = 1.0
    state = copy.deepcopy(head.state_dict())
    head.load_state_dict(state)
    assert int(head.sample_step) == 1
    for change in (lambda h: h.load_state_dict(state), lambda h: h.reset_parameters(), lambda h: None):
        later = make_sampled(sample_rate=1.0)
        later.sample_rate = 0.3
        change(later)
        later(torch.randn(2, D), torch.arange(2))
        assert int(later.sample_step) in (1, 2)
    later.load_state_dict(state)
    assert int(later.sample_step) == 1


def test_a_rate_that_changes(pool):
    pool.run(2, rate_changes)


def resumed_partial_fc():
    """insightface's state has the weight alone; its trainer keeps `global_step`."""
    head = PartialFCSFace(D, 101, 0.3, filter_eps=0.0)
    for _ in range(2):
        classes_of_a_step(head)
    state, global_step = head.state_dict(), 2
    assert list(state) == ["weight"]
    rest = [classes_of_a_step(head) for _ in range(2)]
    other = PartialFCSFace(D, 101, 0.3, filter_eps=0.0)
    other.load_state_dict(state)
    other.sample_step = global_step
    assert [classes_of_a_step(other) for _ in range(2)] == rest


def test_a_resumed_partial_fc(pool):
    pool.run(2, resumed_partial_fc)


def test_a_share_of_less_than_a_class_draws_one():
    assert len(draw(torch.arange(3), Sampling(0.1, 0, 1), 0)) == 1


def test_drawn_classes_are_numbered_among_all():
    classes = take_classes(torch.eye(4), torch.tensor([0]), torch.tensor([0]), torch.tensor([2, 3]), first=10)
    rows = sampled_rows(torch.tensor([[1.0, 0.0, 0.2, 0.6]]), classes, HP, "chunked")
    assert rows.hardest_class.tolist() == [13]
