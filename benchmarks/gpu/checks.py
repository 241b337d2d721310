"""What only a GPU can show of the Triton backend, as functions that raise AssertionError. No pytest needed.

python -m benchmarks.gpu.checks [name …]
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sface_kernels import sface_loss

from .problems import FAST_EPS, Inputs, dense, leaves, random, truth
from .session import record

f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [(f32, f32), (bf16, f32), (f16, f32), (bf16, bf16), (f16, f16)]
# How far a whole tensor may be from fp64, relative: the rounding of what is stored, and of products in fp16 where the
# embeddings are half precision, amplified by the slope (tests/checks.py derives tight bounds and runs them).
TOLERANCE = {f32: 1e-4, f16: 3e-2, bf16: 3e-2}
REPEATS = 200
AT_ONCE = 5  # processes


class Skip(Exception):
    """Why a check cannot run here."""


Results = tuple[Tensor, Tensor, Tensor]  # row losses, ∂x, ∂w


def step(inputs: Inputs, upstream: Tensor | None = None, **options) -> Results:
    x, w, y = leaves(inputs)
    rows = sface_loss(x, w, y, reduction="none", backend="triton", **options)
    rows.backward(torch.ones_like(rows) if upstream is None else upstream)
    assert x.grad is not None and w.grad is not None
    return rows.detach(), x.grad, w.grad


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The way of a call does not depend on earlier ones, and buffers start as NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def ways() -> Iterator[tuple[str, Inputs, float]]:
    """(name, inputs, filter) that go by lists, by lists of which some overflow, and by dense products."""
    yield "lists", random(96, 5003, 512), FAST_EPS
    yield "some overflow", _half_collapsed(), FAST_EPS
    yield "dense", random(96, 5003, 512), 0.0


def _half_collapsed() -> Inputs:
    """Every second sample is near to most classes, more than its list holds; the lists of the others hold theirs."""
    near, far = dense(600, 50_003, 64, 0.9), random(600, 50_003, 64)
    x = near.x.clone()
    x[::2] = far.x[::2]
    return Inputs(x, near.w, near.y)


def error(name: str, ours: Tensor, exact: Tensor, bar: float) -> None:
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    relative = float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-300))
    assert relative <= bar, f"{name}: relative error {relative:.2e}, {bar:.0e} allowed"


def same(name: str, ours: Results, theirs: Results) -> None:
    for part, a, b in zip(("row losses", "grad_x", "grad_w"), ours, theirs, strict=True):
        assert torch.equal(a, b), f"{name}: {part} differ in {int((a != b).sum())} of {a.numel()} entries"


def close_to_fp64(inputs: Inputs, bar: float, **options) -> None:
    n, c = len(inputs.x), len(inputs.w)
    upstream = torch.linspace(-1, 1.5, n, device=inputs.x.device)
    rows = torch.tensor([0, 1, n // 2, n - 1], device=inputs.x.device)
    # own classes, whose gradients are large, and the ends of the range
    classes = torch.cat([inputs.y[rows], torch.tensor([0, c - 1], device=inputs.x.device)]).unique()
    exact = truth(inputs, rows, classes, upstream)
    row_loss, grad_x, grad_w = step(inputs, upstream, **options)
    error("row losses", row_loss[rows], exact.row_loss, bar)
    error("grad_x", grad_x[rows], exact.grad_x, bar)
    error("grad_w", grad_w[classes], exact.grad_w, bar)


def every_dtype_is_close_to_fp64() -> None:
    for dtype, weight_dtype in DTYPES:
        for n, c, d in ((96, 5003, 512), (33, 1009, 100)):
            for filter_eps in (None, 0.0):
                inputs = random(n, c, d, dtype, weight_dtype)
                close_to_fp64(inputs, max(TOLERANCE[dtype], TOLERANCE[weight_dtype]), filter_eps=filter_eps)
    close_to_fp64(_half_collapsed(), TOLERANCE[bf16], filter_eps=FAST_EPS)


def repeats_give_the_same_bits() -> None:
    with deterministic():
        for name, inputs, filter_eps in ways():
            first = step(inputs, filter_eps=filter_eps)
            for _ in range(REPEATS):
                same(name, step(inputs, filter_eps=filter_eps), first)


def graph_replay_equals_eager() -> None:
    for name, inputs, filter_eps in ways():
        x, w, y = leaves(inputs)

        def once(x=x, w=w, y=y, filter_eps=filter_eps) -> Tensor:
            rows = sface_loss(x, w, y, reduction="none", backend="triton", filter_eps=filter_eps)
            rows.sum().backward()
            return rows.detach()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                x.grad = w.grad = None
                once()
        torch.cuda.current_stream().wait_stream(side)
        x.grad = w.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows = once()
        assert x.grad is not None and w.grad is not None
        for seed in (0, 1):  # with other values than were captured, too
            with torch.no_grad():
                x.copy_(x.roll(seed, 0))
                y.copy_(y.flip(0))
            graph.replay()
            replayed = (rows.clone(), x.grad.clone(), w.grad.clone())
            with deterministic():
                same(name, replayed, step(Inputs(x, w, y), filter_eps=filter_eps))


def nothing_waits_for_the_gpu() -> None:
    for _, inputs, filter_eps in ways():
        for mode in ("default", "error"):  # the first compiles and allocates
            x, w, y = leaves(inputs)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                sface_loss(x, w, y, backend="triton", filter_eps=filter_eps, return_stats=True)[0].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def side_stream_equals_current() -> None:
    with deterministic():
        for name, inputs, filter_eps in ways():
            expected = step(inputs, filter_eps=filter_eps)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                ours = step(inputs, filter_eps=filter_eps)
            torch.cuda.current_stream().wait_stream(side)
            same(name, ours, expected)


def other_device_than_current() -> None:
    if torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    inputs = random(96, 5003, 512)
    elsewhere = Inputs(*(t.to("cuda:1") for t in inputs))
    same("cuda:1", tuple(t.to("cuda:0") for t in step(elsewhere)), step(inputs))  # type: ignore[arg-type]
    assert torch.cuda.current_device() == 0


def more_pairs_than_2_to_31() -> None:
    for filter_eps in (2.0**-16, 0.0):
        inputs = random(4096, 600_000, 64)
        inputs.y[-1] = 599_999
        close_to_fp64(inputs, TOLERANCE[bf16], filter_eps=filter_eps)
        torch.cuda.empty_cache()


def extra_memory_stays_within_the_bound() -> None:
    """64 MiB + 16·C B + 16·N·D B beyond inputs and returned gradients."""
    for n, c, d, filter_eps in (
        (128, 10_575, 512, None),
        (1024, 1_000_000, 512, None),
        (1024, 200_003, 512, 0.0),
        (512, 85_742, 128, FAST_EPS),
        (4096, 85_742, 512, FAST_EPS),
        (4096, 85_742, 512, 0.0),
        (32, 4001, 1024, 0.0),
    ):
        inputs = leaves(random(n, c, d))
        sface_loss(*inputs, backend="triton", filter_eps=filter_eps).backward()
        inputs.x.grad = inputs.w.grad = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = sface_loss(*inputs, backend="triton", filter_eps=filter_eps)
        loss.backward()
        returned = sum(t.grad.numel() * t.grad.element_size() for t in inputs[:2] if t.grad is not None)
        extra = torch.cuda.max_memory_allocated() - before - returned
        bound = (64 << 20) + 16 * c + 16 * n * d
        record(name="extra memory", shape=f"{n}×{c}×{d}", filter_eps=filter_eps, MiB=extra >> 20, bound_MiB=bound >> 20)
        assert extra <= bound, f"({n}, {c}, {d}) filter {filter_eps}: {extra} B, {bound} B allowed"


def bad_labels_spoil_their_own_rows_only() -> None:
    with deterministic():
        for name, inputs, filter_eps in ways():
            expected = step(inputs, filter_eps=filter_eps)
            y = inputs.y.clone()
            bad = torch.tensor([1, 40, 95], device=y.device)
            y[bad] = torch.tensor([len(inputs.w), -1, 2**40], device=y.device)
            rows, grad_x, grad_w = step(inputs._replace(y=y), filter_eps=filter_eps)
            good = torch.ones(len(y), dtype=torch.bool, device=y.device)
            good[bad] = False
            assert rows[bad].isnan().all() and grad_x[bad].isnan().all(), f"{name}: not NaN in the rows themselves"
            assert torch.equal(rows[good], expected[0][good]), f"{name}: other losses changed"
            assert torch.equal(grad_x[good], expected[1][good]), f"{name}: other rows of grad_x changed"
            assert torch.isfinite(grad_w).all(), f"{name}: grad_w is not finite"


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        every_dtype_is_close_to_fp64,
        graph_replay_equals_eager,
        nothing_waits_for_the_gpu,
        extra_memory_stays_within_the_bound,
        more_pairs_than_2_to_31,
        bad_labels_spoil_their_own_rows_only,
        side_stream_equals_current,
        other_device_than_current,
        repeats_give_the_same_bits,
    )
}


def run(name: str) -> bool:
    began, problem, skipped = time.monotonic(), None, None
    try:
        CHECKS[name]()
    except Skip as reason:
        skipped = str(reason)
    except Exception as found:
        traceback.print_exc()
        problem = f"{type(found).__name__}: {found}".splitlines()[0][:300]
    record(name=name, seconds=round(time.monotonic() - began, 1), error=problem, skipped=skipped)
    return problem is None


def run_in_a_process(name: str) -> bool:
    """So that kernels of several checks compile at once, and a fault on the GPU ends one check alone."""
    status = subprocess.run([sys.executable, "-m", "benchmarks.gpu.checks", name]).returncode
    if status not in (0, 1):
        record(name=name, error=f"the process ended with status {status}")
    return status == 0


def main() -> int:
    if names := sys.argv[1:]:
        right = [run(name) for name in names]
    else:
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            right = list(pool.map(run_in_a_process, CHECKS))
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
