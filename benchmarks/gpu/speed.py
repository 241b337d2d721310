"""First figures: forward and backward of the loss beside what it replaces and beside bare matrix products.

bf16 embeddings and fp32 weights. Times are medians of CUDA events around one step, inputs rotated through more memory
than the L2 cache holds. The loss of every version is compared before it is timed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sface_kernels import sface_loss

from .problems import FAST_EPS, A, B, Inputs, K, S, dense, leaves, random
from .session import record

SHAPES = [(128, 10_575, 512), (512, 85_742, 512), (1024, 1_000_000, 512)]
LARGE_C = [4_000_000, 8_000_000, 16_000_000]
ROTATED_BYTES = 256 << 20  # several times the L2 cache
MOST_SECONDS = 1.0  # of repeats of one version
LOSS_TOLERANCE = 2e-2  # bf16 products, amplified by the slope
began = time.monotonic()
errors: list[str] = []


def left() -> float:
    return float(os.environ.get("GPU_SECONDS", "3600")) - (time.monotonic() - began)


def reference(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The published module's arithmetic under autocast: one-hot masks, a new N×C tensor a step, bf16 products."""
    with torch.autocast(x.device.type, torch.bfloat16):
        logits = F.linear(F.normalize(x), F.normalize(w)) * S  # [N, C]
    logits = logits.float()
    own = torch.zeros_like(logits).scatter_(1, y.view(-1, 1), 1)
    other = torch.ones_like(logits).scatter_(1, y.view(-1, 1), 0)
    target = (own * logits).sum(1)
    with torch.no_grad():
        p = 1.0 / (1.0 + torch.exp(-K * (torch.acos(target / S) - A)))
    logit_other = other * logits
    with torch.no_grad():
        q = 1.0 / (1.0 + torch.exp(K * (torch.acos(logit_other / S) - B)))
    return (-p * target).mean() + (q * logit_other).sum(1).mean()


def careful(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The mean loss with few temporaries and bf16 products, for torch.compile."""
    inv_norm = torch.linalg.vector_norm(w, dim=1).clamp_min(1e-12).reciprocal()  # [C]
    cos = (F.normalize(x).to(torch.bfloat16) @ w.to(torch.bfloat16).t()).float() * inv_norm  # [N, C]
    own = torch.arange(len(w), device=w.device) == y.unsqueeze(1)
    theta = cos.detach().clamp(-1, 1).acos()
    q, p = torch.sigmoid((B - theta) * K), torch.sigmoid((theta - A) * K)
    return (torch.where(own, -p, q) * cos).sum(1).mean() * S


def ours(filter_eps: float | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, w, y: sface_loss(x, w, y, backend="triton", filter_eps=filter_eps)


def rotated(inputs: Inputs) -> list[Inputs]:
    copies = max(1, ROTATED_BYTES // (inputs.w.numel() * inputs.w.element_size()))
    return [leaves(Inputs(*(t.clone() if copy else t for t in inputs))) for copy in range(copies)]


def times(step: Callable[[int], Any], copies: int) -> dict[str, Any]:
    """Median and spread in ms of `step(copy)`, after a warm-up."""
    for copy in range(3):
        step(copy % copies)
    torch.cuda.synchronize()
    marks, began_here = [], time.monotonic()
    while len(marks) < 5 or (len(marks) < 100 and time.monotonic() - began_here < MOST_SECONDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step(len(marks) % copies)
        end.record()
        marks.append((start, end))
        if len(marks) % 5 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    taken = sorted(start.elapsed_time(end) for start, end in marks)
    return {
        "ms": round(statistics.median(taken), 4),
        "low": round(taken[len(taken) // 10], 4),
        "high": round(taken[-1 - len(taken) // 10], 4),
        "repeats": len(taken),
    }


def attempt(name: str, inputs: Inputs, geometry: str, run: Callable[[], dict[str, Any]]) -> float | None:
    """Records what `run` returns, or why it did not; the median in ms."""
    (n, d), c = inputs.x.shape, len(inputs.w)
    row: dict[str, Any] = {"name": name, "shape": f"({n}; {c}; {d})", "geometry": geometry}
    if left() < 5:
        record(**row, skipped="no time was left")
        return None
    try:
        row.update(run())
    except torch.cuda.OutOfMemoryError:
        row["skipped"] = "out of memory"
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        errors.append(name)
    record(**row)
    torch.cuda.empty_cache()
    return row.get("ms")


def forward_backward(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Inputs, expected: float | None
) -> dict[str, Any]:
    copies = rotated(inputs)

    def step(at: int) -> Tensor:
        copies[at].x.grad = copies[at].w.grad = None
        value = loss(*copies[at])
        value.backward()
        return value.detach()

    torch.cuda.reset_peak_memory_stats()
    value = float(step(0))
    if expected is not None and not abs(value - expected) <= LOSS_TOLERANCE * max(1.0, abs(expected)):
        raise AssertionError(f"loss {value:.6f}, exact products give {expected:.6f}")
    peak = torch.cuda.max_memory_allocated()
    return {**times(step, len(copies)), "peak_GiB": round(peak / 2**30, 2), "loss": round(value, 6)}


def replayed(inputs: Inputs) -> dict[str, Any]:
    """The default filter from a CUDA graph: without the time that launching takes on the host."""
    x, w, y = leaves(inputs)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            x.grad = w.grad = None
            ours(None)(x, w, y).backward()
    torch.cuda.synchronize()
    x.grad = w.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours(None)(x, w, y).backward()
    return times(lambda _: graph.replay(), 1)


def products(inputs: Inputs, count: int) -> dict[str, Any]:
    """One bare bf16 product of this shape, or the three of a forward and backward."""
    copies = [(i.x.detach().bfloat16(), i.w.detach().bfloat16()) for i in rotated(inputs)]
    g = (copies[0][0] @ copies[0][1].t()) if count == 3 else None  # [N, C]

    def step(at: int) -> None:
        x, w = copies[at]
        x @ w.t()
        if g is not None:
            g @ w
            g.t() @ x

    return times(step, len(copies))


def compare(inputs: Inputs, geometry: str) -> None:
    expected = float(ours(0.0)(inputs.x, inputs.w, inputs.y))

    def loss(name: str, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float | None:
        return attempt(name, inputs, geometry, lambda: forward_backward(function, inputs, expected))

    default = loss("screened, default", ours(None))
    exact = None
    if geometry == "random":
        loss("screened, 2^-16", ours(FAST_EPS))
        exact = loss("exact", ours(0.0))
        attempt("screened, CUDA graph", inputs, geometry, lambda: replayed(inputs))
    one = attempt("one bf16 product", inputs, geometry, lambda: products(inputs, 1))
    three = attempt("three bf16 products", inputs, geometry, lambda: products(inputs, 3))
    eager = loss("reference, eager", reference)
    compiled = loss("careful, compiled", torch.compile(careful, dynamic=False)) if geometry == "random" else None
    ratios = {
        "eager/screened": (eager, default),
        "compiled/screened": (compiled, default),
        "screened/product": (default, one),
        "exact/three products": (exact, three),
    }
    found = {name: round(a / b, 3) for name, (a, b) in ratios.items() if a and b}
    attempt("ratios", inputs, geometry, lambda: found)


def ceilings() -> None:
    """What this card's memory and tensor cores give: the yardsticks of docs/kernels.md."""
    big = torch.randn(1 << 29, device="cuda")
    other = torch.empty_like(big)
    moved = times(lambda _: other.copy_(big), 1)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    multiplied = times(lambda _: a @ b, 1)
    record(
        name="ceilings",
        copy_TB_per_s=round(2 * big.numel() * 4 / moved["ms"] / 1e9, 2),
        bf16_TFLOP_per_s=round(2 * 8192**3 / multiplied["ms"] / 1e9, 1),
    )


def main() -> int:
    ceilings()
    for n, c, d in SHAPES:
        compare(random(n, c, d), "random")
    n, c, d = SHAPES[-1]
    compare(dense(n, c, d, 0.05), "5 %")
    for c in LARGE_C:
        if c * d * 8 > torch.cuda.mem_get_info()[0]:
            record(name="screened, default", shape=f"({n}; {c}; {d})", geometry="random", skipped="out of memory")
            continue
        inputs = random(n, c, d)
        attempt("screened, default", inputs, "random", lambda inputs=inputs: forward_backward(ours(None), inputs, None))
        del inputs
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
