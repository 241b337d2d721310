"""Statistics of single rows, the hardest other class first, against every cosine in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import SFaceRowStats, sface_loss
from sface_kernels.autograd import row_losses
from sface_kernels.ops import compute_dtype
from sface_kernels.summary import describe_rows
from sface_kernels.types import INVALID, RowStats
from sface_kernels.validation import make_hyperparameters
from tests.support.cases import f32, f64
from tests.support.oracle import native_screen_error, triton_screen_error, worst_cosine_roundings
from tests.support.problems import GEOMETRIES, Problem


def statistics(case, problem: Problem, **options) -> SFaceRowStats:
    x, w, labels, _ = problem.to(case.device, case.dtype, case.weight_dtype)
    _, rows = sface_loss(x, w, labels, backend=case.backend, return_stats="rows", **options)
    return SFaceRowStats(*(t.cpu() for t in rows))


def other_cosines(case, problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In float64, of the numbers that the case is given: all `[N, C]`, −inf at own classes; to the own class `[N]`; and
    how far the case's screen may move each of them."""
    x, w, labels, _ = problem.to("cpu", case.dtype, case.weight_dtype)
    x, w = F.normalize(x.double()), F.normalize(w.double())
    cos = (x @ w.t()).clamp(-1, 1)
    own = cos.gather(1, labels.unsqueeze(1)).squeeze(1)
    cos.scatter_(1, labels.unsqueeze(1), -math.inf)
    screen = {"native": native_screen_error(x, w, 80.0), "triton": triton_screen_error(x, w, 80.0, 1.23, 2.0**-16)}
    return cos, own, screen.get(case.backend, torch.zeros_like(cos))


@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_hardest_other_class(case, geometry, filter_eps):
    """Its reported cosine is that of the reported class, and no class is harder by more than the screen may err."""
    n, c, d = (9, 170, 40) if case.emulated else (33, 700, 40)
    problem = GEOMETRIES[geometry](n, c, d)
    rows = statistics(case, problem, filter_eps=filter_eps)
    cos, own, screen = other_cosines(case, problem)
    assert rows.hardest_class.dtype == torch.int64 and rows.hardest_class.shape == (n,)
    assert ((rows.hardest_class >= 0) & (rows.hardest_class < c)).all()
    assert (rows.hardest_class != problem.labels).all()
    # Triton's dense products are of half embeddings as they are
    multiplied = case.dtype if case.backend == "triton" else compute_dtype(*(torch.empty(0, dtype=t) for t in case[2:]))
    rounding = worst_cosine_roundings(d) * torch.finfo(multiplied).eps / 2
    at_class = cos.gather(1, rows.hardest_class.unsqueeze(1)).squeeze(1)  # −inf if it were the own class
    assert ((rows.cos_hardest - at_class).abs() <= rounding).all()
    # the screen's tag of a column takes up to 128 units of 2⁻²³ more (kernels/screen.py)
    tag = 128 * 2.0**-23 if case.backend == "triton" else 0.0
    assert ((cos.amax(1) - at_class) <= 2 * (rounding + screen.amax(1)) + tag).all()
    assert ((rows.cos_target - own).abs() <= rounding).all()
    angle = rows.cos_target.double().acos()
    assert (rows.angle - angle).abs().max() <= 4 * torch.finfo(rows.angle.dtype).eps


@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
def test_equal_cosines(case32, filter_eps):
    """Copies of a centre on both sides of every cut of the classes: the lowest number, and never the own one.

    D and the last block of classes are so large that none takes dense products by itself: they round in another order.
    """
    c, d = 300 if case32.emulated else 1320, 128
    g = torch.Generator().manual_seed(8)
    w = torch.randn(c, d, generator=g)
    copies = [j for j in (7, 40, 47, 48, 255, 256, 257, 700, 1299) if j < c]
    w[copies] = w[7].clone()
    x = w[7] * torch.tensor([1.0, 2.0, 0.5, 3.0]).unsqueeze(1) + 0.1 * torch.randn(4, d, generator=g)
    labels = torch.tensor([100, 7, copies[-1], 40])
    rows = statistics(case32, Problem(x, w, labels, torch.ones(4)), filter_eps=filter_eps)
    assert rows.hardest_class.tolist() == [7, 40, 7, 7]
    for i, cls in enumerate(labels.tolist()):
        if cls in copies:
            assert rows.cos_hardest[i] == pytest.approx(float(rows.cos_target[i]), abs=1e-6)


def test_no_other_class(case):
    problem = GEOMETRIES["random"](3, 1, 8)
    rows = statistics(case, problem)
    assert rows.hardest_class.tolist() == [-1] * 3 and (rows.cos_hardest == -math.inf).all()
    empty = statistics(case, problem._replace(x=problem.x[:0], labels=problem.labels[:0]))
    assert all(len(t) == 0 for t in empty) and empty.hardest_class.dtype == torch.int64


@pytest.mark.parametrize("filter_eps", [0.0, 2.0**-16])
def test_ignored_and_not_finite(case, filter_eps):
    problem = GEOMETRIES["trained"](9, 60, 16)
    problem.labels[2] = -100
    problem.x[2] = math.nan
    problem.x[4, 3] = math.nan
    rows = statistics(case, problem, filter_eps=filter_eps)
    assert rows.hardest_class[[2, 4]].tolist() == [-1, -1] and (rows.hardest_class[[0, 1, 3, 5, 8]] >= 0).all()
    numbers = torch.stack([t for name, t in rows._asdict().items() if name != "hardest_class"])
    assert not numbers[:, 2].any()
    finite = numbers.isfinite().all(0).tolist()
    assert finite == [i != 4 for i in range(9)] and rows.cos_target[4].isnan() and rows.angle[4].isnan()


def test_a_label_that_is_no_class(case):
    """Where labels are not checked, as on a GPU: everything that the own class decides is NaN."""
    x, w, target, _ = GEOMETRIES["trained"](4, 60, 16).to(case.device, case.dtype, case.weight_dtype)
    target[1] = INVALID
    hp = make_hyperparameters(64.0, 80.0, 0.8, 1.23, None, None, case.dtype, 16)
    row_loss, row_stats, hardest_class, _ = row_losses(x, w, target, case.backend, hp)
    rows = describe_rows(RowStats(*row_stats.unbind(0)), hardest_class, target)
    for values in (row_loss, rows.intra, rows.angle):
        assert values.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_means_of_rows_are_the_statistics_of_the_batch(case32, reduction):
    problem = GEOMETRIES["trained"](23, 70 if case32.emulated else 300, 32).to(case32.device, f32, f32)
    problem.labels[::4] = -100
    x, w, labels, _ = problem
    options = dict(backend=case32.backend, filter_eps=2.0**-8, reduction=reduction)
    loss, rows = sface_loss(x.requires_grad_(), w, labels, return_stats="rows", **options)
    same_loss, batch = sface_loss(x, w, labels, return_stats=True, **options)
    assert torch.equal(loss, same_loss) and loss.requires_grad
    assert not any(t.requires_grad for t in rows) and all(t.shape == (23,) and t.device == x.device for t in rows)
    counted = labels != -100
    for name in ("intra", "inter", "cos_target", "dropped"):
        values = getattr(rows, name)
        assert not values[~counted].any()
        torch.testing.assert_close(values[counted].mean(), getattr(batch, name), rtol=1e-5, atol=1e-7)
    assert float(batch.dropped) > 0
    correct = (rows.cos_target > rows.cos_hardest) & counted
    assert float(correct.sum() / counted.sum()) == pytest.approx(float(batch.accuracy))
    if reduction == "none":
        torch.testing.assert_close(rows.intra + rows.inter, loss)


def test_in_float64():
    problem = GEOMETRIES["trained"](23, 300, 32)
    x, w = problem.x.to(f64), problem.w.to(f64)
    _, rows = sface_loss(x, w, problem.labels, return_stats="rows")
    assert [t.dtype for t in rows] == [torch.int64 if name == "hardest_class" else f64 for name in rows._fields]


def test_other_words_are_refused():
    with pytest.raises(ValueError, match=r"^return_stats: expected False, True or 'rows', got 'row'"):
        sface_loss(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), return_stats="row")
