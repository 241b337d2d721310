"""`python -m benchmarks.density`: forward and backward against the share of active pairs, from 1e-6 to 1.

Shows whether the change from sparse to dense work is a cliff. The reference's work does not depend on the
data, so it is timed at the first and the last density only. `native@0` does the dense work at every density: the
filtered curve should stay near the lower of its own sparse line and that one.

Work: 2·N·C·D flop for the cosines, and 4·D flop for each active pair, or 4·N·C·D where all blocks are dense.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from sface_kernels.bench import report
from sface_kernels.bench.contestant import MODES
from sface_kernels.bench.providers import resolve
from sface_kernels.bench.report import reference_median
from sface_kernels.bench.runner import Progress, Settings, run_case
from sface_kernels.testing.workloads import Case, Shape

from .arguments import INTERRUPTED, Parser, note, output_file, positive_float, positive_int, provider_list

DENSITIES = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
DEFAULT_PROVIDERS = ("native@2^-16", "native@0", "reference")
HORIZONTAL = "reference"


def densities(text: str) -> list[float]:
    """Comma-separated, ascending, each in (0, 1]."""
    values = [positive_float(part) for part in text.split(",")]
    if values != sorted(values) or values[-1] > 1:
        raise argparse.ArgumentTypeError(f"expected ascending numbers in (0, 1], got {text}")
    return values


class Notes(Progress):
    """A line for each thing that begins."""

    def __init__(self, workload: str) -> None:
        self.workload = workload

    def at(self, text: str, step: int) -> None:
        note(f"{self.workload}: {text}")

    def warn(self, text: str) -> None:
        note(f"warning: {text}")


def build_parser() -> Parser:
    parser = Parser(prog="density", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=positive_int, default=128, help="samples")
    parser.add_argument("--c", type=positive_int, default=85_742, help="classes")
    parser.add_argument("--d", type=positive_int, default=512, help="features")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--densities", type=densities, default=list(DENSITIES), help="ascending")
    parser.add_argument("--providers", type=provider_list, default=[resolve(p) for p in DEFAULT_PROVIDERS])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--mode", choices=MODES, default="both")
    parser.add_argument("--repeats", type=positive_int, default=9, help="rounds")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--budget-seconds", type=positive_float, default=20.0, help="for each density")
    parser.add_argument("--out", type=output_file, metavar="FILE.json")
    return parser


def add_sweep_ratios(rows: list[dict[str, Any]]) -> None:
    """Sets every row's `speedup_vs_reference` against the one median of the whole sweep."""
    baseline = reference_median(rows)
    for row in rows:
        if baseline and row["time_ms"]:
            row["ratios"]["speedup_vs_reference"] = baseline / row["time_ms"]["median"]


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """Density, and for each provider its median, its ratio to the reference's, and the quartiles."""
    baseline = reference_median(rows)
    print(f"reference: {baseline:.1f} ms" if baseline else "reference: not timed")
    for row in rows:
        if row["provider"] == HORIZONTAL:
            continue
        if row["time_ms"] is None:
            print(f"{row['density']:9.2e}  {row['provider']:<14} {row['status']}: {row['reason']}")
            continue
        time = row["time_ms"]
        speedup = row["ratios"]["speedup_vs_reference"]
        ratio = f"{speedup:6.1f} x" if speedup else ""
        quartiles = f"({time['q1']:.2f}–{time['q3']:.2f})"
        median = f"{time['median']:9.2f} ms"
        print(f"{row['density']:9.2e}  {row['provider']:<14} {median} {quartiles:<20} {ratio}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status as that of `bench_loss`."""
    options = build_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(options.threads)
    kept = {key: value for key, value in vars(options).items() if key not in ("providers", "out")}
    kept["providers"] = [provider.name for provider in options.providers]
    kept["device"] = str(options.device)
    result = report.new_report("density", kept, options.device)
    settings = Settings(
        options.repeats, options.budget_seconds, options.threads, measure_memory=False, device=options.device
    )
    ends = (options.densities[0], options.densities[-1])
    try:
        for density in options.densities:
            chosen = [p for p in options.providers if p.name != HORIZONTAL or density in ends]
            case = Case(Shape(options.n, options.c, options.d), "dense", density, options.seed)
            run_case(case, chosen, [options.mode], settings, result, Notes(case.name))
    except KeyboardInterrupt:
        result["interrupted"] = True
        note("interrupted; finished rows are kept")
    finally:
        rows = result["rows"]
        add_sweep_ratios(rows)
        if options.out is not None:
            report.save(result, options.out)
    print_sweep(rows)
    if result["interrupted"]:
        return INTERRUPTED
    return 1 if any(row["status"] == "wrong" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
