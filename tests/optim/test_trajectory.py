"""A training by the head's optimizer is that by torch.optim on the dense gradient, up to rounding."""

from __future__ import annotations

import pytest
import torch

from sface_kernels import SFaceLoss, pending
from sface_kernels.testing.workloads import Case as Workload
from sface_kernels.testing.workloads import Shape, make_workload
from tests.optim.trainings import OPTIONS, RULES, batch, make, train
from tests.support.cases import Case, f32
from tests.support.problems import GEOMETRIES, Problem, random_problem, trained_problem

# Some classes more than whole blocks of 48, an odd number of features; a group of samples and a little.
SHAPE = (70, 505, 33)


def steps(count, per_step=1):
    def loop(head, optimizer, problem):
        for step in range(count):
            optimizer.zero_grad()
            for part in range(per_step):
                x, labels = batch(problem, step * per_step + part)
                rows = len(x) - 7 * part  # another number of samples each time
                (head(x[:rows], labels[:rows]) / per_step).backward()
            optimizer.step()

    return loop


@pytest.mark.parametrize("filter_eps", [2.0**-24, 0.0], ids=["default", "exact"])
@pytest.mark.parametrize("geometry, density", [("random", None), ("trained", None), ("dense", 0.05), ("dense", 0.9)])
@pytest.mark.parametrize("rule", RULES)
def test_two_hundred_steps(native, rule, geometry, density, filter_eps):
    work = make_workload(Workload(Shape(64, 600, 64), geometry, density))
    problem = Problem(work.x, work.w, work.y, torch.ones(64))
    train(steps(200), problem, rule, backend="native", filter_eps=filter_eps)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["native", "chunked", "reference", "triton"])
def test_backends(backend, rule, geometry):
    if reason := Case(backend, "cpu", f32, f32).reason_to_skip():
        pytest.skip(f"{backend}: {reason}")
    shape = (5, 35, 17) if backend == "triton" else SHAPE  # its interpreter is slow
    train(steps(3), GEOMETRIES[geometry](*shape), rule, backend=backend)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_accumulation(backend, rule):
    train(steps(4, per_step=3), trained_problem(*SHAPE), rule, backend=backend)


@pytest.mark.parametrize(
    "options",
    [
        dict(momentum=0.0),
        dict(momentum=0.0, weight_decay=0.0),
        dict(weight_decay=0.0),
        dict(nesterov=True),
        dict(dampening=0.3),
        dict(maximize=True),
        dict(lr=torch.tensor(1e-3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_sgd_options(backend, options):
    train(steps(5), trained_problem(*SHAPE), "SGD", options, backend=backend)


@pytest.mark.parametrize("options", [dict(maximize=True), dict(betas=(0.5, 0.9), eps=1e-3), dict(weight_decay=0.0)])
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_adamw_options(backend, options):
    train(steps(5), trained_problem(*SHAPE), "AdamW", options, backend=backend)


@pytest.mark.parametrize("filter_eps", [2.0**-24, 0.0], ids=["default", "exact"])
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_adamw_of_the_last_gradient_alone(backend, filter_eps):
    """With betas of 0 a row moves by the signs of its gradient, also where that is far below the one before it: a mean
    that is taken as m + (g − m) has lost it."""
    options = dict(betas=(0.0, 0.0))
    train(steps(5), random_problem(*SHAPE), "AdamW", options, backend=backend, filter_eps=filter_eps)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (17, 49, 33), (257, 331, 127)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_steps_of_odd_shapes(native, rule, shape):
    train(steps(3), trained_problem(*shape), rule, dict(weight_decay=1.0), backend="native")


@pytest.mark.parametrize("rule", RULES)
def test_rows_of_any_length(native, rule):
    """Rows shorter than `normalize` divides by, and longer than float32 can square."""
    problem = trained_problem(*SHAPE)
    problem.w[3] *= 1e-16
    problem.w[5] *= 1e25
    train(steps(2), problem, rule, dict(weight_decay=0.0), backend="native")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_schedulers(backend, rule):
    def loop(head, optimizer, problem):
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=8)  # moves momentum or β₁ too
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step])
        for step in range(6):
            head(*batch(problem, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            (cycle if step < 4 else decay).step()

    train(loop, trained_problem(*SHAPE), rule, backend=backend)


@pytest.mark.parametrize("rule", RULES)
def test_closures(rule):
    """Loops such as Lightning's give every step one; `step` runs it once, with gradients on, and returns its loss."""

    def loop(head, optimizer, problem):
        losses: list[torch.Tensor] = []

        def closure():
            optimizer.zero_grad()
            losses.append(head(*batch(problem, len(losses))))
            losses[-1].backward()
            return losses[-1]

        for step in range(3):
            with torch.no_grad():
                assert optimizer.step(closure) is losses[-1]
            assert len(losses) == step + 1

    train(loop, trained_problem(*SHAPE), rule, backend="native")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_other_losses_on_the_weight(backend, rule):
    """A gradient that came as `.grad` is added to the one that waits."""

    def loop(head, optimizer, problem):
        for step in range(3):
            optimizer.zero_grad()
            (head(*batch(problem, step)) + head.weight.pow(2).sum()).backward()
            assert head.weight.grad is not None
            optimizer.step()

    train(loop, trained_problem(*SHAPE), rule, backend=backend)


@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_upstream_gradients(backend):
    """Row by row, with zeros and ignored rows; kept graphs; and what the embeddings get."""
    grads = []

    def loop(head, optimizer, problem):
        for step in range(3):
            x, labels = batch(problem, step)
            x.requires_grad_()
            labels[::4] = -100
            rows = head(x, labels)
            optimizer.zero_grad()
            rows.backward(problem.upstream.to(rows.dtype), retain_graph=True)
            rows.sum().backward()
            optimizer.step()
        grads.append(x.grad)

    train(loop, trained_problem(*SHAPE), "SGD", backend=backend, reduction="none")
    ours, theirs, _, exact = grads
    assert float((ours - exact).norm()) <= 2 * float((theirs - exact).norm()) + 1e-7 * float(exact.norm())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_nothing_to_learn_is_a_step_too(backend, rule):
    """No rows, and ignored rows only: the gradient is 0, and momentum and decay go on as with torch.optim's."""

    def loop(head, optimizer, problem):
        for step in range(4):
            x, labels = batch(problem, step)
            if step == 1:
                labels[:] = -100
            if step >= 2:  # by itself, then with a batch that has rows
                head(x[:0], labels[:0]).backward()
            if step != 2:
                head(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(loop, trained_problem(*SHAPE), rule, backend=backend)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_weights_of_other_dtypes(rule, weight_dtype):
    """The same operations of PyTorch on the same numbers, class by class: the same bits."""
    problem = trained_problem(*SHAPE)
    problem = problem._replace(x=problem.x.to(weight_dtype), w=problem.w.to(weight_dtype))
    results = []
    for ours in (True, False):
        # AdamW's default is 0 in float16
        head, optimizer = make(problem, rule, ours, dict(eps=1e-3) if rule == "AdamW" else {})
        steps(3)(head, optimizer, problem)
        results.append(head.weight.detach())
    assert torch.equal(*results) and not torch.equal(results[0], problem.w)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", ["embedding", "weight", "upstream"])
@pytest.mark.parametrize("backend", ["native", "chunked"])
def test_not_a_number_reaches_the_same_weights(backend, bad, rule):
    problem = trained_problem(*SHAPE)
    if bad == "weight":
        problem.w[100, 3] = torch.nan
    seen = []
    for ours in (True, False):
        head, optimizer = make(problem, rule, ours, {}, backend=backend)
        x, labels = batch(problem, 0)
        if bad == "embedding":
            x[4, 2] = torch.nan
        (head(x, labels) * (torch.nan if bad == "upstream" else 1)).backward()
        optimizer.step()
        seen.append(head.weight.isnan())
    assert seen[1].any() and torch.equal(*seen)


@pytest.mark.parametrize("rule", RULES)
def test_ranges_of_blocks_of_several_sizes(rule, monkeypatch):
    """∂w a block at a time, of lists and of dense products: batches of 1100 and 900 rows have blocks of 256 and 291
    classes, the first of which are dense."""
    monkeypatch.setattr(pending, "RANGE_BYTES", 1)
    g = torch.Generator().manual_seed(1)
    axis, w = torch.randn(1, 24, generator=g), torch.randn(1500, 24, generator=g)
    w[:600] = axis + 0.1 * w[:600]
    batches = [
        (axis + 0.3 * torch.randn(n, 24, generator=g), torch.randint(1500, (n,), generator=g)) for n in (1100, 900)
    ]
    moved = []
    for ours in (True, False):
        head = SFaceLoss(24, 1500, backend="chunked", filter_eps=2.0**-12)
        head.load_state_dict({"weight": w})
        optimizer = RULES[rule][0 if ours else 1](head if ours else head.parameters(), **OPTIONS[rule])
        for _ in range(2):
            for x, labels in batches:
                head(x, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved.append(head.weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-6)
