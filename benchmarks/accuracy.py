"""`python -m benchmarks.accuracy`: relative errors of the loss and both gradients against filter_eps.

Errors are against float64 (Frobenius norms; the loss's relative to the mean of its terms' absolute values),
next to those of the reference in the same dtype: float32, or autocast for half embeddings with float32
weights. The package runs with the tensors as they are, half embeddings included. The rule, for float32:
error <= 4 × the reference's + 1e-6.

Rows of the JSON file:
    backend, n, c, d, geometry, seed
    dtype                of the embeddings; the weights are float32
    density              share of pairs active at 2^-16
    reference            its errors: loss, grad_x, grad_w; null where it cannot run
    filter_eps
    errors, reason       of the package, with the same keys; or null and why
    dropped              the certificate: mean over rows of the dropped coefficients
    active               share of the pairs kept
    within_rule          loss and both gradients; null for half embeddings

Work: per case and dtype 6·N·C·D flop in float64, and one step for the reference and for each filter_eps. On a
processor without half products the half references take most of the time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from sface_kernels import explain, sface_loss
from sface_kernels.bench import report
from sface_kernels.bench.report import filter_name
from sface_kernels.testing.failure import failure_text
from sface_kernels.testing.published import reference
from sface_kernels.testing.truth import Errors, Truth, compute_truth, measure_errors
from sface_kernels.testing.workloads import Case, Shape, Workload, make_workload

from .arguments import INTERRUPTED, Parser, note, output_file, positive_int

FILTERS = (*(2.0**-power for power in (8, 10, 12, 16, 20, 24)), 0.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GEOMETRIES = ("random", "trained")  # "dense" (5 % active) on request


def reference_errors(work: Workload, x: Tensor, truth: Truth) -> Errors | None:
    """The reference's in this dtype, under autocast for half embeddings; None where it cannot run."""
    x, w = x.detach().requires_grad_(), work.w.detach().requires_grad_()
    try:
        with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != torch.float32):
            loss = reference(x, w, work.y).loss
        loss.backward()
    except RuntimeError as error:
        note(f"reference in {x.dtype}: {failure_text(error)}")
        return None
    assert x.grad is not None and w.grad is not None
    return measure_errors(truth, loss.detach(), x.grad, w.grad)


def package_errors(
    work: Workload, x: Tensor, truth: Truth, backend: str, filter_eps: float
) -> tuple[Errors, float, float]:
    """Errors, the certificate, and the share of pairs that were kept."""
    x, w = x.detach().requires_grad_(), work.w.detach().requires_grad_()
    loss, stats = sface_loss(x, w, work.y, filter_eps=filter_eps, backend=backend, return_stats=True)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    errors = measure_errors(truth, loss.detach(), x.grad, w.grad)
    pairs = len(x) * (len(w) - 1)
    return errors, float(stats.dropped), int(stats.active_pairs) / max(pairs, 1)


def within_rule(errors: Errors, of_reference: Errors | None) -> bool | None:
    """Whether loss and gradients are within 4 × the reference's error + 1e-6."""
    if of_reference is None:
        return None
    return all(own <= 4 * other + 1e-6 for own, other in zip(errors, of_reference, strict=True))


def measure_workload(work: Workload, dtype_name: str, backend: str) -> list[dict[str, Any]]:
    """One row for each filter_eps."""
    case = work.case
    x = work.x.to(DTYPES[dtype_name])
    truth = compute_truth(x, work.w, work.y)
    of_reference = reference_errors(work, x, truth)
    rows = []
    for filter_eps in FILTERS:
        row: dict[str, Any] = {
            "backend": backend,
            **case.shape._asdict(),
            "geometry": case.geometry,
            "seed": case.seed,
            "dtype": dtype_name,
            "density": work.density,
            "reference": of_reference._asdict() if of_reference else None,
            "filter_eps": filter_eps,
            "errors": None,
            "reason": None,
            "dropped": None,
            "active": None,
            "within_rule": None,
        }
        try:
            errors, dropped, active = package_errors(work, x, truth, backend, filter_eps)
        except Exception as error:
            row["reason"] = failure_text(error)
        else:
            row.update(errors=errors._asdict(), dropped=dropped, active=active)
            if dtype_name == "float32":
                row["within_rule"] = within_rule(errors, of_reference)
        rows.append(row)
    return rows


def _cell(row: dict[str, Any], names: tuple[str, ...]) -> str:
    if row["errors"] is None:
        return "–"
    text = " / ".join(f"{row['errors'][name]:.0e}" for name in names)
    return f"**{text}**" if row["within_rule"] else text


def _loss_cell(row: dict[str, Any]) -> str:
    return "–" if row["errors"] is None else f"{row['errors']['loss']:.0e}, {row['dropped']:.0e}"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Per dtype a table of ∂x / ∂w errors and one of loss errors and certificates; then the shares kept."""
    lines: list[str] = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        bold = "; **bold**: within 4 × the reference's error + 1e-6, loss too" if dtype == "float32" else ""
        about = f"Embeddings {dtype}, weights float32, N={own[0]['n']}, backend {own[0]['backend']}"
        lines += [f"{about}: error of ∂x / ∂w{bold}.", ""]
        lines += _table(own, lambda row: _cell(row, ("grad_x", "grad_w")), ("grad_x", "grad_w"))
        lines += ["", f"Embeddings {dtype}: error of the loss, and the certificate `stats.dropped`.", ""]
        lines += [*_table(own, _loss_cell, ("loss",)), ""]
    lines += ["Share of the pairs kept.", ""]
    own = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    lines += _table(own, lambda row: "–" if row["active"] is None else f"{row['active']:.1e}", ())
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]], cell: Any, of_reference: tuple[str, ...]) -> list[str]:
    filters = list(dict.fromkeys(row["filter_eps"] for row in rows))
    head = ["geometry", "D", "C", *(["reference"] if of_reference else []), *map(filter_name, filters)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key in dict.fromkeys((row["geometry"], row["d"], row["c"]) for row in rows):
        group = {row["filter_eps"]: row for row in rows if (row["geometry"], row["d"], row["c"]) == key}
        cells = [str(part) for part in key]
        if of_reference:
            errors = next(iter(group.values()))["reference"]
            cells.append(" / ".join(f"{errors[name]:.0e}" for name in of_reference) if errors else "–")
        lines.append("| " + " | ".join([*cells, *(cell(group[f]) for f in filters)]) + " |")
    return lines


def int_list(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]


def name_list(allowed: tuple[str, ...]) -> Any:
    def convert(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return convert


def build_parser() -> Parser:
    parser = Parser(prog="accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backend", default="native", help="backend of the package")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--n", type=positive_int, default=128, help="samples")
    parser.add_argument("--c", type=int_list, default=[1000, 10_575, 85_742], help="classes, comma-separated")
    parser.add_argument("--d", type=int_list, default=[128, 512], help="features, comma-separated")
    parser.add_argument("--geometries", type=name_list((*GEOMETRIES, "dense")), default=list(GEOMETRIES))
    parser.add_argument("--dtypes", type=name_list(tuple(DTYPES)), default=list(DTYPES), help="embeddings'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--out", type=output_file, metavar="FILE.json")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for bad options, 130 after an interrupt, rows saved."""
    parser = build_parser()
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        explain(options.device, backend=options.backend)
    except (RuntimeError, ValueError) as error:
        parser.error(f"argument --backend: {error}")
    torch.set_num_threads(options.threads)
    kept = {key: value for key, value in vars(options).items() if key != "out"}
    kept["device"] = str(options.device)
    result = report.new_report("accuracy", {**kept, "filters": list(FILTERS)}, options.device)
    rows: list[dict[str, Any]] = result["rows"]
    try:
        for geometry, d, c in itertools.product(options.geometries, options.d, options.c):
            share = 0.05 if geometry == "dense" else None
            work = make_workload(Case(Shape(options.n, c, d), geometry, share, options.seed), options.device)
            for dtype in options.dtypes:
                note(f"{work.case.name}, {dtype}")
                rows += measure_workload(work, dtype, options.backend)
    except KeyboardInterrupt:
        result["interrupted"] = True
        note("interrupted; finished rows are kept")
    finally:
        if options.out is not None:
            report.save(result, options.out)
    if rows:
        print(markdown(rows))
    return INTERRUPTED if result["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
