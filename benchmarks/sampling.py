"""`python -m benchmarks.sampling`: how noisy loss and gradients are when only a share of the classes is compared with.

Root mean square over draws of ‖estimate − all classes‖ / ‖all classes‖, beside the error of the filter at 2⁻¹⁶, which
compares with every class. Variance only: nothing is timed.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sface_kernels.bench.table import write_table
from sface_kernels.cli import options
from sface_kernels.distributed.sampling import Sampling, draw, sampled_rows, split_classes, take_classes
from sface_kernels.distributed.shard import ShardRows, shard_rows
from sface_kernels.testing.workloads import FAST_EPS, Case, Shape, make_workload
from sface_kernels.validation import make_hyperparameters

RATES = (0.1, 0.3, 0.5)


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
        make_hyperparameters(64.0, 80.0, 0.8, 1.23, None, eps, torch.float32, shape.d) for eps in (0.0, FAST_EPS)
    )
    exact = measured(shard_rows(x, w, y, exact_hp, "auto"), x, w)
    near, others = split_classes(y, shape.c)
    found = {}
    for rate in RATES:
        squares = torch.zeros(3, dtype=torch.float64)
        for step in range(draws):
            drawn = draw(others, Sampling(rate, 0, step), 0)
            rows = sampled_rows(x, take_classes(w, y, near, drawn), exact_hp, "auto")
            squares += errors(measured(rows, x, w), exact).square() / draws
        found[f"sample rate {rate:g}"] = squares.sqrt()
    found["all classes, filter 2⁻¹⁶"] = errors(measured(shard_rows(x, w, y, fast_hp, "auto"), x, w), exact)
    return [
        {"geometry": geometry, "compared with": with_, **dict(zip(("loss", "∂x", "∂w"), e.tolist(), strict=True))}
        for with_, e in found.items()
    ]


def main(
    n: Annotated[int, typer.Option(min=1, help="Samples.")] = 128,
    c: Annotated[int, typer.Option(min=1, help="Classes.")] = 20_000,
    d: Annotated[int, typer.Option(min=1, help="Features.")] = 128,
    draws: Annotated[int, typer.Option(min=1)] = 20,
    out: Annotated[Any, options.OUT] = None,
) -> None:
    """How noisy loss and gradients are when only a share of the classes is compared with."""
    rows = [row for geometry in ("random", "trained") for row in rows_of_table(geometry, Shape(n, c, d), draws)]
    write_table(rows, {"draws": draws}, out)


if __name__ == "__main__":
    typer.run(main)
