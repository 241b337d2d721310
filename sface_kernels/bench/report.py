"""Results as a JSON file. `benchmarks/README.md` describes the schema."""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from . import machine

FORMAT = {"schema": "sface-kernels/benchmark", "schema_version": 2}
# "density" is what a bench of several densities called itself; the rows of a "table" are its lines
KINDS = ("bench", "density", "accuracy", "table")
_RATIOS = {  # name: (provider compared with, True for a speedup: their time over ours)
    "speedup_vs_reference": ("reference", True),
    "speedup_vs_careful_compiled": ("careful-compiled", True),
    "time_vs_mm_fp32": ("mm-fp32", False),
    "time_vs_mm_tf32": ("mm-tf32", False),
    "time_vs_mm_bf16": ("mm-bf16", False),
}
Row = dict[str, Any]


class ReportError(ValueError):
    """A file is not a result that this version reads. One line."""


class WriteError(OSError):
    """A file, its `filename`, cannot be written."""


def new_report(kind: str, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A report without rows, measured on `device`. Call it after the number of threads is set."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    environment = {key: value for key, value in sorted(os.environ.items()) if key.startswith(machine.ENV)}
    where = {"machine": machine.facts(device), "versions": machine.versions(), "environment": environment}
    about = {**FORMAT, "kind": kind, "date": now, "commit": machine.commit(), **where}
    return {**about, "settings": settings, "interrupted": False, "rows": []}


def label(provider: str) -> str:
    """A provider as pictures and tables name it: what is no SFace loss says so."""
    return f"{provider} (another loss)" if provider == "linear-cross-entropy" else provider


def filter_name(filter_eps: float) -> str:
    """As providers are named: "2^-16", or "0"."""
    return "0" if filter_eps == 0 else f"2^{round(math.log2(filter_eps))}"


def add_ratios(rows: list[Row]) -> None:
    """Fills `ratios` of rows of one workload and mode from their medians."""
    medians = {row["provider"]: median(row) for row in rows}
    for row in rows:
        row["ratios"] = {}
        optimizer = row["provider"].partition("+")[2].removeprefix("head-")
        for name, (other, speedup) in _RATIOS.items():
            # a whole step beside the reference's with the same optimizer
            own, theirs = median(row), medians.get(f"{other}+{optimizer}" if optimizer and speedup else other)
            row["ratios"][name] = (theirs / own if speedup else own / theirs) if own and theirs else None


def median(row: Row) -> float | None:
    return row["time_ms"]["median"] if row["time_ms"] else None


def is_density_sweep(rows: list[Row]) -> bool:
    return len({row["density_requested"] for row in rows} - {None}) > 1


def reference_median(rows: list[Row]) -> float | None:
    """Of a density sweep, whose reference does the same work at every density: the median of its medians, ms."""
    medians = [row["time_ms"]["median"] for row in rows if row["provider"] == "reference" and row["time_ms"]]
    return statistics.median(medians) if medians else None


def load(path: Path) -> dict[str, Any]:
    """A result file; ReportError for anything else."""
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path}: not a JSON file ({error})") from error
    found = {key: report.get(key) if isinstance(report, dict) else None for key in (*FORMAT, "kind")}
    if found not in ({**FORMAT, "kind": kind} for kind in KINDS):
        raise ReportError(f"{path}: expected {FORMAT} and a kind of {', '.join(KINDS)}, found {found}")
    rows = report.get("rows")
    if not (isinstance(rows, list) and all(isinstance(part, dict) for part in (report.get("machine"), *rows))):
        raise ReportError(f"{path}: expected 'machine', an object, and 'rows', a list of objects")
    return report


def save(report: Any, path: Path) -> None:
    """Writes the report as `write` does. What is no finite number is null."""
    finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
    write(path, (json.dumps(finite, indent=1, allow_nan=False) + "\n").encode())


def is_special(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder: a device, a pipe."""
    return path.exists() and not (path.is_file() or path.is_dir())


def write(path: Path, content: bytes) -> None:
    """Writes a file in one move: a reader sees the old file or the new one, and nothing else is left behind. A link
    stays one, and who may read the file stays as it was. A device or a pipe is written to, and never replaced."""
    name = None
    try:
        if is_special(path):
            path.write_bytes(content)
            return
        target = path.resolve()
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=path.name, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else 0o644)
        os.replace(name, target)
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from None
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)
