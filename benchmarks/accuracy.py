"""Relative errors of the loss and both gradients against filter_eps.

Errors are against float64 (Frobenius norms; the loss's relative to the mean of its terms' absolute values), next to those of
the reference in the same dtype: float32, or autocast for half embeddings with float32 weights. The package runs with the
tensors as they are, half embeddings included. The rule, for float32: error <= 4 × the reference's + 1e-6.

Work: per case and dtype 6·N·C·D flop in float64, and one step for the reference and for each filter_eps. On a processor
without half products the half references take most of the time.

    python -m benchmarks.accuracy --out benchmarks/results/cpu-accuracy.json
"""

from __future__ import annotations

import itertools
import sys
from typing import Annotated, Any

import torch
import typer

from sface_kernels import sface_loss
from sface_kernels.bench import report
from sface_kernels.bench.table import accuracy_tables
from sface_kernels.cli import options
from sface_kernels.cli.options import option, several
from sface_kernels.dispatch import BACKENDS, choose
from sface_kernels.testing import selfcheck
from sface_kernels.testing.failure import failure_text
from sface_kernels.testing.published import reference
from sface_kernels.testing.truth import compute_truth, measure_errors
from sface_kernels.testing.workloads import GEOMETRIES, Case, Shape, Workload, make_workload

FILTERS = (*(2.0**-power for power in (8, 10, 12, 16, 20, 24)), 0.0)
DTYPES = "float32,bfloat16,float16"


def measure_workload(work: Workload, dtype_name: str, backend: str) -> list[dict[str, Any]]:
    """A row for each filter_eps; benchmarks/README.md says what is in it."""
    x, w = work.x.to(options.DTYPE_NAMES[dtype_name]), work.w
    truth = compute_truth(x, w, work.y)

    def errors(loss: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> dict[str, float]:
        loss.backward()
        assert x.grad is not None and w.grad is not None
        return measure_errors(truth, loss.detach(), x.grad, w.grad)._asdict()

    theirs = None
    leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
    try:
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=dtype_name != "float32"):
            theirs = errors(reference(*leaves, work.y).loss, *leaves)
    except RuntimeError as error:
        print(f"reference in {dtype_name}: {failure_text(error)}", file=sys.stderr)
    case = {"backend": backend, **work.case.shape._asdict(), "geometry": work.case.geometry, "seed": work.case.seed}
    rows = []
    for filter_eps in FILTERS:
        row = {**case, "dtype": dtype_name, "density": work.density, "reference": theirs, "filter_eps": filter_eps}
        row.update(dict.fromkeys(("errors", "reason", "dropped", "active", "within_rule")))
        leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
        try:
            loss, stats = sface_loss(*leaves, work.y, filter_eps=filter_eps, backend=backend, return_stats=True)
            ours = errors(loss, *leaves)
        except Exception as error:
            row["reason"] = failure_text(error)
        else:
            active = int(stats.active_pairs) / max(len(x) * (len(w) - 1), 1)
            row.update(errors=ours, dropped=float(stats.dropped), active=active)
            if dtype_name == "float32" and theirs:
                row["within_rule"] = all(ours[name] <= 4 * theirs[name] + 1e-6 for name in ours)
        rows.append(row)
    return rows


def main(
    backend: Annotated[Any, option(options.one_of(BACKENDS), "Of the package; what auto takes.", "NAME")] = None,
    device: Annotated[Any, options.DEVICE] = "cpu",
    n: Annotated[int, typer.Option(min=1, help="Samples.")] = 128,
    c: Annotated[Any, option(several(options.positive), "Classes; several with commas.")] = "1000,10575,85742",
    d: Annotated[Any, option(several(options.positive), "Features; several with commas.")] = "128,512",
    geometries: Annotated[Any, option(several(options.one_of(GEOMETRIES)), "dense: 5 % active.")] = "random,trained",
    dtypes: Annotated[Any, option(several(options.one_of(DTYPES.split(","))), "Of the embeddings.")] = DTYPES,
    out: Annotated[Any, options.OUT] = None,
) -> None:
    """Relative errors of the loss and both gradients against filter_eps. Ctrl-C keeps the finished rows."""
    backend = backend or choose("auto", selfcheck.request(device, torch.float32))[0]
    settings = {"backend": backend, "filters": list(FILTERS), "threads": torch.get_num_threads()}
    result = report.new_report("accuracy", settings, device)
    for geometry, features, classes in itertools.product(geometries, d, c):
        case = Case(Shape(n, classes, features), geometry, 0.05 if geometry == "dense" else None)
        work = make_workload(case, device)
        for dtype in dtypes:
            print(f"{case.name}, {dtype}", file=sys.stderr, flush=True)
            result["rows"] += measure_workload(work, dtype, backend)
            if out is not None:
                report.save(result, out)
    print("\n\n".join(table.markdown() for table in accuracy_tables(result["rows"])))


if __name__ == "__main__":
    typer.run(main)
