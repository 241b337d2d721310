"""`SFaceLoss.add_classes`: old rows and their optimizer state stay, new ones start as a new head's do."""

from __future__ import annotations

import math

import pytest
import torch

from sface_kernels import SFaceLoss

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),  # with a number for each row, and one for each column
}


def step(head, optimizer, seed, classes):
    g = torch.Generator().manual_seed(seed)
    loss = head(torch.randn(6, 8, generator=g), torch.randint(0, classes, (6,), generator=g))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on(name):
    """As a head of the final size whose last rows had no gradient, no decay and no state until then."""
    head = SFaceLoss(8, 10, filter_eps=0.0)
    optimizer = OPTIMIZERS[name](head.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for seed in range(3):
        step(head, optimizer, seed, 10)
    before, state = head.weight, optimizer.state[head.weight]
    head.add_classes(4, optimizer)
    assert head.out_features == 14 and head.weight.shape == (14, 8) and head.weight.grad is None
    assert torch.equal(head.weight[:10], before) and len(optimizer.state) == 1
    after = optimizer.state[head.weight]
    assert set(after) == set(state)
    for key, value in state.items():
        if value is not None and value.dim() == 2 and len(value) == 10:
            assert torch.equal(after[key][:10], value) and value.any(), key
            assert after[key].shape == (14, value.shape[1]) and not after[key][10:].any(), key
        else:
            assert after[key] is value
    moved = head.weight.detach().clone()
    schedule.step()
    step(head, optimizer, 9, 14)
    assert optimizer.param_groups[0]["params"][0] is head.weight
    if name != "Adafactor":  # whose steps are lost to rounding where a row's gradient is far smaller than others
        assert (head.weight != moved).any(1).all()


def test_new_rows():
    head = SFaceLoss(64, 1000)
    head.weight.requires_grad_(False)
    head.add_classes(2000)
    assert not head.weight.requires_grad
    std = 2 * math.sqrt(2 / 3000)
    rows = head.weight[1000:].double()
    assert abs(float(rows.std()) / std - 1) < 5 / (2 * rows.numel()) ** 0.5


def test_bad_input():
    head = SFaceLoss(8, 10)
    with pytest.raises(ValueError, match="count: expected an int > 0, got 0"):
        head.add_classes(0)
    with pytest.raises(TypeError, match=r"count: expected an int, got 2\.0"):
        head.add_classes(2.0)
    weight = head.weight
    with pytest.raises(ValueError, match="optimizer: expected one that holds the head's weight"):
        head.add_classes(2, torch.optim.SGD(SFaceLoss(8, 10).parameters()))
    assert head.weight is weight and head.out_features == 10, "half a change"
    head = torch.nn.utils.parametrizations.weight_norm(head)
    with pytest.raises(TypeError, match="weight: expected a Parameter, got what a parametrization computes"):
        head.add_classes(2)
    assert head.weight.shape == (10, 8) and head.out_features == 10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_a_single_class(name):
    head = SFaceLoss(8, 1)
    optimizer = OPTIMIZERS[name](head.parameters())
    step(head, optimizer, 0, 1)
    head.add_classes(4, optimizer)
    assert math.isfinite(step(head, optimizer, 1, 5)) and head.weight.isfinite().all()
