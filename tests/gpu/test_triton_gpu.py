"""What only a GPU can show of the Triton backend: replayed graphs, races, streams, devices, sizes past 2³¹, memory, no waiting.

`make gpu` runs it. Elsewhere every test says that there is no CUDA device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # PyTorch before 2.10 has no deterministic products without it

import pytest
import torch
from torch import Tensor

from sface_kernels import sface_loss
from sface_kernels.backends.triton import plan, tiles
from sface_kernels.bench.memory import cuda_peak
from sface_kernels.bench.providers import resolve
from sface_kernels.bench.timing import TimedLoss
from sface_kernels.testing import budget
from sface_kernels.testing.truth import compute_truth
from sface_kernels.testing.workloads import FAST_EPS, Case, Shape, make_workload
from tests.support.cases import DTYPES
from tests.triton.conftest import forget_kinds, int8_where_it_may

DEVICE = "cuda"
f32, bf16 = torch.float32, torch.bfloat16
# How far a whole tensor may be from float64, relative: the rounding of what is stored, and of products in fp16 where the
# embeddings are half precision, amplified by the slope.
TOLERANCE = {f32: 1e-4, torch.float16: 3e-2, bf16: 3e-2}
REPEATS = 200
Inputs = tuple[Tensor, Tensor, Tensor]  # x, w, y
Call = tuple[Tensor, Tensor, Tensor, float]  # and the filter
Results = tuple[Tensor, Tensor, Tensor]  # row losses, ∂x, ∂w

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@pytest.fixture(autouse=True)
def _given_back() -> Iterator[None]:
    yield
    forget_kinds()
    torch.cuda.empty_cache()


def inputs(n: int, c: int, d: int, share: float | None = None) -> Inputs:
    """bf16 embeddings and fp32 weights; `share` of the pairs active, or an untrained head's."""
    work = make_workload(Case(Shape(n, c, d), "dense" if share else "random", share), DEVICE, bf16)
    return work.x, work.w, work.y


@pytest.fixture(params=["lists", "parts", "int8", "some overflow", "overflow in parts", "dense"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Inputs and filter that go by lists, from a screen in fp16 or in int8, by lists in parts, by lists of which some
    overflow, and by dense products."""
    if "parts" in request.param:
        monkeypatch.setattr(tiles, "CLASSES_OF_PARTS", 1)
    if request.param == "int8":
        monkeypatch.setattr(plan, "way_of", int8_where_it_may)
    if "overflow" not in request.param:
        return *inputs(96, 5003, 512), 0.0 if request.param == "dense" else FAST_EPS
    # two blocks of samples are near to most classes, more than lists hold; the lists of the others hold theirs
    x, w, y = inputs(600, 50_003, 64, 0.9)
    x[256:] = inputs(600, 50_003, 64)[0][256:]
    return x, w, y, FAST_EPS


def step(x: Tensor, w: Tensor, y: Tensor, filter_eps: float) -> Results:
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    rows = sface_loss(x, w, y, reduction="none", backend="triton", filter_eps=filter_eps)
    rows.backward(torch.ones_like(rows))
    assert x.grad is not None and w.grad is not None
    return rows.detach(), x.grad, w.grad


@pytest.fixture
def deterministic() -> Iterator[None]:
    """The way of a call does not depend on earlier ones, and buffers start as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def assert_same(ours: Results, theirs: Results) -> None:
    for part, a, b in zip(("row losses", "grad_x", "grad_w"), ours, theirs, strict=True):
        assert torch.equal(a, b), f"{part} differ in {int((a != b).sum())} of {a.numel()} entries"


def assert_close(x: Tensor, w: Tensor, y: Tensor, filter_eps: float) -> None:
    """To the float64 result with the same filter. The suite derives tight bounds and runs them."""
    errors = budget.package_errors(compute_truth(x, w, y, filter_eps), x, w, y, "triton", filter_eps)
    allowed = max(TOLERANCE[x.dtype], TOLERANCE[w.dtype])
    assert all(error <= allowed for error in errors), f"{errors}, {allowed:.0e} allowed"  # False for NaN


@pytest.mark.parametrize("shape", [Shape(96, 5003, 512), Shape(33, 1009, 100)], ids=str)
@pytest.mark.parametrize("dtype, weight_dtype", DTYPES["triton"], ids=str)
def test_close_to_float64(dtype: torch.dtype, weight_dtype: torch.dtype, shape: Shape) -> None:
    work = make_workload(Case(shape), DEVICE, dtype)
    for filter_eps in (FAST_EPS, 0.0):
        assert_close(work.x, work.w.to(weight_dtype), work.y, filter_eps)


def test_close_to_float64_on_every_way(way: Call) -> None:
    assert_close(*way)


@pytest.mark.parametrize("filter_eps", [FAST_EPS, 0.0])
def test_more_pairs_than_2_to_31(filter_eps: float) -> None:
    x, w, y = inputs(4096, 600_000, 64)
    y[-1] = 599_999
    assert_close(x, w, y, filter_eps)


def test_graph_replay_equals_eager(way: Call, deterministic: None) -> None:
    x, w, y, filter_eps = way
    x.requires_grad_(), w.requires_grad_()

    def once() -> Tensor:
        x.grad = w.grad = None
        rows = sface_loss(x, w, y, reduction="none", backend="triton", filter_eps=filter_eps)
        rows.sum().backward()
        return rows.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    x.grad = w.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = once()
    assert x.grad is not None and w.grad is not None
    for shift in (0, 1):  # with other values than were captured, too
        with torch.no_grad():
            x.copy_(x.roll(shift, 0))
            y.copy_(y.flip(0))
        graph.replay()
        replayed = rows.clone(), x.grad.clone(), w.grad.clone()
        assert_same(replayed, step(x, w, y, filter_eps))


def test_nothing_waits_for_the_gpu(way: Call) -> None:
    x, w, y, filter_eps = way
    x.requires_grad_(), w.requires_grad_()
    for mode in ("default", "error"):  # the first compiles and allocates
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            sface_loss(x, w, y, backend="triton", filter_eps=filter_eps, return_stats=True)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "n, c, d, provider",
    [
        (128, 10_575, 512, "triton"),
        (1024, 1_000_000, 512, "triton"),
        (1024, 200_003, 512, "triton@0"),
        (512, 85_742, 128, "triton@2^-16"),
        (4096, 85_742, 512, "triton@2^-16"),
        (4096, 85_742, 512, "triton@0"),
        (32, 4001, 1024, "triton@0"),
    ],
)
def test_extra_memory_stays_within_the_bound(n: int, c: int, d: int, provider: str) -> None:
    work = make_workload(Case(Shape(n, c, d)), DEVICE, bf16)
    extra = cuda_peak(TimedLoss(resolve(provider), work, "both"))["peak_extra_bytes"]
    bound = (64 << 20) + 16 * c + 16 * n * d
    print(f"extra memory of {provider} at ({n}; {c}; {d}): {extra / 2**20:.1f} MiB, {bound / 2**20:.1f} allowed")
    assert 0 < extra <= bound


def test_bad_labels_spoil_their_own_rows_only(way: Call, deterministic: None) -> None:
    x, w, y, filter_eps = way
    bad = torch.tensor([1, 40, 95], device=y.device)
    spoilt = y.index_copy(0, bad, torch.tensor([len(w), -1, 2**40], device=y.device))
    good = torch.ones(len(y), dtype=torch.bool, device=y.device).index_fill_(0, bad, False)
    expected = step(x, w, y, filter_eps)
    rows, grad_x, grad_w = step(x, w, spoilt, filter_eps)
    assert rows[bad].isnan().all() and grad_x[bad].isnan().all(), "not NaN in the rows themselves"
    assert torch.equal(rows[good], expected[0][good]), "other losses changed"
    assert torch.equal(grad_x[good], expected[1][good]), "other rows of grad_x changed"
    assert torch.isfinite(grad_w).all()


def test_a_side_stream_equals_the_current_one(way: Call, deterministic: None) -> None:
    expected = step(*way)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours = step(*way)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU at most")
def test_another_device_than_the_current_one() -> None:
    problem = inputs(96, 5003, 512)
    x, w, y = (t.to("cuda:1") for t in problem)
    rows, grad_x, grad_w = (t.to("cuda:0") for t in step(x, w, y, FAST_EPS))
    assert_same((rows, grad_x, grad_w), step(*problem, FAST_EPS))
    assert torch.cuda.current_device() == 0


def test_repeats_give_the_same_bits(way: Call, deterministic: None) -> None:
    first = step(*way)
    for _ in range(REPEATS):
        assert_same(step(*way), first)


@pytest.mark.parametrize("filter_eps, k_inter", [(FAST_EPS, 80.0), (FAST_EPS, 20.0), (0.0, 80.0)])
@pytest.mark.parametrize(
    "n, c, d, share, dtype",
    [
        (33, 1009, 100, None, bf16),
        (70, 500, 384, None, bf16),
        (130, 389, 64, None, f32),
        (257, 20_011, 16, 0.9, bf16),
    ],
)
def test_small_calls_of_every_kernel(
    n: int,
    c: int,
    d: int,
    share: float | None,
    dtype: torch.dtype,
    filter_eps: float,
    k_inter: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For compute-sanitizer. The second size is screened in int8, the last has more active pairs than lists hold; the
    first and the last have their lists in parts."""
    monkeypatch.setattr(plan, "way_of", int8_where_it_may)
    monkeypatch.setattr(tiles, "CLASSES_OF_PARTS", 1000)
    x, w, y = inputs(n, c, d, share)
    x, w = x.to(dtype).requires_grad_(), w.requires_grad_()
    loss, stats = sface_loss(x, w, y, backend="triton", filter_eps=filter_eps, k_inter=k_inter, return_stats=True)
    loss.backward()
    print(n, c, d, float(loss.detach()), int(stats.active_pairs))
    assert x.grad is not None and torch.isfinite(x.grad).all() and w.grad is not None and torch.isfinite(w.grad).all()
