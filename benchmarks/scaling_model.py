"""`python -m benchmarks.scaling_model`: what a class-parallel head costs on 8 to 1024 GPUs, counted rather than measured.

Bytes and operations follow from the shapes; tests/distributed/test_scaling_model.py compares the bytes that are sent
with those that the head really sends. Times are bytes and operations divided by the rates of `Machine`, an assumption;
forward products overlap with reading the weight, nothing else overlaps. Partial FC's published figures stand beside the
same arithmetic for its softmax head.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from sface_kernels.bench.table import Table

GPUS = (8, 64, 256, 1024)
CLASSES = (1_000_000, 10_000_000, 100_000_000)
# time of the screened pass beside a bare product of its shape: between this project's bar, 2, and its aim, 1.2
OVER_PRODUCT = 1.5
EXCHANGES = 5  # sizes, labels, embeddings, loss, ∂x: each pays the latency


class Machine(NamedTuple):
    """Rates that a kernel or a collective reaches, not the peak of a data sheet."""

    name: str
    flops: float  # of half-precision products, 1/s
    bytes_per_second: float  # of GPU memory
    inside: float  # bytes/s of a collective a GPU, within a node
    across: float  # bytes/s of a collective a GPU, between nodes
    node: int  # GPUs
    latency: float  # seconds of a collective on two GPUs; grows with log2 P


# 60 % of 989 TFLOP/s, 80 % of 3.35 TB/s, 75 % of NVLink's 450 GB/s and of a 400 Gbit/s adapter a GPU
H100 = Machine("H100 SXM, 400 Gbit/s a GPU", 593e12, 2.7e12, 340e9, 37e9, 8, 10e-6)
# 60 % of 125 TFLOP/s, 80 % of 0.9 TB/s, 75 % of NVLink's 150 GB/s
V100 = Machine("V100 SXM2", 75e12, 0.72e12, 112e9, 9e9, 8, 15e-6)


class Problem(NamedTuple):
    gpus: int
    classes: int
    rows: int = 128  # a GPU
    features: int = 512
    embedding_bytes: int = 2
    active: float = 1e-3  # share of pairs with a gradient

    @property
    def all_rows(self) -> int:
        return self.gpus * self.rows

    @property
    def shard(self) -> int:
        return -(-self.classes // self.gpus)


class Sent(NamedTuple):
    """Bytes that each process hands to, or takes from, the collectives of a step: the larger buffer of each."""

    sizes: int  # all-gather of five int64
    labels: int  # all-gather of int64
    embeddings: int  # all-gather
    loss: int  # all-reduce of one float64
    grad_x: int  # reduce-scatter of float32

    @property
    def total(self) -> int:
        return sum(self)


def communication(p: Problem) -> Sent:
    n = p.all_rows
    return Sent(40 * p.gpus, 8 * n, n * p.features * p.embedding_bytes, 8, 4 * n * p.features)


def communication_seconds(p: Problem, m: Machine, sent: int, exchanges: int) -> float:
    """Ring collectives: each GPU sends and receives (P−1)/P of the buffer, at the rate of the slowest link."""
    if p.gpus == 1:
        return 0.0
    rate = m.inside if p.gpus <= m.node else m.across
    return sent * (p.gpus - 1) / p.gpus / rate + exchanges * m.latency * math.log2(p.gpus)


class Cost(NamedTuple):
    seconds: float  # a step of the head: forward, backward, SGD with momentum, communication
    communication: float  # of that, seconds
    memory: float  # bytes a GPU: weight, momentum, gradient and working memory


def sface(p: Problem, m: Machine) -> Cost:
    """One screened product, active pairs again in float32, w read once, ∂w written once; SGD moves five times C·D more."""
    weight = 4 * p.shard * p.features
    product = 2 * p.all_rows * p.shard * p.features
    forward = max(OVER_PRODUCT * product / m.flops, weight / m.bytes_per_second)
    # three passes over 4·D bytes a pair: the cosine again, ∂x and ∂w
    pairs = 12 * p.active * p.all_rows * p.shard * p.features / m.bytes_per_second
    rest = 6 * weight / m.bytes_per_second
    talk = communication_seconds(p, m, communication(p).total, EXCHANGES)
    working = (64 << 20) + 16 * p.shard + 16 * p.all_rows * p.features
    return Cost(forward + pairs + rest + talk, talk, 3 * weight + working)


# Passes over the N×C/P logits (cosine, clamp, margin, scale, softmax and their backward) and over C/P×D (unit rows and
# their backward, gradient, SGD): a count of operations in eager PyTorch, each tensor read or written once
LOGIT_PASSES, LOGIT_COPIES, ROW_PASSES = 20, 4, 14


def partial_fc(p: Problem, m: Machine, rate: float = 1.0) -> Cost:
    """Three products and eager element-wise passes over a share `rate` of the classes; all rows are decayed anyway."""
    sampled = p.shard * rate
    products = 3 * 2 * p.all_rows * sampled * p.features / m.flops
    logits = 4 * p.all_rows * sampled
    weight = 4 * p.shard * p.features
    passes = (LOGIT_PASSES * logits + ROW_PASSES * weight) / m.bytes_per_second
    sent = p.all_rows * p.features * 8 + 3 * 4 * p.all_rows  # embeddings and ∂x in float32, three sums of the softmax
    talk = communication_seconds(p, m, sent, EXCHANGES + 2)
    return Cost(products + passes + talk, talk, 4 * weight + LOGIT_COPIES * logits)


# images/s of insightface's arcface_torch, ResNet-50, 8 V100, batch 1024: (classes, sample rate) → published
PUBLISHED = {(1_000_000, 1.0): 3449, (4_000_000, 1.0): 1748, (1_000_000, 0.1): 4803, (4_000_000, 0.1): 4208}
PUBLISHED_BATCH = 1024


def published_head_seconds(rate: float) -> tuple[float, float]:
    """(seconds a step without the head, seconds of the head a million classes) from two published sizes, as a line."""
    small, large = (PUBLISHED_BATCH / PUBLISHED[c, rate] for c in (1_000_000, 4_000_000))
    slope = (large - small) / 3
    return small - slope, slope


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f}"


def table(m: Machine, active: float) -> Table:
    head = ["GPUs", "classes", "N", "bytes sent a GPU, MB", "head, ms", "of that sending, ms", "GiB a GPU"]
    head += ["Partial FC, ms", "GiB", "rate 0.1, ms", "GiB"]
    rows = []
    for classes, gpus in itertools.product(CLASSES, GPUS):
        p = Problem(gpus, classes, active=active)
        ours, *theirs = sface(p, m), partial_fc(p, m), partial_fc(p, m, 0.1)
        row = [f"{gpus}", f"{classes / 1e6:g} M", f"{p.all_rows:,}", f"{communication(p).total / 1e6:.1f}"]
        row += [f"{1e3 * ours.seconds:.1f}", f"{1e3 * ours.communication:.2f}", _gib(ours.memory)]
        rows.append(row + [text for one in theirs for text in (f"{1e3 * one.seconds:.1f}", _gib(one.memory))])
    return Table("", head, rows, 0)


def against_published() -> Table:
    def per_million(cost: Callable[..., Cost], *rate: float) -> str:
        large, small = (cost(Problem(8, c), V100, *rate).seconds for c in (4_000_000, 1_000_000))
        return f"{1e3 * (large - small) / 3:.1f}"

    head = ["sample rate", "step without the head, ms", "head a million classes, ms", "this model of it, ms"]
    rows = []
    for rate in (1.0, 0.1):
        base, slope = published_head_seconds(rate)
        ours = per_million(sface) if rate == 1 else "–"
        rows.append([f"{rate:g}", f"{1e3 * base:.0f}", f"{1e3 * slope:.1f}", per_million(partial_fc, rate), ours])
    return Table("", [*head, "this model of SFace, ms"], rows, 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scaling_model", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--active", type=float, default=1e-3, help="share of pairs with a gradient, 1e-3 if left out")
    active, p = parser.parse_args().active, Problem(8, 1)
    if not 0 <= active <= 1:
        parser.error(f"--active: expected a share from 0 to 1, got {active:g}")
    print(f"{H100.name}: {p.rows} rows a GPU, D = {p.features}, {active:g} of the pairs active\n")
    print(table(H100, active).markdown())
    print(f"\n8 × {V100.name}, batch {PUBLISHED_BATCH}, published throughput of Partial FC\n")
    print(against_published().markdown())


if __name__ == "__main__":
    main()
