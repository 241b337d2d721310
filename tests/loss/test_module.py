"""`SFaceLoss` as an nn.Module: its parameter, its state, and what training scripts do with both."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch

from sface_kernels import SFaceLoss, SFaceStats, sface_loss
from tests.support.cases import f64


def batch(n: int = 9, d: int = 16, c: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d), torch.randint(0, c, (n,))


def test_one_direct_parameter():
    head = SFaceLoss(16, 40)
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert head.weight.shape == (40, 16) and head.weight.dtype == torch.float32
    assert list(head.state_dict()) == ["weight"] and not list(head.buffers()) and not list(head.children())


def test_sizes_by_their_other_names():
    """Those of class-parallel heads and of metric-learning libraries."""
    for head in (SFaceLoss(embedding_size=16, num_classes=40), SFaceLoss(16, num_classes=40)):
        assert (head.in_features, head.out_features) == (16, 40) and head.weight.shape == (40, 16)


@pytest.mark.parametrize("c", [100, 10_000])
def test_initial_weight(c):
    """N(0, 2·√(2/C)): mean and standard deviation within five standard errors, and the tails are a normal's."""
    torch.manual_seed(3)
    weight = SFaceLoss(64, c).weight.detach().double()
    std = 2 * math.sqrt(2 / c)
    assert abs(float(weight.mean())) < 5 * std / weight.numel() ** 0.5
    assert abs(float(weight.std()) / std - 1) < 5 / (2 * weight.numel()) ** 0.5
    share = float((weight.abs() > 2 * std).double().mean())
    assert share == pytest.approx(0.0455, abs=5 * (0.0455 / weight.numel()) ** 0.5)


def test_initial_weight_that_does_not_depend_on_the_number_of_classes():
    for c in (100, 10_000):
        head = SFaceLoss(64, c, init_std=0.125)
        assert head.weight.std().item() == pytest.approx(0.125, rel=5 / (2 * 64 * c) ** 0.5)
        assert head.weight.norm(dim=1).mean().item() == pytest.approx(1, rel=0.02)
    head.add_classes(2000)
    assert head.weight[10_000:].std().item() == pytest.approx(0.125, rel=0.02)
    head.init_std = None
    head.reset_parameters()
    assert head.weight.std().item() == pytest.approx(2 * math.sqrt(2 / 12_000), rel=0.02)
    for wrong, error in (
        (0.0, ValueError),
        (-1, ValueError),
        (math.inf, ValueError),
        ("1", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="init_std: expected"):
            SFaceLoss(64, 10, init_std=wrong)


@pytest.mark.parametrize("init_std, growth", [(None, 100), (16**-0.5, 1)], ids=["published", "init_std"])
def test_what_the_initialisation_does_to_the_first_step(init_std, growth):
    """docs/training.md: SGD turns a row by lr·T/‖w‖², whose tangent grows like C with the published initialisation."""
    turned = []
    for c in (100, 10_000):
        torch.manual_seed(2)
        head = SFaceLoss(16, c, init_std=init_std)
        before = head.weight.detach().clone().double()
        y = torch.arange(64)
        head(torch.randn(64, 16), y).backward()
        torch.optim.SGD(head.parameters(), lr=1e-4).step()
        cos = torch.nn.functional.cosine_similarity(head.weight.detach()[y].double(), before[y])
        turned.append((1 / cos**2 - 1).sqrt().median())
    assert float(turned[1] / turned[0]) == pytest.approx(growth, rel=0.5)  # other rows are drawn, so T differs


def test_reset_parameters_draws_again():
    head = SFaceLoss(16, 40)
    before = head.weight.detach().clone()
    head.reset_parameters()
    assert not torch.equal(before, head.weight)


def test_every_option_reaches_the_loss():
    """The module is the function with its options; each one changes the result, so none can be lost on the way."""
    x, y = batch(40)
    w = torch.randn(40, 16)
    y[:5] = 7
    plain = dict(s=64.0, k=80.0, a=0.8, b=1.23, k_inter=None, reduction="mean", ignore_index=-100, filter_eps=None)
    changes = dict(s=32.0, k=20.0, a=1.3, b=0.9, k_inter=30.0, reduction="none", ignore_index=7, filter_eps=0.2)
    for name, value in changes.items():
        head = SFaceLoss(16, 40, **{**plain, name: value}, backend="chunked")
        head.weight.data.copy_(w)
        leaf = w.clone().requires_grad_()
        ours = head(x, y)
        expected = sface_loss(x, leaf, y, **{**plain, name: value}, backend="chunked")
        assert torch.equal(ours, expected), name
        (grad,) = torch.autograd.grad(ours.sum(), head.weight)
        assert torch.equal(grad, torch.autograd.grad(expected.sum(), leaf)[0]), name
        default = sface_loss(x, leaf, y, **plain, backend="chunked")
        changed = default.shape != expected.shape or not torch.equal(default, expected)
        assert changed or not torch.equal(grad, torch.autograd.grad(default, leaf)[0]), f"{name} changes nothing here"


def test_statistics_on_request():
    head, (x, y) = SFaceLoss(16, 40), batch()
    loss, stats = head(x, y, return_stats=True)
    assert isinstance(stats, SFaceStats) and torch.equal(loss, head(x, y))
    assert float(loss.detach()) == pytest.approx(float(stats.intra + stats.inter), rel=1e-5)


def test_repr_says_what_matters():
    text = repr(SFaceLoss(16, 40, s=32.0, a=0.87, b=1.2, backend="chunked"))
    for part in (
        "SFaceLoss(",
        "in_features=16",
        "out_features=40",
        "s=32.0",
        "k=80.0",
        "a=0.87",
        "b=1.2",
        "backend='chunked'",
    ):
        assert part in text


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied):
    """A copy has its own weight and every option."""
    head = SFaceLoss(16, 40, s=30.0, k=50.0, a=0.9, b=1.1, k_inter=60.0, reduction="sum", filter_eps=0.0)
    x, y = batch()
    twin = copied(head)
    assert torch.equal(twin(x, y), head(x, y)) and repr(twin) == repr(head)
    with torch.no_grad():
        twin.weight.mul_(-1)
    assert not torch.equal(twin(x, y), head(x, y))


def test_checkpoint_round_trip():
    head, other, (x, y) = SFaceLoss(16, 40), SFaceLoss(16, 40), batch()
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(head(x, y), other(x, y))


def test_dtype_and_device_arguments():
    assert SFaceLoss(16, 40, dtype=f64).weight.dtype == f64
    head = SFaceLoss(16, 40, device="meta")
    assert head.weight.is_meta
    assert head.to_empty(device="cpu").weight.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype):
    """`head.to(dtype)` moves the weight; the loss takes it with embeddings of that dtype and is at least fp32."""
    head, (x, y) = SFaceLoss(16, 40).to(dtype), batch()
    loss = head(x.to(dtype), y)
    loss.backward()
    assert head.weight.grad.dtype == dtype and loss.dtype == torch.promote_types(dtype, torch.float32)


def test_training_lowers_the_loss():
    """Twenty SGD steps on one batch, embeddings and centres both free."""
    head, (x, y) = SFaceLoss(16, 40), batch()
    x.requires_grad_()
    optimizer = torch.optim.SGD([x, *head.parameters()], lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = head(x, y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 5


def test_training_mode_changes_nothing():
    head, (x, y) = SFaceLoss(16, 40), batch()
    assert torch.equal(head.train()(x, y), head.eval()(x, y))


def test_script_friendly_names():
    """Training scripts pick head parameters by these words in a module's class string."""
    name = str(SFaceLoss).lower()
    assert "sfaceloss" in name and not any(word in name for word in ("model", "container", "batchnorm"))


def test_numbers_that_float64_alone_can_hold():
    assert SFaceLoss(8, 4, dtype=f64, s=1e39).s == 1e39
    with pytest.raises(ValueError, match="s: expected"):
        SFaceLoss(8, 4, s=1e39)
