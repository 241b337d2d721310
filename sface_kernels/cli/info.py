"""`sface-kernels info`: what is installed, what can run here, and what "auto" takes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer

from ..bench import machine
from ..bench.table import Table
from ..dispatch import BACKENDS, choose
from ..testing import selfcheck
from ..types import Request
from . import show
from .options import DTYPE_NAMES


def facts() -> dict[str, Any]:
    """Versions, devices, and for each device and dtype what every backend says and what "auto" takes."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    found: dict[str, Any] = {"versions": machine.versions(), "machine": machine.facts(), "devices": []}
    for device in devices:
        gpu = {"gpu": machine.gpu_facts(device)} if device.type == "cuda" else {}
        backends = {
            backend: {
                "summary": about.summary,
                "unavailable": {name: selfcheck.unavailable(backend, device, t) for name, t in DTYPE_NAMES.items()},
            }
            for backend, about in BACKENDS.items()
        }
        auto = {
            name: choose("auto", Request(device, dtype, selfcheck.weight_dtype(dtype)))[0]
            for name, dtype in DTYPE_NAMES.items()
        }
        found["devices"].append({"device": str(device), **gpu, "backends": backends, "auto": auto})
    return {**found, "commit": machine.commit()}


def info(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Versions, devices, which backends run here and why others do not, and what "auto" takes."""
    found = facts()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    show.line(", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()))
    host = found["machine"]
    isa, caches = " ".join(host["isa"]) or "–", " ".join(f"{k} {v}" for k, v in host["caches"].items())
    show.line(f"CPU: {host['cpu']}, {host['cores']} cores, {host['threads']} threads; {isa}; {caches}")
    for entry in found["devices"]:
        show.table(_device_table(entry))
    if len(found["devices"]) == 1:
        show.line("No CUDA or ROCm device: PyTorch finds none.")


def _device_table(entry: dict[str, Any]) -> Table:
    gpu = entry.get("gpu")
    name = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else ""
    rows = []
    for backend, about in entry["backends"].items():
        reasons, auto = about["unavailable"], entry["auto"]
        taken = ["auto" if auto[dtype] == backend else "no" if reasons[dtype] else "yes" for dtype in reasons]
        why = "; ".join(dict.fromkeys(filter(None, reasons.values())))
        rows.append([backend, *taken, about["summary"] + (f" (no: {why})" if why else "")])
    head = ["backend", *DTYPE_NAMES, "what it is, or why it does not run"]
    return Table(f"{entry['device']} {name}".strip(), head, rows, len(head))
