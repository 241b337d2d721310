"""Exact calls of backends that multiply in parts, as an optimizer that looks at each class row by itself sees them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.optimizers import OPTIMIZERS, trained
from sface_kernels.testing.truth import compute_truth
from sface_kernels.testing.workloads import Case, Shape, make_workload
from tests.support import cases
from tests.support.checks import Judge, run
from tests.support.problems import GEOMETRIES, Problem, rows_at_cosines

# One block and a part of one; an odd number of samples and features; two groups of samples; the usual D.
SHAPES = [(33, 97, 123), (257, 331, 127), (128, 1009, 512)]
NORMAL = torch.finfo(torch.float32).tiny


# Triton's interpreter is slow: it gets the smaller of what there is.
BACKENDS = ["native", "triton"]


@pytest.fixture
def exact(backend) -> cases.Case:
    case = cases.Case(backend, "cpu", cases.f32, cases.f32)
    if case.reason_to_skip() is not None:
        pytest.skip(f"{case}: {case.reason_to_skip()}")
    return case


def assert_each_row(result, problem: Problem) -> None:
    """1 % of its own length for every row of ∂w whose length float32 holds as a normal number, 32 times over."""
    true = compute_truth(problem.x, problem.w, problem.labels).grad_w
    length = true.norm(dim=1)
    normal = length > 32 * NORMAL
    assert normal.any()
    error = (result.grad_w.double() - true).norm(dim=1)[normal] / length[normal]
    assert float(error.max()) < 1e-2, f"row {int(error.argmax())} of {len(error)} is off by {float(error.max()):.1e}"


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("backend, shape", [*(("native", shape) for shape in SHAPES), ("triton", SHAPES[0])])
def test_every_class_row_by_itself(exact, shape, geometry):
    problem = GEOMETRIES[geometry](*shape)
    problem = problem._replace(upstream=torch.full((shape[0],), 1 / shape[0]))
    assert_each_row(run(exact, problem, filter_eps=0.0), problem)


@pytest.mark.parametrize("backend, d", [("native", 40), ("native", 512), ("triton", 40)])
def test_rows_down_to_the_smallest_numbers(exact, d):
    """Coefficients from s to 2⁻¹²⁰·s, each class with its own: AMX takes numbers below 2⁻¹²⁶ for 0, fp16 ends at 2⁻²⁴,
    and the entries of a row are smaller than its coefficient."""
    n, c = 40, 480
    axis = torch.eye(d)[0]
    w = rows_at_cosines(axis, torch.linspace(-0.65, 0.6, c)).float() * torch.linspace(0.5, 3, c).unsqueeze(1)
    x = F.normalize(axis + 0.01 * torch.randn(n, d, generator=torch.Generator().manual_seed(5)) / d**0.5)
    labels = torch.full((n,), c - 1)
    problem = Problem(
        x, w[torch.randperm(c, generator=torch.Generator().manual_seed(6))], labels, torch.full((n,), 1 / n)
    )
    assert_each_row(run(exact, problem, filter_eps=0.0), problem)


def test_a_single_near_class_among_far_ones(native):
    """A tile of far pairs may have coarser products; one near pair in it, whatever its place, may not. Two blocks of 48
    classes are added together, far and near ones not."""
    n, c, d = 64, 240, 256
    problem = GEOMETRIES["random"](n, c, d)
    problem = problem._replace(labels=(torch.arange(n) + 5) % c, upstream=torch.full((n,), 1 / n))
    for sample, cls in ((0, 0), (31, 47), (32, 48), (63, 95), (17, 90), (5, 100), (40, 191), (1, 239)):
        w = problem.w.clone()
        w[cls] = F.normalize(F.normalize(problem.x[sample], dim=0) + 1.5 * F.normalize(w[cls], dim=0), dim=0)
        near = problem._replace(w=w)
        result = run(native, near, filter_eps=0.0)
        Judge(near, filter_eps=0.0).check(result, "native")
        assert_each_row(result, near)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("optimizer", ["AdamW", "Adagrad", "RMSprop"])
def test_four_steps_beside_the_reference(exact, optimizer):
    """At most 1e-2 of the path apart from the reference in float64: these divide each entry by its own size."""
    batches = [make_workload(Case(Shape(32, 600, 256), "random", seed=seed)) for seed in range(4)]
    start = batches[0].w
    true = trained(optimizer, batches, start.double(), "reference", 0.0)
    assert optimizer in OPTIMIZERS and float((true - start).norm()) > 0
    found = trained(optimizer, batches, start, exact.backend, 0.0)
    assert float((found - true).norm() / (true - start).norm()) < 1e-2
