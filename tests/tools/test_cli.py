"""The command `sface-kernels`: what it shows, what it checks, nonsense."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import typer

from sface_kernels import __version__, cli
from sface_kernels.cli import bench
from sface_kernels.cli.app import app
from sface_kernels.dispatch import BACKENDS
from sface_kernels.testing import budget, selfcheck
from tests.support import command
from tests.support.cases import ROOT
from tests.support.command import TINY, one_line

same_threads = command.same_threads


def test_info_names_every_backend_and_what_auto_takes(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and __version__ in text and "auto" in text
    assert all(backend in text for backend in BACKENDS)
    assert cli.main(["info", "--json"]) == 0
    cpu = json.loads(capsys.readouterr().out)["devices"][0]
    assert cpu["device"] == "cpu" and set(cpu["backends"]) == set(BACKENDS)
    assert cpu["backends"]["reference"]["unavailable"] == dict.fromkeys(cpu["auto"])
    assert "float64" in cpu["backends"]["native"]["unavailable"]["float64"]
    for dtype, chosen in cpu["auto"].items():
        assert cpu["backends"][chosen]["unavailable"][dtype] is None


def test_check_is_within_budget_here(capsys, tmp_path):
    out = tmp_path / "check.json"
    assert cli.main(["check", "--backends", "chunked,reference", "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "0 over their budget" in text and "chunked" in text and "float64" in text
    rows = json.loads(out.read_text())
    assert all(row["ok"] and row["errors"]["grad_w"] <= row["limits"]["grad_w"] for row in rows)
    assert {row["problem"] for row in rows} > set(selfcheck.HARD)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16", "float64"}


def test_check_says_what_is_over_and_exits_1(capsys, monkeypatch):
    def errors(truth, x, w, y, backend, filter_eps):
        found = honest(truth, x, w, y, backend, filter_eps)
        return found._replace(grad_w=math.nan) if backend == "chunked" and len(x) == 257 else found

    honest = budget.package_errors
    monkeypatch.setattr(budget, "package_errors", errors)
    assert cli.main(["check", "--backends", "chunked", "--device", "cpu", "-v"]) == 1
    text = capsys.readouterr().out
    assert "OVER: chunked, float32, 2^-24, random 257×331×61" in text and "nan of" in text


def test_a_check_of_nothing_is_no_success(capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "unavailable", lambda *_: "it is Sunday")
    assert cli.main(["check", "--backends", "chunked", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "chunked is not checked: it is Sunday" in captured.out
    assert captured.err.count("\n") == 1 and "chunked" in captured.err


BAD = {
    "bench nowhere": ["nowhere", "ms1mv2"],
    "bench casia --c 5": ["--c", "casia"],
    "bench casia casia": ["twice"],
    "bench --providers nonsense": ["--providers", "nonsense", "reference"],
    "bench --providers native@2": ["native@2"],
    "bench --providers careful,careful": ["twice"],
    "bench --n 0": ["--n", "'0'"],
    "bench --n 1_": ["--n", "'1_'"],
    "bench --c 99999999999 --d 99999999999": ["--c", "99999999999"],
    "bench --threads 99999999": ["--threads", "1024"],
    "bench --d 512,many": ["--d", "many"],
    "bench --geometry spiral": ["--geometry", "spiral"],
    "bench --density 0.1": ["--density", "random"],
    "bench --geometry dense --density 1.5": ["--density", "1.5"],
    "bench --geometry dense --density many": ["--density", "a number", "many"],
    "bench --mode sideways": ["--mode", "sideways"],
    "bench --mode all,forward": ["--mode", "twice"],
    "bench --mode graph --device cpu": ["--mode", "CUDA"],
    "bench --dtype float64": ["--dtype"],
    "bench --device tpu": ["--device", "tpu"],
    "bench --device cpu:": ["--device", "'cpu:'"],
    "bench --device cuda:99": ["cuda:99"],
    "bench --repeats 0": ["--repeats"],
    "bench --budget-seconds -1": ["--budget-seconds"],
    "bench --out /nonexistent/out.json": ["--out", "/nonexistent/out.json"],
    "bench --out /": ["--out"],
    "check --backends abacus": ["abacus"],
    "check --device cuda:99": ["cuda:99"],
    "check --out /nonexistent/out.json": ["--out"],
    "plot": ["FILES"],
    "plot /nonexistent.json": ["/nonexistent.json"],
    "dance": ["dance"],
    "--frobnicate": ["--frobnicate"],
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_options_are_one_line_and_exit_2(capsys, monkeypatch, arguments):
    def never(*args, **kwargs):
        raise AssertionError("something was run")

    monkeypatch.setattr(bench, "run_case", never)
    monkeypatch.setattr(selfcheck, "run", never)
    assert cli.main(arguments.split()) == 2
    one_line(capsys, *BAD[arguments])


def test_huge_pages_restart_the_process_once(monkeypatch):
    def execve(path, command, environment):
        assert command[1:] == ["-m", "sface_kernels", *TINY, "--thp"] and environment[bench.THP_VARIABLE] == "1"
        raise KeyboardInterrupt  # stands for the end of this process

    monkeypatch.delenv(bench.THP_VARIABLE, raising=False)
    monkeypatch.setattr(os, "execve", execve)
    assert cli.main([*TINY, "--thp"]) == 130


def test_no_option_shows_its_own_name_as_its_value():
    """typer 0.27 takes a metavar that is the parameter's name for the name of the option: --DEVICE."""
    shown = [
        (name, said.metavar)
        for command in app.registered_commands
        for name, annotation in inspect.get_annotations(command.callback, eval_str=True).items()
        for said in getattr(annotation, "__metadata__", ())
        if isinstance(said, typer.models.OptionInfo)
    ]
    assert ("device", "NAME") in shown and all(metavar != name.upper() for name, metavar in shown)


@pytest.mark.parametrize(
    "missing, arguments", [("typer", ["info"]), ("matplotlib", ["plot", "benchmarks/results/cpu-random.json"])]
)
def test_without_the_extra_one_line_says_what_to_install(missing, arguments):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from sface_kernels.cli import main; sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert missing in done.stderr and "pip install 'sface-kernels[cli]'" in done.stderr
