"""Results as a JSON file. `benchmarks/README.md` describes the schema."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import machine

SCHEMA = "sface-kernels/benchmark"
SCHEMA_VERSION = 2
FIGURES = (  # what `plots` draws
    *("time_vs_classes", "memory_vs_classes", "time_vs_samples", "memory_vs_samples"),
    *("ratio", "density", "error_vs_filter"),
)
KINDS = ("bench", "density", "accuracy")
_RATIOS = {  # name: (provider compared with, True for a speedup: their time over ours)
    "speedup_vs_reference": ("reference", True),
    "speedup_vs_careful_compiled": ("careful-compiled", True),
    "time_vs_mm_fp32": ("mm-fp32", False),
    "time_vs_mm_tf32": ("mm-tf32", False),
    "time_vs_mm_bf16": ("mm-bf16", False),
}


class ReportError(ValueError):
    """A file is not a result that this version reads. One line."""


def new_report(kind: str, settings: dict[str, Any], device: torch.device | None = None) -> dict[str, Any]:
    """A report without rows, measured on `device`. Call it after the number of threads is set."""
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "date": machine.date(),
        "commit": machine.commit(),
        "machine": machine.facts(device),
        "versions": machine.versions(),
        "environment": machine.environment(),
        "settings": settings,
        "idle": [],
        "interrupted": False,
        "rows": [],
    }


def label(provider: str) -> str:
    """A provider as pictures and tables name it: what is no SFace loss says so."""
    return f"{provider} (another loss)" if provider == "linear-cross-entropy" else provider


def filter_name(filter_eps: float) -> str:
    """As providers are named: "2^-16", or "0"."""
    return "0" if filter_eps == 0 else f"2^{round(math.log2(filter_eps))}"


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


def reference_median(rows: list[dict[str, Any]]) -> float | None:
    """Of a density sweep, whose reference does the same work at every density: the median of its medians, ms."""
    medians = [row["time_ms"]["median"] for row in rows if row["provider"] == "reference" and row["time_ms"]]
    return statistics.median(medians) if medians else None


def load(path: Path) -> dict[str, Any]:
    """A result file; ReportError for anything else, OSError where it cannot be read."""
    try:
        report = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        found = report.get("schema") if isinstance(report, dict) else None
        raise ReportError(f"{path}: expected the schema {SCHEMA!r}, found {found!r}")
    if report.get("schema_version") != SCHEMA_VERSION or report.get("kind") not in KINDS:
        found = f"version {report.get('schema_version')!r}, kind {report.get('kind')!r}"
        raise ReportError(f"{path}: this version reads version {SCHEMA_VERSION} of {', '.join(KINDS)}, found {found}")
    return report


def check_writable(path: Path) -> None:
    """OSError unless a file can be written there; leaves an existing one as it is."""
    existed = path.exists()
    with path.open("a"):
        pass
    if not existed:
        path.unlink()


def _finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save(report: Any, path: Path) -> None:
    """Writes the report in one move: a reader sees the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(_finite(report), file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
