"""Running the command `sface-kernels` in a test."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")

from sface_kernels import cli
from sface_kernels.bench import machine, providers

TINY = [
    "bench",
    "--n",
    "8",
    "--c",
    "60",
    "--d",
    "16",
    "--threads",
    "1",
    "--repeats",
    "3",
    "--no-memory",
    "--device",
    "cpu",
]
TOP_KEYS = {
    *("schema", "schema_version", "kind", "date", "commit", "machine", "versions", "environment", "settings"),
    *("idle", "interrupted", "rows"),
}
ROW_KEYS = {
    *("workload", "n", "c", "d", "geometry", "seed", "density_requested", "density", "device", "dtype", "mode"),
    *("provider", "what", "status", "reason", "check", "time_ms", "hot_ms", "input_copies", "work", "rates"),
    *("memory", "ratios", "other_busy_cores"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No half second of looking at an idle machine, no change of the threads of other tests."""
    monkeypatch.setattr(machine, "busy_cores", lambda seconds=0.5: 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *arguments, names="reference,careful,chunked,mm-fp32"):
    out = tmp_path / "out.json"
    status = cli.main([*TINY, "--providers", names, "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def fake(monkeypatch, name, function):
    """A provider that exists for one test."""
    provider = providers.Provider(name, providers.OPPONENT, "fake", function)
    monkeypatch.setitem(providers.PROVIDERS, name, provider)


def one_line(capsys, *words):
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and all(word in text for word in words), text
