"""Clipping by the norm of a gradient that waits, and loss scaling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sface_kernels.distributed import clip_grad_norm_
from sface_kernels.optim import HeadSGD
from tests.optim.trainings import RULES, SHAPE, batch, make_head, train, waiting
from tests.support.problems import trained_problem


@pytest.fixture
def problem():
    return trained_problem(*SHAPE)


class TestClipping:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("backend", ["native", "chunked"])
    def test_max_norm(self, backend, rule):
        norms = []

        def loop(head, optimizer, problem):
            ours = isinstance(optimizer, RULES[rule][0])
            for step in range(3):
                for part in range(2):
                    head(*batch(problem, 2 * step + part)).backward()
                if ours:
                    optimizer.max_norm = 0.5
                    norms.append(float(optimizer.grad_norm()))
                else:
                    norms.append(float(nn.utils.clip_grad_norm_(head.parameters(), 0.5)))
                assert norms[-1] > 0.5, "nothing was clipped"
                optimizer.step()
                optimizer.zero_grad()

        train(loop, trained_problem(*SHAPE), rule, dict(lr=0.05), backend=backend)
        assert norms[:3] == pytest.approx(norms[-3:], rel=1e-4)  # of ours and of float64

    def test_below_max_norm_nothing_changes(self, problem):
        for max_norm in (None, 1e9):
            head, optimizer = waiting(problem, max_norm=max_norm)
            optimizer.step()
            if max_norm is None:
                expected = head.weight.detach().clone()
        assert torch.equal(head.weight, expected)

    def test_by_the_norm_of_all(self, problem):
        """scale_grad and grad_norm make what clip_grad_norm_ makes over several parameters."""
        _, optimizer = waiting(problem)
        dense = make_head(problem)
        dense(*batch(problem, 0)).backward()
        other = nn.Parameter(torch.ones(3))
        other.grad = torch.full((3,), 2.0)
        total = torch.linalg.vector_norm(torch.stack([optimizer.grad_norm(), other.grad.norm()]))
        torch.testing.assert_close(total, nn.utils.clip_grad_norm_([dense.weight, other], 0.1))
        optimizer.scale_grad(0.1 / (total + 1e-6))
        torch.testing.assert_close(optimizer.grad_norm(), dense.weight.grad.norm())

    def test_clipping_that_would_be_skipped_is_not_silent(self, problem):
        head, _ = waiting(problem)
        with pytest.warns(UserWarning, match="Clip it by that optimizer's max_norm"):
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        with pytest.raises(RuntimeError, match=r"a head's weight whose gradient waits .* give that optimizer max_norm"):
            clip_grad_norm_(head.parameters(), 1.0)

    def test_another_optimizer_and_zero_grad_of_the_module_are_not_silent(self, problem):
        head, _ = waiting(problem)
        other = torch.optim.SGD(head.parameters(), lr=1.0)
        for meant in (other.step, head.zero_grad):
            with pytest.warns(UserWarning, match="drop it by its zero_grad"):
                meant()


class TestGradScaler:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("backend", ["native", "chunked"])
    def test_steps(self, backend, rule):
        """With an overflow on the way that both skip, and clipping of the unscaled gradient."""
        scales = []

        def loop(head, optimizer, problem):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
            ours = isinstance(optimizer, RULES[rule][0])
            for step in range(5):
                loss = scaler.scale(head(*batch(problem, step)))
                (loss * torch.inf if step == 2 else loss).backward()
                if ours:
                    optimizer.max_norm = 0.5
                else:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(head.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scales.append(scaler.get_scale())

        train(loop, trained_problem(*SHAPE), rule, dict(lr=0.05), backend=backend)
        assert scales[:5] == scales[5:10] == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11]

    def test_an_overflow_of_the_head_alone(self, problem):
        """Upstream gradients are finite, but a row is so short that its own gradient is not."""
        head, optimizer = waiting(problem)
        with torch.no_grad():
            head.weight[3] *= 1e-9
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        scaler.scale(head(*batch(problem, 0))).backward()
        before = head.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(head.weight, before) and scaler.get_scale() == 2.0**119
        assert head.weight.grad is None

    def test_with_another_gradient_beside_it(self, problem):
        head, optimizer = waiting(problem)
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        scaler.scale(head(*batch(problem, 0)) * 1e10 + head.weight.sum()).backward()
        scaler.step(optimizer)
        assert torch.equal(head.weight, problem.w)

    def test_two_optimizers(self, problem):
        backbone = nn.Linear(4, SHAPE[2])
        head, optimizer = waiting(problem)
        optimizer.zero_grad()
        other = torch.optim.SGD(backbone.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(head(backbone(torch.randn(SHAPE[0], 4)), problem.labels)).backward()
        scaler.unscale_(other)
        for each in (other, optimizer):
            scaler.step(each)
        scaler.update()
        assert not torch.equal(head.weight, problem.w)

    def test_unscale_raises_at_the_step(self, problem):
        head, optimizer = waiting(problem)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(head(*batch(problem, 0))).backward()
        with pytest.warns(UserWarning, match="waits for the step"):
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"GradScaler.unscale_: .* leave unscale_ out .* clip by max_norm"):
            scaler.step(optimizer)

    def test_switched_off(self, problem):
        head, optimizer = waiting(problem)
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
        assert not torch.equal(head.weight, problem.w)


def test_another_gradient_beside_it_counts_and_is_scaled():
    problem, moved = trained_problem(*SHAPE), []
    for ours in (True, False):
        head = make_head(problem)
        optimizer = HeadSGD(head, lr=0.1, max_norm=0.5) if ours else torch.optim.SGD(head.parameters(), lr=0.1)
        (head(*batch(problem, 0)) + head.weight.pow(2).sum()).backward()
        if not ours:
            torch.nn.utils.clip_grad_norm_(head.parameters(), 0.5)
        optimizer.step()
        moved.append(head.weight.detach())
    torch.testing.assert_close(*moved)
