"""`python -m benchmarks.bench_loss`: the loss against eager, compiled and bare products on this CPU.

    python -m benchmarks.bench_loss --n 128 --c 10000 --d 512 --geometry trained
    python -m benchmarks.bench_loss --suite --out benchmarks/results/cpu.json
    python -m benchmarks.bench_loss --suite --thp --bf16-opponents --out benchmarks/results/cpu-thp-bf16.json

Each provider is checked against float64 first; a wrong one is reported and not timed. `benchmarks.report`
describes the JSON file, `benchmarks.providers` what is inside the timed region, `benchmarks.memory` the
peak memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from . import report
from .providers import MODES, PROVIDERS, Provider, resolve
from .runner import Settings, run_case
from .workloads import GEOMETRIES, SUITE, Case, Shape

THP_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # PyTorch reads it once, before its first allocation
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def provider_list(text: str) -> list[Provider]:
    try:
        providers = [resolve(name.strip()) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len({provider.name for provider in providers}) < len(providers):
        raise argparse.ArgumentTypeError("each provider once")
    return providers


def output_file(text: str) -> Path:
    path = Path(text)
    try:
        report.check_writable(path)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write {text}: {error.strerror}") from error
    return path


def build_parser() -> Parser:
    parser = Parser(prog="bench_loss", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=positive_int, default=128, help="samples")
    parser.add_argument("--c", type=positive_int, default=10_575, help="classes")
    parser.add_argument("--d", type=positive_int, default=512, help="features")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="random")
    parser.add_argument("--density", type=positive_float, help="share of active pairs at 2^-16, for dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", action="store_true", help="the fixed set of workloads, in all modes")
    parser.add_argument("--mode", choices=(*MODES, "all"), help="default: both; all with --suite")
    parser.add_argument("--providers", type=provider_list, default=list(PROVIDERS.values()), help=", ".join(PROVIDERS))
    parser.add_argument("--repeats", type=positive_int, default=15, help="rounds")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--budget-seconds", type=positive_float, default=60.0, help="per workload and mode")
    parser.add_argument("--thp", action="store_true", help=f"set {THP_VARIABLE}=1: huge pages in PyTorch")
    parser.add_argument("--bf16-opponents", action="store_true", help="allow the opponents bf16 products")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--out", type=output_file, metavar="FILE.json")
    return parser


def cases(options: argparse.Namespace) -> list[Case]:
    if options.suite:
        return [case._replace(seed=options.seed) for case in SUITE]
    return [Case(Shape(options.n, options.c, options.d), options.geometry, options.density, options.seed)]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.geometry == "dense" and not options.suite:
        options.density = 0.05 if options.density is None else options.density
        if options.density > 1:
            parser.error(f"argument --density: expected at most 1, got {options.density:g}")
    elif options.density is not None:
        parser.error("argument --density: only with --geometry dense and without --suite")
    return options


def restart_with_huge_pages(arguments: list[str]) -> NoReturn:
    """Replaces this process by one that has the variable set from its start."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, THP_VARIABLE: "1", "PYTHONPATH": path}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.bench_loss", *arguments], environment)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 when a provider was wrong; 2 for bad options; 130 after an interrupt, rows saved."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.thp and os.environ.get(THP_VARIABLE) != "1":
        restart_with_huge_pages(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(
        options.repeats,
        options.budget_seconds,
        options.threads,
        options.bf16_opponents,
        not options.no_memory,
    )
    modes = [options.mode] if options.mode else list(MODES) if options.suite else ["both"]
    if options.mode == "all":
        modes = list(MODES)
    kept = {key: value for key, value in vars(options).items() if key not in ("providers", "out")}
    result = report.new_report(
        "bench_loss", {**kept, "modes": modes, "providers": [provider.name for provider in options.providers]}
    )
    try:
        for case in cases(options):
            run_case(case, options.providers, modes, settings, result, note, report.print_rows)
    except KeyboardInterrupt:
        result["interrupted"] = True
        note("interrupted; finished rows are kept")
    finally:
        if options.out is not None:
            report.save(result, options.out)
    if result["interrupted"]:
        return INTERRUPTED
    return 1 if any(row["status"] == "wrong" for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
