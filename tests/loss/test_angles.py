"""Angle histograms against brute force, and what they cost in tensors."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sface_kernels import SFaceLoss, angles, sface_loss
from sface_kernels.angles import BINS, AngleCounter, count_angles, shares, suggest
from tests.loss.test_architecture import Sizes

WIDTH = math.pi / BINS


class Brute(NamedTuple):
    """Angles of all pairs in float64, by kind."""

    target: Tensor
    other: Tensor
    hardest: Tensor


def brute_force(x: Tensor, w: Tensor, labels: Tensor) -> Brute:
    kept = labels != -100
    cos = (F.normalize(x.detach().double()) @ F.normalize(w.detach().double()).t())[kept].clamp(-1, 1)
    own = F.one_hot(labels[kept].reshape(-1), len(w)).bool()
    others = cos.masked_fill(own, -torch.inf)
    hardest = others.amax(1) if len(w) > 1 else cos.new_empty(0)
    return Brute(cos[own].acos(), cos[~own].acos(), hardest.acos())


def assert_counts(counts: Tensor, found: Tensor, error: float) -> None:
    """`counts` are those of the angles, where each may be off by `error`: up to every edge of a bin as many."""
    edges = torch.arange(1, BINS, dtype=torch.float64) * WIDTH
    below = counts.cumsum(0)[:-1]
    at_least = (found.unsqueeze(1) <= edges - error).sum(0)
    at_most = (found.unsqueeze(1) < edges + error).sum(0)
    assert counts.sum() == len(found) and bool((at_least <= below).all()) and bool((below <= at_most).all())


# A cosine in float32 errs by some roundings, D·2⁻²⁴ at most, and near ±1 an error e of the cosine is √(2e) of the angle.
ERROR = math.sqrt(2 * 16 * 2.0**-24) + 1e-6


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 9), c=st.integers(1, 40), d=st.integers(1, 16), seed=st.integers(0, 99), near=st.booleans())
def test_small_problems_are_counted_exactly(n, c, d, seed, near):
    generator = torch.Generator().manual_seed(seed)
    head = SFaceLoss(d, c, angle_histogram=True)
    labels = torch.randint(0, c, (n,), generator=generator)
    x = torch.randn(n, d, generator=generator)
    if near:  # samples on their centres and opposite others
        x = head.weight.detach()[labels] * torch.tensor([1.0, -2.0])[torch.arange(n) % 2].unsqueeze(1)
    labels[::4] = -100
    head(x, labels)
    expected = brute_force(x, head.weight, labels)
    for histograms in (head.angle_counter.histograms(), count_angles(x, head.weight, labels)):
        for counts, found in zip(histograms, expected, strict=True):
            assert counts.dtype == torch.float64
            assert_counts(counts, found, ERROR)


def test_every_backend_and_dtype_counts_alike(case):
    x = torch.randn(12, 16, device=case.device, dtype=case.dtype)
    labels = torch.arange(12, device=case.device)
    head = SFaceLoss(16, 30, angle_histogram=True, backend=case.backend, device=case.device, dtype=case.weight_dtype)
    head(x, labels)
    found = head.angle_counter.histograms()
    for counts, exact in zip(found, brute_force(x, head.weight, labels), strict=True):
        assert_counts(counts.cpu(), exact.cpu(), ERROR)


def test_a_large_problem_is_estimated_without_bias_and_within_the_stated_error():
    """C far above the classes drawn: each bin within five of its standard deviations, and the nearest still exact."""
    n, c, d, steps = 16, 20_000, 8, 300
    head = SFaceLoss(d, c, angle_histogram=True)
    head.angle_counter.every = 1
    labels = torch.arange(n)
    x = torch.randn(n, d)
    for _ in range(steps):
        sface_loss(x, head.weight.detach(), labels, angle_counter=head.angle_counter, backend="chunked")
    found, exact = head.angle_counter.histograms(), count_angles(x, head.weight, labels)
    assert torch.equal(found.target, exact.target * steps) and torch.equal(found.hardest, exact.hardest * steps)
    assert found.other.sum() == pytest.approx(steps * n * (c - 1), rel=1e-12)
    drawn = exact.other * steps * 64 / c  # pairs that are expected to be drawn
    crowd = 2.0  # rows of a batch that one class has in a bin, at the most likely: 16 rows over some 100 bins
    assert bool(((found.other / steps - exact.other).abs() * (64 / c) * steps <= 5 * (crowd * drawn).sqrt() + 5).all())


def test_every_class_is_drawn_equally_often_and_from_the_whole_range():
    counter = AngleCounter(classes_per_step=64)
    seen = torch.zeros(1000)
    for _ in range(2000):
        drawn = counter._draw(1000)
        assert len(drawn) == 64 and bool((drawn.diff() >= 0).all())
        seen[drawn] += 1
        counter.steps += 1
    expected = 2000 * 64 / 1000
    assert bool(((seen - expected).abs() < 6 * expected**0.5).all())
    for size in (55, 89, 377, 610, 987):  # Fibonacci's, whose multiples of the golden ratio are almost integers
        counter = AngleCounter(classes_per_step=size)
        seen = torch.zeros(85_742)
        for _ in range(100):
            seen[counter._draw(85_742)] = 1
            counter.steps += 1
        assert int(seen.sum()) > 0.99 * 85_742 * (1 - (1 - size / 85_742) ** 100), "as many as independent draws reach"
    large = AngleCounter(classes_per_step=4096)._draw(16_000_000)
    assert bool((large >= 0).all()) and bool((large < 16_000_000).all()) and len(large.unique()) == 4096
    assert torch.equal(AngleCounter()._draw(60), torch.arange(60))
    every = AngleCounter(classes_per_step=10**9)._draw(800_000)
    assert torch.equal(every, torch.arange(800_000))
    half = AngleCounter(classes_per_step=1_000_000)._draw(2_000_000)  # one of each pair
    assert torch.equal(half // 2, torch.arange(1_000_000))


def test_counting_changes_nothing_else():
    x, labels = torch.randn(8, 16), torch.arange(8)
    plain, counting = SFaceLoss(16, 600), SFaceLoss(16, 600, angle_histogram=True)
    counting.load_state_dict(plain.state_dict())  # strict, both ways
    plain.load_state_dict(counting.state_dict())
    before = torch.get_rng_state()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    losses = [head(leaf, labels) for head, leaf in zip((plain, counting), leaves, strict=True)]
    torch.stack(losses).sum().backward()
    assert torch.equal(losses[0], losses[1]) and torch.equal(leaves[0].grad, leaves[1].grad)
    assert torch.equal(plain.weight.grad, counting.weight.grad) and torch.equal(before, torch.get_rng_state())
    assert [name for name, _ in counting.named_parameters()] == ["weight"]


def test_when_it_counts():
    head = SFaceLoss(16, 30, angle_histogram=True)
    x, labels = torch.randn(8, 16), torch.arange(8)

    def rows() -> float:
        return float(head.angle_counter.histograms().target.sum())

    for expected in (8, 8, 8, 8, 16):  # one batch in four
        head(x, labels)
        assert rows() == expected
    head.eval()
    head(x, labels)
    assert rows() == 16
    copied = copy.deepcopy(head).half()
    assert float(copied.angle_counter.histograms().target.sum()) == 16
    steps = head.angle_counter.steps.clone()
    head.angle_counter.reset()
    assert rows() == 0 and torch.equal(head.angle_counter.steps, steps)
    head.train()(x, labels)
    assert rows() == 8, "the first after a reset"
    head.add_classes(5)
    assert rows() == 0
    assert SFaceLoss(16, 30).angle_counter is None


@pytest.mark.parametrize("how", ["reset", "load", "assign"])
def test_it_starts_from_nothing_on_a_device_that_comes_later(how):
    """A head made on meta: its counts are in no checkpoint, and memory that to_empty hands out is none."""
    head = SFaceLoss(16, 3000, angle_histogram=True, device="meta")
    if how != "assign":
        torch.use_deterministic_algorithms(True)  # fills such memory with the largest numbers
        try:
            head.to_empty(device="cpu")
        finally:
            torch.use_deterministic_algorithms(False)
    if how == "reset":
        head.reset_parameters()
    else:
        head.load_state_dict({"weight": torch.randn(3000, 16)}, assign=how == "assign")
    head(torch.randn(8, 16), torch.arange(8))
    assert float(head.angle_counter.histograms().target.sum()) == 8
    assert int(head.angle_counter.steps) == 1


def test_a_row_of_zeros_is_at_a_right_angle():
    counter, x, w = AngleCounter(every=1), torch.randn(3, 16), torch.randn(10, 16)
    x[1], w[4] = 0, 0
    sface_loss(x, w, torch.tensor([0, 4, 9]), angle_counter=counter)
    _, other, _ = counter.histograms()
    assert float(other.sum()) == 27 and float(other[BINS // 2]) >= 11


def test_nan_and_labels_of_no_row_are_not_counted():
    head = SFaceLoss(16, 30, angle_histogram=True)
    x, labels = torch.randn(4, 16), torch.tensor([0, 1, -100, 2])
    x[1] = math.nan
    head(x, labels)
    assert [float(counts.sum()) for counts in head.angle_counter.histograms()] == [2, 2 * 29, 2]


def test_autocast_does_not_round_the_angles():
    head = SFaceLoss(16, 30, angle_histogram=True)
    x, labels = torch.randn(40, 16), torch.arange(40) % 30
    with torch.autocast("cpu", torch.bfloat16):
        head(x, labels)
        exact = count_angles(x, head.weight, labels)
    for histograms in (head.angle_counter.histograms(), exact):
        assert_counts(histograms.other, brute_force(x, head.weight, labels).other, ERROR)


def test_switches_and_defaults_of_the_process_change_nothing():
    head = SFaceLoss(64, 50, angle_histogram=True)
    head.angle_counter.every = 1
    x, labels = torch.randn(200, 64), torch.arange(200) % 50

    def result():
        head.angle_counter.reset()
        head(x, labels)
        found = head.angle_counter.histograms()
        angles.draw_rescale(figure.Figure().subplots(), k=80.0, a=0.8, b=1.23)
        return [*found, *count_angles(x, head.weight, labels)], shares(found), suggest(found)

    figure = pytest.importorskip("matplotlib.figure")
    plain = result()
    torch.set_float32_matmul_precision("medium")  # put back by a fixture
    with torch.device("meta"):
        changed = result()
    assert all(map(torch.equal, changed[0], plain[0])) and changed[1:] == plain[1:]


def test_it_counts_in_a_compiled_graph():
    torch._dynamo.reset()
    eager = SFaceLoss(16, 500, angle_histogram=True)
    eager.angle_counter.every = 1
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x, labels = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)), torch.arange(8)
        assert torch.equal(eager(x, labels), compiled(x, labels))
    for ours, theirs in zip(traced.angle_counter.histograms(), eager.angle_counter.histograms(), strict=True):
        assert torch.equal(ours, theirs) and float(ours.sum()) >= 24
    torch._dynamo.reset()


def test_no_tensor_of_all_pairs():
    head = SFaceLoss(8, 20_011, angle_histogram=True, backend="chunked")
    with Sizes() as sizes:
        head(torch.randn(1024, 8), torch.arange(1024)).backward()
    assert sizes.largest < 1024 * 20_011, sizes.where
    with Sizes() as sizes:
        count_angles(torch.randn(1024, 8), head.weight, torch.arange(1024))
    assert sizes.largest < 1024 * 20_011 // 8, sizes.where


def test_no_operation_waits_for_a_device():
    """What reads numbers back goes through _local_scalar_dense, nonzero or an output of unknown size."""
    head = SFaceLoss(8, 500, angle_histogram=True)
    with Sizes() as sizes:
        head(torch.randn(10, 8), torch.arange(10))
        head.angle_counter.histograms()
    inside = {str(func) for func in sizes.seen}
    assert any("index_add_" in name for name in inside)
    waits = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "bincount", "aten.item", "aten.is_nonzero")
    assert not [name for name in inside if any(word in name for word in waits)]


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None])
@pytest.mark.parametrize("name", ["classes_per_step", "every"])
def test_the_counters_numbers_are_checked(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected an int"):
        AngleCounter(**{name: value})


def test_the_counter_is_checked():
    x, w, labels = torch.randn(3, 8), torch.randn(5, 8), torch.arange(3)
    with pytest.raises(TypeError, match="angle_counter: expected an AngleCounter, got bool"):
        sface_loss(x, w, labels, angle_counter=True)
    with pytest.raises(ValueError, match="angle_counter: expected it on meta, as the weight, got cpu"):
        sface_loss(*(t.to("meta") for t in (x, w, labels)), angle_counter=AngleCounter())


def test_count_angles_checks_as_the_loss_does():
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 5\)"):
        count_angles(x, w, torch.tensor([0, 1, 5]))
    with pytest.raises(ValueError, match=r"weight: expected \[C, 8\]"):
        count_angles(x, torch.randn(5, 7), torch.arange(3))


def test_count_angles_in_blocks_with_any_ignore_index(monkeypatch):
    monkeypatch.setattr(angles, "BLOCK_ELEMENTS", 16 * 7)
    x, w, labels = torch.randn(9, 16), torch.randn(40, 16), torch.arange(9) * 4
    w[3] = x[8] + 0.1 * torch.randn(16)  # the nearest is not in the last block
    expected = brute_force(x, w, labels.masked_fill(labels == 4, -100))
    for counts, found in zip(count_angles(x, w, labels, ignore_index=4), expected, strict=True):
        assert_counts(counts, found, ERROR)


def test_a_head_that_begins_anew_forgets_the_angles():
    head = SFaceLoss(16, 40, angle_histogram=True)
    head(torch.randn(4, 16), torch.arange(4))
    assert head.angle_counter.counts.any() and head.angle_counter.steps
    head.reset_parameters()
    assert not head.angle_counter.counts.any() and not head.angle_counter.steps
