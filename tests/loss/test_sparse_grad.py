"""`sparse_grad=True`: ∂w as a COO tensor, beside the dense one."""

from __future__ import annotations

import pytest
import torch

from sface_kernels import SFaceLoss, sface_loss
from tests.support.cases import Case, f32
from tests.support.problems import GEOMETRIES

SHAPE = (40, 3001, 64)  # more rows of ∂w than are made at a time where they are long


def heads(case, geometry, **options):
    problem = GEOMETRIES[geometry](*SHAPE).to(case.device, case.dtype, case.weight_dtype)
    made = []
    for sparse in (True, False):
        head = SFaceLoss(SHAPE[2], SHAPE[1], sparse_grad=sparse, backend=case.backend, device=case.device, **options)
        head = head.to(case.weight_dtype)
        head.load_state_dict({"weight": problem.w})
        made.append(head)
    return problem, *made


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_dense_gradient(case, geometry, monkeypatch):
    monkeypatch.setattr("sface_kernels.pending.RANGE_BYTES", 100 * 4 * SHAPE[2])  # many ranges
    if case.backend == "triton" and case.device == "cpu":
        pytest.skip("a forward for each range is slow in Triton's interpreter")
    problem, sparse, dense = heads(case, geometry, filter_eps=2.0**-12)
    for head in (sparse, dense):
        head(problem.x, problem.labels).backward()
    grad = sparse.weight.grad
    assert grad.layout is torch.sparse_coo and grad.dtype == case.weight_dtype
    assert grad.shape == dense.weight.shape
    rows = (dense.weight.grad != 0).any(1).nonzero().squeeze(1)
    assert torch.equal(grad._indices()[0], rows) and 0 < len(rows) <= SHAPE[1]
    # the same sums; matrix products of other sizes may order them otherwise
    torch.testing.assert_close(grad.to_dense(), dense.weight.grad)


@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
@pytest.mark.parametrize("optimizer", ["SGD", "SparseAdam"])
def test_optimizers(backend, optimizer):
    """Rows with a gradient move as on the dense gradient, the others stand still."""
    case = Case(backend, "cpu", f32, f32)
    if reason := case.reason_to_skip():
        pytest.skip(f"{case}: {reason}")
    problem, sparse, dense = heads(case, "random", filter_eps=2.0**-8)
    make = {"SGD": torch.optim.SGD, "SparseAdam": torch.optim.SparseAdam}[optimizer]
    for head in (sparse, dense):
        for _ in range(2):  # accumulates
            head(problem.x, problem.labels).backward()
    rows = (dense.weight.grad != 0).any(1)
    assert rows.any() and not rows.all()
    if optimizer == "SparseAdam":  # it takes no dense gradient; its eps is not where Adam has it
        dense.weight.grad = dense.weight.grad.to_sparse(1)
    for head in (sparse, dense):
        make(head.parameters(), lr=0.1).step()
    assert torch.equal(sparse.weight[~rows], problem.w[~rows])
    assert not torch.isclose(sparse.weight[rows], problem.w[rows]).all(1).any()
    torch.testing.assert_close(sparse.weight, dense.weight)


def test_the_function_and_only_the_weight(native):
    problem = GEOMETRIES["trained"](*SHAPE)
    w = problem.w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sface_loss(problem.x, w, problem.labels, sparse_grad=True), w)
    assert grad.is_sparse
    (dense,) = torch.autograd.grad(sface_loss(problem.x, w, problem.labels), w)
    torch.testing.assert_close(grad.to_dense(), dense)


def test_not_a_number(native):
    problem = GEOMETRIES["trained"](*SHAPE)
    problem.w[7, 2] = torch.nan
    w = problem.w.clone().requires_grad_()
    sface_loss(problem.x, w, problem.labels, sparse_grad=True).backward()
    assert w.grad.to_dense()[7].isnan().all()
