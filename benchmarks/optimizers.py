"""`python -m benchmarks.optimizers`: where a filtered gradient takes the class weights, by optimizer, beside the exact one.

Distance ‖w − w_ref‖ / ‖w_ref − w₀‖ after a few steps from the same weights on the same batches: w by a filtered gradient
in float32, w_ref by the reference in float64. An optimizer that is linear in the gradient loses what was dropped; one
that divides by the gradient's size loses the whole step of every class whose entries were all dropped.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from sface_kernels import sface_loss
from sface_kernels.bench.table import write_table
from sface_kernels.cli import options
from sface_kernels.testing.workloads import Case, Shape, Workload, make_workload

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda w: torch.optim.SGD([w], lr=0.1, momentum=0.9),
    "AdamW": lambda w: torch.optim.AdamW([w], lr=1e-3, weight_decay=0.0),
    "Adagrad": lambda w: torch.optim.Adagrad([w], lr=1e-2),
    "RMSprop": lambda w: torch.optim.RMSprop([w], lr=1e-3),
}
GRADIENTS: dict[str, tuple[str, float | None]] = {  # (backend, filter_eps; None is the default)
    "reference in float32": ("reference", 0.0),
    "filter 2⁻¹⁶": ("auto", 2.0**-16),
    "the default filter": ("auto", None),
    "filter_eps=0": ("auto", 0.0),
}


def trained(optimizer: str, batches: list[Workload], w: Tensor, backend: str, filter_eps: float | None) -> Tensor:
    """The weights `[C, D]` after a step on each batch, from `w` and in its dtype."""
    weight = w.clone().requires_grad_()
    step = OPTIMIZERS[optimizer](weight)
    for batch in batches:
        step.zero_grad()
        sface_loss(batch.x.to(w.dtype), weight, batch.y, backend=backend, filter_eps=filter_eps).backward()
        step.step()
    return weight.detach().double()


def measure(shape: Shape, steps: int) -> list[dict[str, Any]]:
    batches = [make_workload(Case(shape, "random", seed=seed)) for seed in range(steps)]
    start, rows = batches[0].w, []
    for optimizer in OPTIMIZERS:
        truth = trained(optimizer, batches, start.double(), "reference", 0.0)
        for name, (backend, filter_eps) in GRADIENTS.items():
            found = trained(optimizer, batches, start, backend, filter_eps)
            distance = float((found - truth).norm() / (truth - start).norm())
            moved = float((found != start).any(1).double().mean())
            rows.append({"optimizer": optimizer, "gradient by": name, "distance": distance, "class rows moved": moved})
    return rows


def main(
    n: Annotated[int, typer.Option(min=1, help="Samples.")] = 128,
    c: Annotated[int, typer.Option(min=1, help="Classes.")] = 10_000,
    d: Annotated[int, typer.Option(min=1, help="Features.")] = 512,
    steps: Annotated[int, typer.Option(min=1)] = 4,
    out: Annotated[Any, options.OUT] = None,
) -> None:
    """Where a filtered gradient takes the class weights, by optimizer, beside the exact one."""
    write_table(measure(Shape(n, c, d), steps), {"steps": steps}, out)


if __name__ == "__main__":
    typer.run(main)
