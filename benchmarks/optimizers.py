"""`python -m benchmarks.optimizers`: where a filtered gradient takes the class weights, by optimizer, beside the exact one.

Distance ‖w − w_ref‖ / ‖w_ref − w₀‖ after a few steps from the same weights on the same batches: w by a filtered gradient
in float32, w_ref by the reference in float64. An optimizer that is linear in the gradient loses what was dropped; one
that divides by the gradient's size loses the whole step of every class whose entries were all dropped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sface_kernels import sface_loss
from sface_kernels.bench import report
from sface_kernels.bench.table import plain_table
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


def moved(w: Tensor, start: Tensor) -> float:
    """The share of the class rows that are not where they started."""
    return float(((w - start) != 0).any(1).double().mean())


def measure(shape: Shape, steps: int) -> list[dict[str, Any]]:
    batches = [make_workload(Case(shape, "random", seed=seed)) for seed in range(steps)]
    start, rows = batches[0].w, []
    for optimizer in OPTIMIZERS:
        truth = trained(optimizer, batches, start.double(), "reference", 0.0)
        path = (truth - start).norm()
        for name, (backend, filter_eps) in GRADIENTS.items():
            found = trained(optimizer, batches, start, backend, filter_eps)
            rows.append(
                {
                    "optimizer": optimizer,
                    "gradient by": name,
                    "distance": float((found - truth).norm() / path),
                    "class rows moved": moved(found, start),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="optimizers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=128, help="samples")
    parser.add_argument("--c", type=int, default=10_000, help="classes")
    parser.add_argument("--d", type=int, default=512, help="features")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="also write a results file")
    options = parser.parse_args()
    result = report.new_report("table", {"steps": options.steps}, torch.device("cpu"))
    result["rows"] = measure(Shape(options.n, options.c, options.d), options.steps)
    print(plain_table(result["rows"]).markdown())
    if options.out:
        report.save(result, options.out)


if __name__ == "__main__":
    main()
