"""Results as a JSON file and as a table.

The JSON file, schema "sface-kernels/benchmark", version 1. Times are milliseconds, memory is bytes, errors
are relative (Frobenius for gradients), everything else has its unit in its name:

    schema, schema_version, kind   kind: "bench_loss", "density" or "accuracy"
    date, commit                   UTC; the git commit, "-dirty" appended where files differ, or null
    machine, versions, environment see `benchmarks.machine`
    settings                       the options of the run, as given or defaulted
    idle                           one check per workload: workload, busy_cores, load_average, warning
    interrupted                    true when stopped by Ctrl-C; rows then holds what was finished
    rows                           one object per workload, mode and provider ("bench_loss", "density"):
      workload, n, c, d, geometry, seed
      density_requested, density   share of active pairs at 2^-16, requested (or null) and measured
      mode, provider, what
      status, reason               "ok", "wrong", "failed", "unavailable" or "out of memory"; why, or null
      check                        ok, classes (how many of C were checked), errors (against float64),
                                   errors_beyond_filter (against float64 with the same filter) and their
                                   limits; or null
      time_ms                      median, q1, q3, min, max, repeats, samples; null unless status is "ok"
      memory                       peak_extra_bytes, method, mode; or error; or null when not measured
      ratios                       speedup_vs_reference, speedup_vs_careful_compiled, time_vs_mm_fp32: of
                                   medians of the same workload and mode in this run, or null without them;
                                   in a density sweep the first is against the sweep's one reference
      other_busy_cores             cores that other processes used while this was timed, or null

Kind "accuracy" has rows of its own, described in `benchmarks.accuracy`.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from . import machine

SCHEMA = "sface-kernels/benchmark"
SCHEMA_VERSION = 1
_RATIOS = {  # name: (provider compared with, True for a speedup: their time over ours)
    "speedup_vs_reference": ("reference", True),
    "speedup_vs_careful_compiled": ("careful-compiled", True),
    "time_vs_mm_fp32": ("mm-fp32", False),
}


def new_report(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A report without rows. Call it after the number of threads is set."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "date": machine.date(),
        "commit": machine.commit(),
        "machine": machine.facts(),
        "versions": machine.versions(),
        "environment": machine.environment(),
        "settings": settings,
        "idle": [],
        "interrupted": False,
        "rows": [],
    }


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Fills `ratios` of rows of one workload and mode from their medians."""
    medians = {row["provider"]: row["time_ms"]["median"] for row in rows if row["time_ms"]}
    for row in rows:
        own = medians.get(row["provider"])
        row["ratios"] = {}
        for name, (other, speedup) in _RATIOS.items():
            theirs = medians.get(other)
            value = None
            if own and theirs:
                value = theirs / own if speedup else own / theirs
            row["ratios"][name] = value


def check_writable(path: Path) -> None:
    """OSError unless a file can be written there; leaves an existing one as it is."""
    existed = path.exists()
    with path.open("a"):
        pass
    if not existed:
        path.unlink()


def save(report: dict[str, Any], path: Path) -> None:
    """Writes the report in one move: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(report, file, indent=1)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _mebibytes(memory: dict[str, Any] | None) -> str:
    if not memory:
        return "–"
    return f"{memory['peak_extra_bytes'] / 2**20:.0f}" if "peak_extra_bytes" in memory else "?"


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One table for rows of one workload and mode."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    table = Table(title=f"{first['workload']}, {first['mode']}, {first['density']:.2g} active at 2^-16")
    table.add_column("provider", no_wrap=True)
    for heading in ("median ms", "quartiles", "runs", "× reference", "× compiled", "/ mm fp32", "extra MiB"):
        table.add_column(heading, justify="right", no_wrap=heading in ("median ms", "quartiles"))
    notes = []
    for row in rows:
        time, ratios = row["time_ms"], row["ratios"]
        if not time:
            table.add_row(row["provider"], row["status"], *[""] * 5, _mebibytes(row["memory"]))
            notes.append(f"{row['provider']}: {row['status']}: {row['reason']}")
            continue
        table.add_row(
            row["provider"],
            f"{time['median']:.2f}",
            f"{time['q1']:.2f}–{time['q3']:.2f}",
            str(time["repeats"]),
            _number(ratios["speedup_vs_reference"]),
            _number(ratios["speedup_vs_careful_compiled"]),
            _number(ratios["time_vs_mm_fp32"], 2),
            _mebibytes(row["memory"]),
        )
    console = Console(width=None if os.isatty(1) else 110)
    console.print(table)
    for text in notes:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
