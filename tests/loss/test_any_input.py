"""Any shape, layout, dtype pair and set of tensors that need gradients, on every backend: what the contiguous problem
gives in fp64, within the budget of every other test."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sface_kernels import sface_loss
from tests.loss.test_filter import examples
from tests.loss.test_layouts import LAYOUTS
from tests.support.checks import Judge, Result, run
from tests.support.problems import GEOMETRIES

layout = st.sampled_from(["as it is", *LAYOUTS, "stride of a single one"])


def laid_out(t: torch.Tensor, name: str) -> torch.Tensor:
    """The same values another way; dimensions of size 1 with a stride that means nothing."""
    if name == "stride of a single one":
        return torch.as_strided(t, t.shape, [7 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True)])  # fmt: skip
    return LAYOUTS[name](t) if name in LAYOUTS else t


@examples
@given(
    shape=st.tuples(*(st.one_of(st.just(1), st.integers(1, most)) for most in (9, 60, 40))),
    geometry=st.sampled_from(sorted(GEOMETRIES)),
    layouts=st.tuples(layout, layout),
    needs=st.tuples(st.booleans(), st.booleans()),
    column=st.booleans(),
    filter_eps=st.sampled_from([0.0, 2.0**-16]),
    label_dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
)
def test_any_input(case, shape, geometry, layouts, needs, column, filter_eps, label_dtype):
    problem = GEOMETRIES[geometry](*shape).to(case.device, case.dtype, case.weight_dtype)
    leaves = [t.clone().requires_grad_(needed) for t, needed in zip((problem.x, problem.w), needs, strict=True)]
    x, w = (laid_out(t, name) for t, name in zip(leaves, layouts, strict=True))
    labels = problem.labels.to(label_dtype)
    rows, stats = sface_loss(
        x,
        w,
        labels.unsqueeze(1) if column else labels,
        reduction="none",
        return_stats=True,
        filter_eps=filter_eps,
        backend=case.backend,
    )
    if any(needs):
        rows.backward(problem.upstream.to(rows.device, rows.dtype))
    plain = run(case, problem, filter_eps=filter_eps)  # for what was not asked for
    grads = [t.grad if needed else theirs for t, needed, theirs in zip(leaves, needs, plain[2:], strict=True)]
    assert [t.grad is not None for t in leaves] == list(needs)
    Judge(problem, filter_eps=filter_eps).check(Result(rows.detach(), stats, *grads), case.backend)
