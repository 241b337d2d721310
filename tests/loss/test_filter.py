"""The filter of the gradient: nothing active is missed, nothing else is kept, and nothing but the pair decides."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sface_kernels import sface_loss
from tests.support.cases import INTERPRETED, f32
from tests.support.checks import Judge, active_pairs, run
from tests.support.oracle import truth
from tests.support.problems import GEOMETRIES, Problem, rows_at_cosines, threshold_cosine

# The same examples each time, so that a failure is the change's and not the day's.
examples = settings(
    max_examples=8 if INTERPRETED else 100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EPS = st.sampled_from([2.0**-24, 2.0**-20, 2.0**-16, 2.0**-12, 2.0**-8, 2.0**-4])


def check_active_set(case, problem: Problem, **options) -> None:
    """Found by probing the gradient pair by pair: the fp64 set, but for pairs within fp32 rounding of the threshold.

    Parallel rows have no tangent, so their ∂w is rounding noise or 0 whether they count or not; there only the count tells.
    """
    t = truth(*problem, **options)
    certain = ~t.borderline & (t.cos.abs() < 1 - 1e-6)
    certain &= ~F.one_hot(problem.labels.cpu(), t.cos.shape[1]).bool()
    found = active_pairs(case, problem, **options)
    missed, extra = t.active & ~found & certain, ~t.active & found & certain
    assert not missed.any(), f"active pairs without a gradient: {missed.nonzero()[:5].tolist()} of {int(missed.sum())}"
    assert not extra.any(), f"dropped pairs with a gradient: {extra.nonzero()[:5].tolist()} of {int(extra.sum())}"
    count = int(run(case, problem, **options).stats.active_pairs)
    assert abs(count - int(t.active.sum())) <= int(t.borderline.sum())


def around_threshold(c: int, d: int, threshold: float, seed: int) -> torch.Tensor:
    """Cosines `[c]` at and about the threshold: a few ulp, half the margin of a 16-bit screen, that margin, twice it, those of an 8-bit one; ±1; any."""
    g = torch.Generator().manual_seed(seed)
    screen = d**0.5 * 2.0**-15
    steps = torch.tensor(
        [0, 2.0**-24, 2.0**-22, 2.0**-20, 2.0**-18, 0.1 * screen, 0.5 * screen, screen, 2 * screen, 0.005, 0.01, 0.02]
    )
    signs = torch.randint(0, 2, (c,), generator=g) * 2 - 1
    cos = threshold + signs * steps[torch.randint(0, len(steps), (c,), generator=g)].double()
    anywhere = torch.rand(c, generator=g) < 0.3
    cos = torch.where(anywhere, torch.rand(c, generator=g).double() * 2 - 1, cos).clamp(-1, 1)
    cos[torch.rand(c, generator=g) < 0.05] = 1.0
    cos[torch.rand(c, generator=g) < 0.05] = -1.0
    return cos


@examples
@given(
    n=st.sampled_from([1, 1, 1, 3 if INTERPRETED else 33]),
    c=st.integers(2, 200),
    d=st.sampled_from([2, 3, 16, 31, 64, 200, 512]),
    eps=EPS,
    seed=st.integers(0, 2**20),
    norms=st.sampled_from([1.0, 1e-3, 300.0]),
)
def test_active_set_at_the_threshold(case32, n, c, d, eps, seed, norms):
    """One sample, or copies of it, and classes whose cosines crowd the threshold from both sides."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, d, generator=g)
    w = rows_at_cosines(x[0], around_threshold(c, d, threshold_cosine(80.0, 1.23, eps), seed), seed)
    w = w * norms * torch.randn(c, 1, generator=g).double().exp()
    problem = Problem(x.repeat(n, 1), w.float(), torch.randint(0, c, (n,), generator=g), torch.ones(n))
    check_active_set(case32, problem, filter_eps=eps)


@examples
@given(
    n=st.integers(1, 6 if INTERPRETED else 20),
    c=st.integers(2, 120),
    d=st.sampled_from([2, 5, 17, 64, 130]),
    eps=EPS,
    seed=st.integers(0, 2**20),
    make=st.sampled_from(sorted(GEOMETRIES)),
    duplicates=st.booleans(),
)
def test_active_set(case32, n, c, d, eps, seed, make, duplicates):
    """Any geometry, with samples and classes that are copies of one another."""
    problem = GEOMETRIES[make](n, c, d, seed)
    if duplicates:
        problem.w[c // 2 :] = problem.w[: c - c // 2].clone()
        problem.x[n // 2 :] = problem.w[problem.labels[n // 2 :]]
    check_active_set(case32, problem, filter_eps=eps)


@example(s=64.0, k=80.0, k_inter=None, a=0.8, b=1e-300, eps=0.0, seed=0, make="trained", d=3)  # 0 in fp32
@examples
@given(
    s=st.floats(0.5, 200),
    k=st.floats(0.5, 300),
    k_inter=st.none() | st.floats(0.5, 300),
    a=st.floats(-0.5, 3.5),
    b=st.floats(-0.5, 3.5),
    eps=st.just(0.0) | EPS | st.floats(1e-12, 0.9),
    seed=st.integers(0, 2**20),
    make=st.sampled_from(sorted(GEOMETRIES)),
    d=st.sampled_from([3, 40, 256]),
)
def test_any_hyperparameters(case32, s, k, k_inter, a, b, eps, seed, make, d):
    """Slopes from flat to a cliff, thresholds that take every pair and that take none."""
    options = dict(s=s, k=k, k_inter=k_inter, a=a, b=b, filter_eps=eps)
    problem = GEOMETRIES[make](17, 101, d, seed)
    judge = Judge(problem, **options)
    result = run(case32, problem, **options)
    judge.check(result, case32.backend)
    judge.check_filter_bound(result, case32.backend)
    t = judge.truth
    assert abs(int(result.stats.active_pairs) - int(t.active.sum())) <= int(t.borderline.sum())


@pytest.mark.parametrize("side", ["class", "sample"])
@pytest.mark.parametrize("levels", [127, 32766])
@pytest.mark.parametrize("d", [512] if INTERPRETED else [256, 500, 512, 1024])  # Triton's screen has no fixed point
@pytest.mark.parametrize("eps", [2.0**-24, 2.0**-16])
def test_active_rows_that_round_the_worst_way(case32, d, eps, levels, side):
    """Active by a hair, yet every component rounds away: the error bound of a fixed-point screen is met.

    One row's components are ±1/√D, which every scale holds exactly; those of the other rows lie just short of half a step
    beyond a whole number of `levels`, on the side of the first. The screened cosine is short by the norm of their rounding
    error: the whole of the Cauchy-Schwarz bound.
    """
    n = 4 if case32.emulated else 40  # more than a panel of 32 samples
    g = torch.Generator().manual_seed(d)
    sign = (torch.randint(0, 2, (d,), generator=g) * 2 - 1).double()
    threshold = threshold_cosine(80.0, 1.23, eps) + 3e-4  # clear of what fp32 may decide either way
    noise = (torch.rand(n, d, generator=g) * 1.5 - 0.75) * levels
    lean = torch.full((d,), 0.499, dtype=torch.float64)
    lean[0] = 0  # the largest, which sets the scale

    def at(share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [n, D] that lean so far to the first, and their cosines to it."""
        w = torch.round(noise + share * levels * sign).clamp(1 - levels, levels - 1)
        w[:, 0] = levels * sign[0]
        w = w + lean * sign
        return w, (w @ sign) / (w.norm(dim=1) * d**0.5)

    low, high = torch.full((n, 1), -0.25), torch.full((n, 1), 0.25)
    for _ in range(40):  # the cosine grows with the share, in steps of one component's rounding
        middle = (low + high) / 2
        active = (at(middle)[1] >= threshold).unsqueeze(1)
        low, high = torch.where(active, low, middle), torch.where(active, middle, high)
    rows, cos = at(high)
    assert ((cos >= threshold) & (cos < threshold + 1e-3)).all(), cos - threshold
    exact, rows = sign.float().repeat(n, 1), rows.float()
    x, w = (exact, rows) if side == "class" else (rows, exact)
    labels = torch.full((n,), n)  # the opposite of a class
    check_active_set(case32, Problem(x, torch.cat([w, -w]), labels, torch.ones(n)), filter_eps=eps)


@pytest.mark.parametrize("filter_eps", [2.0**-16, 2.0**-8])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_certificate(case32, geometry, filter_eps):
    """`dropped` of a single row bounds the norm of what ∂l/∂x̂ lacks, measured on the backend's own gradients."""
    rows, classes = (2, 150) if case32.emulated else (12, 1009)
    whole = GEOMETRIES[geometry](rows, classes, 128)
    seen = 0.0
    for i in range(rows):
        problem = Problem(*(t[i : i + 1] for t in (whole.x, whole.w)), whole.labels[i : i + 1], torch.ones(1))
        problem = problem._replace(w=whole.w)
        filtered, exact = run(case32, problem, filter_eps=filter_eps), run(case32, problem, filter_eps=0.0)
        t = truth(*problem, filter_eps=filter_eps)
        length = float(problem.x.norm())
        lacking = float((filtered.grad_x - exact.grad_x).norm()) * length
        rounding = 2 * float(t.worst.x) * length
        screen_error = 2.0**-10 if case32.backend == "triton" else 128**0.5 * 2.0**-15
        screened = math.expm1(80 * screen_error / math.sin(1.3))
        assert lacking <= float(filtered.stats.dropped) * (1 + screened) + float(t.flip_x) * length + rounding
        assert float(filtered.stats.dropped) <= len(whole.w) * filter_eps * 64
        assert float(exact.stats.dropped) == 0
        seen += lacking
    if geometry != "collapsed":
        assert seen > 0
    elif case32.backend != "triton":  # there lists and dense products round differently; the others do not change ways
        assert seen == 0


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_row_alone_and_in_a_batch(case32, geometry):
    """The batch around a row decides nothing: neither what is kept nor, beyond rounding, any value."""
    filter_eps = 2.0**-12
    whole = GEOMETRIES[geometry](*(70, 131, 96) if case32.emulated else (300, 331, 96))
    batch = run(case32, whole, filter_eps=filter_eps)
    for i in (0, 64, 69) if case32.emulated else (0, 1, 15, 16, 255, 256, 299):
        one = slice(i, i + 1)
        alone = Problem(whole.x[one], whole.w, whole.labels[one], whole.upstream[one])
        result, t = run(case32, alone, filter_eps=filter_eps), truth(*alone, filter_eps=filter_eps)
        difference = (result.row_loss - batch.row_loss[one]).abs().double().cpu()
        assert (difference <= 2 * t.worst.loss).all()
        difference = (result.grad_x - batch.grad_x[one]).double().cpu().norm()
        assert difference <= 2 * (t.worst.x + t.flip_x)
    some = [16, 69] if case32.emulated else [0, 16, 255, 299]
    pick = Problem(whole.x[some], whole.w, whole.labels[some], whole.upstream[some])
    together = active_pairs(case32, pick, filter_eps=filter_eps)
    for place, i in enumerate(some):
        one = slice(i, i + 1)
        alone = Problem(whole.x[one], whole.w, whole.labels[one], whole.upstream[one])
        clear = ~truth(*alone, filter_eps=filter_eps).borderline
        assert torch.equal(together[place] & clear[0], active_pairs(case32, alone, filter_eps=filter_eps)[0] & clear[0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_loss_scale_does_not_reach_the_filter(case32, geometry, reduction):
    """Gradients under a loss scale of 65536 are those under 1, scaled: no bit differs, as the scale is a power of two."""
    shape = (5, 131, 40) if case32.emulated else (32, 331, 96)
    problem = GEOMETRIES[geometry](*shape).to(case32.device, f32, f32)
    grads = []
    for scale in (1.0, 65536.0, 2.0**-16):
        x, w = (t.clone().requires_grad_() for t in (problem.x, problem.w))
        loss = sface_loss(x, w, problem.labels, reduction=reduction, backend=case32.backend, filter_eps=2.0**-12)
        weights = problem.upstream if reduction == "none" else torch.ones((), device=case32.device)
        (loss * weights).sum().mul(scale).backward()
        grads.append((x.grad / scale, w.grad / scale))
    for grad_x, grad_w in grads[1:]:
        assert torch.equal(grad_x, grads[0][0]) and torch.equal(grad_w, grads[0][1])


def test_tiny_and_huge_upstream_gradients_pass_the_filter(case32):
    """A pair is kept for its own coefficient, however small its row's upstream gradient beside the others'."""
    problem = GEOMETRIES["trained"](16, 331, 96)
    problem = problem._replace(upstream=torch.tensor([1e-12, -1e12]).repeat(8))
    Judge(problem, filter_eps=2.0**-16).check(run(case32, problem, filter_eps=2.0**-16), case32.backend)
    small = problem._replace(upstream=torch.tensor([1e-12, 0.0]).repeat(8))
    Judge(small, filter_eps=2.0**-16).check(run(case32, small, filter_eps=2.0**-16), case32.backend)
