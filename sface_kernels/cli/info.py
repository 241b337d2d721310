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
from . import show
from .options import DTYPE_NAMES


def facts() -> dict[str, Any]:
    """Versions, devices, and for each device and dtype what every backend says and what "auto" takes."""
    devices = []
    for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        requests = {name: selfcheck.request(torch.device(device), dtype) for name, dtype in DTYPE_NAMES.items()}
        backends = {
            backend: {"summary": b.summary, "unavailable": {name: b.unavailable(r) for name, r in requests.items()}}
            for backend, b in BACKENDS.items()
        }
        gpu = {"gpu": machine.gpu_facts(torch.device(device))} if device != "cpu" else {}
        auto = {name: choose("auto", request)[0] for name, request in requests.items()}
        devices.append({"device": device, **gpu, "backends": backends, "auto": auto})
    about = {"versions": machine.versions(), "machine": machine.facts(), "commit": machine.commit()}
    return {**about, "devices": devices}


def info(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Versions, devices, which backends run here and why others do not, and what "auto" takes."""
    found = facts()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    show.line(", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items()))
    host = found["machine"]
    show.line(f"CPU: {machine.title(host)}; {host['cores']} cores; {' '.join(host['isa']) or '–'}")
    for entry in found["devices"]:
        gpu = entry.get("gpu")
        name = f", {gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else ""
        rows = []
        for backend, about in entry["backends"].items():
            reasons, auto = about["unavailable"], entry["auto"]
            taken = ["auto" if auto[dtype] == backend else "no" if reasons[dtype] else "yes" for dtype in reasons]
            why = "; ".join(dict.fromkeys(filter(None, reasons.values())))
            rows.append([backend, *taken, about["summary"] + (f" (no: {why})" if why else "")])
        head = ["backend", *DTYPE_NAMES, "what it is, or why it does not run"]
        show.table(Table(f"{entry['device']}{name}", head, rows, len(head)))
    if len(found["devices"]) == 1:
        show.line("No CUDA or ROCm device: PyTorch finds none.")
