"""`sface-kernels bench`: time and memory of the loss against everything else, checked first."""

from __future__ import annotations

import itertools
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from ..bench import report
from ..bench.contestant import MODES
from ..bench.providers import DEFAULT, PROVIDERS, Provider, resolve
from ..bench.runner import Settings, run_case, steps_of
from ..testing.workloads import CLASSES, GEOMETRIES, SUITE, Case, Shape
from . import options
from .tables import Bar, print_rows

THP_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # PyTorch reads it once, before its first allocation
INTERRUPTED = 130
Dtype = Enum("Dtype", {name: name for name in ("float32", "bfloat16", "float16")}, type=str)  # type: ignore[misc]
Geometry = Enum("Geometry", {name: name for name in GEOMETRIES}, type=str)  # type: ignore[misc]
NAMES = ", ".join(f"{name} {classes:,}" for name, classes in CLASSES.items())


def bench(
    context: typer.Context,
    workloads: Annotated[list[str] | None, typer.Argument(help=f"Numbers of classes by name: {NAMES}.", show_default="casia")] = None,
    n: Annotated[str, typer.Option(help="Samples; several with commas.")] = "128",
    c: Annotated[str | None, typer.Option(help="Classes, in place of names; several with commas.")] = None,
    d: Annotated[str, typer.Option(help="Features; several with commas.")] = "512",
    suite: Annotated[bool, typer.Option("--suite", help="The fixed set of workloads of docs/performance.md.")] = False,
    geometry: Annotated[Geometry, typer.Option(help="random: an untrained head; trained: look-alikes; dense: --density of the pairs active.")] = Geometry.random,  # type: ignore[attr-defined]
    density: Annotated[float | None, typer.Option(help="Share of active pairs at 2^-16, for dense (0.05).")] = None,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 0,
    mode: Annotated[str | None, typer.Option(help="forward, backward, both, step (with SGD) or all; several with commas.", show_default="both; all with --suite")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>; the GPU if there is one.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the embeddings; the weights are float32.")] = Dtype.float32,  # type: ignore[attr-defined]
    providers: Annotated[str, typer.Option(help="Comma-separated; default, or all, or names (a wrong one lists them). A filter: native@2^-12.")] = "default",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all take their turn.")] = 15,
    budget_seconds: Annotated[float, typer.Option(help="Timing of one workload and mode; at least 3 rounds.")] = 60.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if left out.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each provider in a process of its own.")] = True,
    thp: Annotated[bool, typer.Option("--thp", help=f"Set {THP_VARIABLE}=1: huge pages in PyTorch's allocator.")] = False,
    bf16_opponents: Annotated[bool, typer.Option("--bf16-opponents", help="Allow the opponents bf16 products.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.", metavar="FILE.json")] = None,
) -> None:  # fmt: skip
    """Time the loss against plain PyTorch, compiled PyTorch and bare matrix products; measure peak memory.

    Every provider is checked against float64 first: one that is wrong is reported and not timed. What cannot run, or
    runs out of memory, is reported as such, and the rest go on. Ctrl-C keeps the finished rows.
    """
    given = {name: getattr(value, "value", value) for name, value in locals().items() if name not in ("context", "out")}
    if not 0 < budget_seconds < float("inf"):
        raise options.wrong("--budget-seconds", f"expected a positive number, got {budget_seconds:g}")
    cases = _cases(workloads or [], n, c, d, suite, geometry.value, density, seed)
    chosen, modes = _providers(providers), _modes(mode or ("all" if suite else "both"))
    where = options.device(device)
    options.output_file(out)
    if thp and os.environ.get(THP_VARIABLE) != "1":
        _restart_with_huge_pages(context.obj)
    torch.set_num_threads(threads or torch.get_num_threads())
    settings = Settings(
        repeats, budget_seconds, torch.get_num_threads(), bf16_opponents, memory, where, options.DTYPES[dtype.value]
    )
    resolved = {"modes": modes, "providers": [provider.name for provider in chosen], "device": str(where)}
    result = report.new_report("bench", {**given, **resolved, "threads": settings.threads}, where)
    steps = len(cases) * steps_of(chosen, modes, settings)
    with Bar(steps) as bar:
        raise typer.Exit(_run(cases, chosen, modes, settings, result, bar, out))


def _run(
    cases: list[Case],
    providers: list[Provider],
    modes: list[str],
    settings: Settings,
    result: dict[str, Any],
    bar: Bar,
    out: Path | None,
) -> int:
    """Exit status. Rows are saved as they come, so that whatever ends the run loses nothing finished."""

    def show(rows: list[dict[str, Any]]) -> None:
        if out is not None:
            report.save(result, out)
        with bar.paused():
            print_rows(rows)

    try:
        for case in cases:
            run_case(
                case,
                providers,
                modes,
                settings,
                result,
                bar.part(case.name, steps_of(providers, modes, settings)),
                show,
            )
    except KeyboardInterrupt:
        result["interrupted"] = True
        kept = f"{len(result['rows'])} finished rows are in {out}" if out is not None else "nothing was to be saved"
        bar.warn(f"interrupted: {kept}")
    if out is not None:
        report.save(result, out)
    if result["interrupted"]:
        return INTERRUPTED
    return 1 if any(row["status"] == "wrong" for row in result["rows"]) else 0


def _cases(
    names: list[str], n: str, c: str | None, d: str, suite: bool, geometry: str, density: float | None, seed: int
) -> list[Case]:
    if density is not None and (suite or geometry != "dense"):
        raise options.wrong("--density", "only with --geometry dense and without --suite")
    if geometry == "dense":
        density = 0.05 if density is None else density
        if not 0 < density <= 1:
            raise options.wrong("--density", f"expected a number in (0, 1], got {density:g}")
    if names and (suite or c is not None):
        raise options.wrong("--suite" if suite else "--c", f"not together with a workload by name ({names[0]})")
    samples, features = (options.split(o, text, options.positive) for o, text in (("--n", n), ("--d", d)))
    if suite:
        return [case._replace(seed=seed) for case in SUITE]
    if c is not None:
        classes = options.split("--c", c, options.positive)
    else:
        named = options.split("workload", ",".join(names or ["casia"]), options.one_of(CLASSES))
        classes = [CLASSES[name] for name in named]
    shapes = itertools.product(samples, classes, features)
    return [Case(Shape(*shape), geometry, density, seed) for shape in shapes]


def _providers(text: str) -> list[Provider]:
    if text == "all":
        return list(PROVIDERS.values())
    return options.split("--providers", ",".join(DEFAULT) if text == "default" else text, resolve)


def _modes(text: str) -> list[str]:
    return list(MODES) if text == "all" else options.split("--mode", text, options.one_of((*MODES, "all")))


def _restart_with_huge_pages(arguments: list[str]) -> NoReturn:
    """Replaces this process by one that has the variable set from its start."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "sface_kernels", *arguments]
    os.execve(sys.executable, command, {**os.environ, THP_VARIABLE: "1"})
