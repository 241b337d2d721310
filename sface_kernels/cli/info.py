"""`sface-kernels info`: what is installed, what can run here, and what "auto" takes."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..bench import machine
from ..dispatch import BACKENDS, choose
from ..types import Request
from .options import DTYPES


def facts() -> dict[str, Any]:
    """Versions, devices, and for each device and dtype what every backend says and what "auto" takes."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    found: dict[str, Any] = {"versions": machine.versions(), "machine": machine.facts(), "devices": []}
    for device in devices:
        entry: dict[str, Any] = {"device": str(device), "backends": {}, "auto": {}}
        if device.type == "cuda":
            entry["gpu"] = machine.gpu_facts(device)
        for name, dtype in DTYPES.items():
            request = Request(device, dtype, torch.promote_types(dtype, torch.float32))
            entry["auto"][name], _ = choose("auto", request)
            for backend, about in BACKENDS.items():
                reasons = entry["backends"].setdefault(backend, {"summary": about.summary, "unavailable": {}})
                reasons["unavailable"][name] = about.unavailable(request)
        found["devices"].append(entry)
    return found


def info(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Versions, devices, which backends run here and why others do not, and what "auto" takes."""
    found = facts()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console = Console()
    missing = "not installed"
    versions = ", ".join(f"{name} {version or missing}" for name, version in found["versions"].items())
    console.print(versions, highlight=False, soft_wrap=True)
    host = found["machine"]
    isa, caches = " ".join(host["isa"]) or "–", " ".join(f"{k} {v}" for k, v in host["caches"].items())
    console.print(
        f"CPU: {host['cpu']}, {host['cores']} cores, {host['threads']} threads; {isa}; {caches}",
        highlight=False,
        soft_wrap=True,
    )
    for entry in found["devices"]:
        console.print(_device_table(entry))
    if len(found["devices"]) == 1:
        console.print("No CUDA or ROCm device: PyTorch finds none.", highlight=False)


def _device_table(entry: dict[str, Any]) -> Table:
    gpu = entry.get("gpu")
    name = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else ""
    table = Table(title=f"{entry['device']} {name}".strip(), title_justify="left")
    table.add_column("backend")
    for dtype in DTYPES:
        table.add_column(dtype)
    table.add_column("what it is, or why it does not run")
    for backend, about in entry["backends"].items():
        reasons = about["unavailable"]
        cells = [
            "[bold green]auto" if entry["auto"][dtype] == backend else "no" if reasons[dtype] else "yes"
            for dtype in DTYPES
        ]
        why = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
        table.add_row(backend, *cells, f"{about['summary']}{f' (no: {why})' if why else ''}")
    return table
