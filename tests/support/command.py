"""Running the command `sface-kernels` in a test."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")

from sface_kernels import cli
from sface_kernels.bench import providers

SMALL = "bench --n 8 --c 60 --d 16 --threads 1 --repeats 3 --no-memory --device cpu"
TINY = SMALL.split()


@pytest.fixture(autouse=True)
def same_threads():
    """No change of the threads of other tests."""
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
