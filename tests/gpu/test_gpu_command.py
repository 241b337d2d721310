"""The command behind `make gpu` where no GPU is needed: time limits, partial results, what counts as not run, exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Part
from sface_kernels import cli
from tests.support.cases import ROOT
from tests.support.command import TINY


def part(name: str, code: str, seconds: float = 30, needs: tuple[str, ...] = (), required: bool = True) -> Part:
    return Part(name, seconds, [sys.executable, "-c", code], needs, required)


@pytest.fixture(autouse=True)
def _signal():
    """`run` takes a signal for its own; a test must give it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def states(out: Path) -> list[str]:
    return [one["state"] for one in json.loads((out / "summary.json").read_text())]


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "finds no GPU" in done.stderr and "PYTHON" in done.stderr


def test_a_part_that_hangs_ends_with_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    hangs = "import time; print('seen', flush=True); time.sleep(600)"
    began = time.monotonic()
    assert gpu.run([part("hangs", hangs, 2), part("after", "pass")], tmp_path, 32) == 1
    assert time.monotonic() - began < 34
    assert states(tmp_path) == ["unfinished", "passed"]
    assert "seen" in (tmp_path / "log.txt").read_text()


def test_parts_past_the_deadline_do_not_start_and_left_over_time_goes_on(tmp_path):
    assert gpu.run([part("quick", "pass", 50), part("slow", "pass", 50)], tmp_path, 100) == 0
    assert any(f"at most {seconds} s" in (tmp_path / "log.txt").read_text() for seconds in range(90, 101))
    (tmp_path / "late.json").write_text("of an earlier run")
    assert gpu.run([part("late", "pass")], tmp_path, 1) == 1
    assert states(tmp_path) == ["unfinished"] and (tmp_path / "late.json").exists()


@pytest.mark.parametrize("required", [True, False])
@pytest.mark.parametrize(
    "code, needs, state", [("import sys; sys.exit(3)", (), "failed"), ("pass", ("abacus",), "not run")]
)
def test_what_is_required_must_run_and_be_right(tmp_path, capsys, code, needs, state, required):
    parts = [part("right", "pass", needs=("json", "git")), part("other", code, 30, needs, required)]
    assert gpu.run(parts, tmp_path, 60) == int(required)
    assert states(tmp_path) == ["passed", state]
    text = capsys.readouterr().out
    assert ("NOT all required parts passed" in text) == required and ("abacus not found" in text or state == "failed")


def test_stopping_the_session_keeps_what_there_is(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import Part, run; "
        "parts = [Part(n, 60, [sys.executable, '-c', 'import time; time.sleep(600)']) for n in ('one', 'two')]; "
        f"sys.exit(run(parts, Path({str(tmp_path)!r}), 120))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    log = tmp_path / "log.txt"
    while process.poll() is None and not (log.exists() and "===== one" in log.read_text()):
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(30) == 1 and states(tmp_path) == ["unfinished", "unfinished"]


@pytest.mark.parametrize("provider, status", [("careful", 0), ("triton", 1)])
def test_a_benchmark_is_right_where_every_provider_is(tmp_path, capsys, provider, status):
    if provider == "triton" and torch.cuda.is_available():
        pytest.skip("the Triton backend runs here")
    command = [sys.executable, "-m", "sface_kernels", *TINY, "--providers", f"{provider},careful-bf16", "--out"]
    assert gpu.run([Part("bench", 60, [*command, str(tmp_path / "bench.json")])], tmp_path, 60) == status
    text = capsys.readouterr().out
    assert "| careful-bf16 |" in text and ("triton: triton: it runs on a GPU" in text) == bool(status)


def test_parts_that_do_not_exist_are_named(tmp_path):
    environment = {**os.environ, "PARTS": "large dinner", "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "expected some of facts, dtypes" in done.stderr and "got dinner" in done.stderr


def test_a_limit_that_is_no_number_is_one_line(tmp_path):
    environment = {**os.environ, "LIMIT": "two", "OUT": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr == "make gpu: LIMIT: expected a number of seconds, got 'two'\n"


def test_the_parts_fit_into_the_session(tmp_path):
    """In the order of what would be missed most, within ten minutes."""
    parts = gpu.session_parts(tmp_path)
    names = [part.name for part in parts]
    assert names[:5] == ["facts", "dtypes", "checks", "large", "small"] and names[-1] == "training"
    assert sum(part.seconds for part in parts) <= gpu.SECONDS < 600
    assert all("pytest" in part.needs for part in parts if "pytest" in part.command)


def test_every_bench_of_the_session_has_options_that_exist(tmp_path, monkeypatch, capsys):
    """Run to where its device is looked for, which is here a CPU."""
    ran = []
    monkeypatch.setattr("sface_kernels.cli.bench.run_case", lambda case, *_: ran.append(case))
    for part in gpu.session_parts(tmp_path):
        if "bench" in part.command:
            options = list(part.command)[3:]
            options[options.index("--device") + 1] = "cpu"
            options = [option.removesuffix(",graph") for option in options]
            assert cli.main(options) == 0, capsys.readouterr().err
    assert len(ran) == 1 + 4 + 1 + 1 + 1 + 3 + 1 + 8 + 2
