"""`python -m benchmarks.sampling`: how noisy loss and gradients are when only a share of the classes is compared with.

Root mean square over draws of ‖estimate − all classes‖ / ‖all classes‖, beside the error of the filter at 2⁻¹⁶, which
compares with every class. Variance only: nothing is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sface_kernels.bench import report
from sface_kernels.bench.table import plain_table
from sface_kernels.distributed.sampling import Sampling, draw, sampled_rows, split_classes, take_classes
from sface_kernels.distributed.shard import ShardRows, shard_rows
from sface_kernels.testing.workloads import Case, Shape, make_workload
from sface_kernels.validation import make_hyperparameters

RATES = (0.1, 0.3, 0.5)
GEOMETRIES = ("random", "trained")


def measured(rows: ShardRows, x: Tensor, w: Tensor) -> list[Tensor]:
    loss = rows.loss.mean()
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


def errors(found: list[Tensor], exact: list[Tensor]) -> Tensor:
    return torch.stack(
        [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(found, exact, strict=True)]
    )


def rows_of_table(geometry: str, shape: Shape, draws: int) -> list[dict[str, Any]]:
    _, x, w, y, _ = make_workload(Case(shape, geometry))
    x.requires_grad_()
    w.requires_grad_()
    exact_hp, fast_hp = (
        make_hyperparameters(64.0, 80.0, 0.8, 1.23, None, eps, torch.float32, shape.d) for eps in (0.0, 2.0**-16)
    )
    exact = measured(shard_rows(x, w, y, exact_hp, "auto"), x, w)
    near, others = split_classes(y, shape.c)
    lines = []
    for rate in RATES:
        squares = torch.zeros(3, dtype=torch.float64)
        for step in range(draws):
            drawn = draw(others, Sampling(rate, 0, step), 0)
            rows = sampled_rows(x, take_classes(w, y, near, drawn), exact_hp, "auto")
            squares += errors(measured(rows, x, w), exact).square() / draws
        lines.append((f"sample rate {rate:g}", squares.sqrt()))
    lines.append(("all classes, filter 2⁻¹⁶", errors(measured(shard_rows(x, w, y, fast_hp, "auto"), x, w), exact)))
    names = ("loss", "∂x", "∂w")
    return [
        {"geometry": geometry, "compared with": with_, **dict(zip(names, e.tolist(), strict=True))}
        for with_, e in lines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="sampling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=128, help="samples")
    parser.add_argument("--c", type=int, default=20_000, help="classes")
    parser.add_argument("--d", type=int, default=128, help="features")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write a results file")
    options = parser.parse_args()
    result = report.new_report("table", {"draws": options.draws}, torch.device("cpu"))
    for geometry in GEOMETRIES:
        result["rows"] += rows_of_table(geometry, Shape(options.n, options.c, options.d), options.draws)
    print(plain_table(result["rows"]).markdown())
    if options.out:
        report.save(result, options.out)


if __name__ == "__main__":
    main()
