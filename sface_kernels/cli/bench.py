"""`sface-kernels bench`: time and memory of the loss against everything else, checked first."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from typing import Annotated, Any

import torch
import typer

from ..bench import machine, report
from ..bench.providers import DEFAULT, PACKAGE, PROVIDERS, STEPS, Provider, resolve
from ..bench.runner import RunSettings, run_case
from ..bench.table import bench_table, kernel_table
from ..bench.timing import MODES
from ..testing.workloads import CLASSES, GEOMETRIES, Case, Shape
from . import options, show
from .options import option, several

INTERRUPTED = 130
THP_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # PyTorch reads it once, before its first allocation
NAMES = ", ".join(f"{name} {classes:,}" for name, classes in CLASSES.items())
HALF_AND_FULL = ("float32", "bfloat16", "float16")


def _classes(name: str) -> int:
    return CLASSES[options.one_of(CLASSES)(name)]


def _modes(text: str) -> list[str]:
    names = [mode for name in text.split(",") for mode in (MODES[:4] if name.strip() == "all" else [name])]
    return several(options.one_of(MODES))(",".join(names))


def _providers(text: str) -> list[Provider]:
    names = {"default": DEFAULT, "all": PROVIDERS, "steps": STEPS}.get(text)
    return several(resolve)(",".join(names) if names else text)


def bench(
    context: typer.Context,
    workloads: Annotated[list[str] | None, typer.Argument(help=f"Numbers of classes by name: {NAMES}.", show_default="casia")] = None,
    n: Annotated[Any, option(several(options.positive), "Samples; several with commas.")] = "128",
    c: Annotated[Any, option(several(options.positive), "Classes, in place of names; several with commas.")] = None,
    d: Annotated[Any, option(several(options.positive), "Features; several with commas.")] = "512",
    geometry: Annotated[Any, option(options.one_of(GEOMETRIES), "random: an untrained head; trained: look-alikes; dense: --density of the pairs active.", "NAME")] = "random",
    density: Annotated[Any, option(several(options.share), "Share of active pairs at 2^-16, for dense (0.05); several with commas.")] = None,
    mode: Annotated[Any, option(_modes, "forward, backward, both, step (with an optimizer, SGD by default), all (of these), graph (both, replayed from a CUDA graph); several with commas.")] = "both",
    device: Annotated[Any, options.DEVICE] = "auto",
    dtype: Annotated[Any, option(options.one_of(HALF_AND_FULL), "Of the embeddings; the weights are float32.", "NAME")] = "float32",
    providers: Annotated[Any, option(_providers, "default, all, steps (for --mode step), or names (a wrong one lists them). A filter: native@2^-12; an optimizer: native+head-sgd.")] = "default",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all take their turn.")] = 15,
    budget_seconds: Annotated[float, typer.Option(min=0, help="Timing of one workload and mode; at least 3 rounds.")] = 60.0,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads; PyTorch's choice if left out.")] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, each provider in a process of its own.")] = True,
    kernels: Annotated[bool, typer.Option("--kernels", help="Show the time of each kernel (on a CPU operation), by torch.profiler.")] = False,
    thp: Annotated[bool, typer.Option("--thp", help=f"Set {THP_VARIABLE}=1: huge pages in PyTorch's allocator.")] = False,
    bf16_opponents: Annotated[bool, typer.Option("--bf16-opponents", help="Allow the opponents bf16 products.")] = False,
    out: Annotated[Any, options.OUT] = None,
) -> None:  # fmt: skip
    """Time the loss against plain PyTorch, compiled PyTorch and bare matrix products; measure peak memory.

    Every SFace loss is checked against float64 first: one that is wrong is reported and not timed. What cannot run, or
    runs out of memory, is reported as such, and the rest go on. Ctrl-C keeps the finished rows. The exit status is 1
    where one is wrong, or where nothing that was asked for runs.
    """
    if density and geometry != "dense":
        raise typer.BadParameter(f"expected --geometry dense with it, got {geometry}", param_hint="--density")
    if workloads and c:
        raise typer.BadParameter(f"not together with a workload by name ({workloads[0]})", param_hint="--c")
    if mode != ["step"] and (with_own := [one.name for one in providers if "+" in one.name]):
        raise typer.BadParameter(f"an optimizer is for --mode step alone, got {with_own[0]}", param_hint="--providers")
    if "graph" in mode and device.type != "cuda":
        raise typer.BadParameter(f"a CUDA graph needs a CUDA device, got {device}", param_hint="--mode")
    classes = c or several(_classes)(",".join(workloads or ["casia"]))
    if thp and os.environ.get(THP_VARIABLE) != "1":
        # a process that has the variable set from its start takes the place of this one
        command = [sys.executable, "-m", "sface_kernels", *context.obj]
        os.execve(sys.executable, command, {**os.environ, THP_VARIABLE: "1"})
    torch.set_num_threads(threads or torch.get_num_threads())
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream the clock's events are recorded on
    if bf16_opponents:
        providers = [one if one.kind == PACKAGE else one._replace(precision="medium") for one in providers]
    settings = RunSettings(
        repeats, budget_seconds, torch.get_num_threads(), memory, kernels, device, options.DTYPE_NAMES[dtype]
    )
    densities = (density or [0.05]) if geometry == "dense" else [None]
    kept = {**settings._asdict(), "device": str(device), "dtype": dtype, "arguments": context.obj}
    result = report.new_report("bench", kept, device)

    def finished(rows: list[report.Row]) -> None:
        """Shows and saves rows as they come, so that whatever ends the run loses nothing finished."""
        show.progress()
        first = rows[0]
        if any(row["time_ms"] for row in rows):
            about = f"{first['workload']}, {dtype} on {device}: {first['mode']}; {first['density']:.2g} active at 2^-16"
            show.table(bench_table(rows, about))
        if kernels and first["mode"] == mode[0]:
            show.table(kernel_table(rows))
        for row in rows:
            if not row["time_ms"]:
                show.line(": ".join(filter(None, (row["provider"], row["status"], row["reason"]))))
        if (first["other_busy_cores"] or 0) > machine.BUSY_LIMIT:
            show.line(f"warning: others used {first['other_busy_cores']:.2f} cores meanwhile", warning=True)
        if out is not None and not report.is_special(out):  # which cannot take back what it was given
            report.save(result, out)

    try:
        for *shape, share in itertools.product(n, classes, d, densities):
            case = Case(Shape(*shape), geometry, share)
            run_case(case, providers, mode, settings, result, functools.partial(show.progress, case.name), finished)
    except KeyboardInterrupt:
        result["interrupted"] = True
        where = f"in {out}" if out is not None else "not saved"
        rows = f"{len(result['rows'])} finished rows are {where}" if result["rows"] else "before the first row"
        show.line(f"interrupted: {rows}", warning=True)
    if out is not None and (result["rows"] or not result["interrupted"]):  # nothing takes no older file's place
        report.save(result, out)
    found = {row["status"] for row in result["rows"]}
    amiss = "wrong" in found or (found and found <= {"failed", "unavailable"})
    raise typer.Exit(INTERRUPTED if result["interrupted"] else int(bool(amiss)))
