"""The command behind `make gpu` where no GPU is needed: time limits, partial results, exit status, its own truth."""

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

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, problems, speed
from benchmarks.gpu.session import Outcome, Part, results, run
from tests.support.cases import ROOT
from tests.support.oracle import truth as full_truth
from tests.support.problems import random_problem

RECORD = "from benchmarks.gpu.session import record; "


def part(name: str, code: str, seconds: float = 30, required: bool = True) -> Part:
    return Part(name, [sys.executable, "-c", code], seconds, required, {"PYTHONPATH": str(ROOT)})


@pytest.fixture(autouse=True)
def _signals():
    """`run` takes the process's signals for its own; a test must give them back."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "finds no GPU" in done.stderr and "PYTHON" in done.stderr


def test_a_part_that_hangs_ends_with_what_it_wrote(tmp_path):
    hangs = f"{RECORD} import time; print('seen'); record(name='a figure', ms=1.5); time.sleep(600)"
    began = time.monotonic()
    outcomes = run([part("hangs", hangs, 9), part("after", f"{RECORD} record(name='later')")], tmp_path, 60)
    assert time.monotonic() - began < 55
    assert [o.state for o in outcomes] == ["unfinished", "passed"]
    assert [(row["part"], row["name"]) for row in results(tmp_path)] == [("hangs", "a figure"), ("after", "later")]
    assert "seen" in (tmp_path / "log.txt").read_text()
    assert [o["state"] for o in json.loads((tmp_path / "summary.json").read_text())] == ["unfinished", "passed"]


def test_parts_past_the_deadline_do_not_start(tmp_path):
    outcomes = run([part("first", "pass"), part("second", "pass")], tmp_path, 1)
    assert [(o.state, o.detail) for o in outcomes] == [("unfinished", "no time was left")] * 2


def test_left_over_time_goes_to_later_parts(tmp_path):
    limit = "import os; from benchmarks.gpu.session import record; record(name=os.environ['GPU_SECONDS'])"
    run([part("quick", "pass", 50), part("slow", limit, 50)], tmp_path, 100)
    assert float(results(tmp_path)[0]["name"]) > 70


def test_exit_status(tmp_path, capsys):
    fails = "import sys; sys.exit(3)"
    outcomes = run([part("wrong", fails), part("optional", fails, required=False)], tmp_path, 60)
    assert [(o.state, o.detail) for o in outcomes] == [("failed", "exit status 3")] * 2
    assert command.summary(outcomes, tmp_path) == 1
    assert command.summary(outcomes[1:], tmp_path) == 0
    assert command.summary([Outcome("late", "unfinished", 0.0, True, "")], tmp_path) == 1
    assert "NOT all required parts passed" in capsys.readouterr().out


def test_a_program_that_is_missing_fails_its_part(tmp_path):
    (outcome,) = run([Part("tool", ["/nowhere/tool"], 30)], tmp_path, 60)
    assert outcome.state == "failed" and "nowhere" in outcome.detail


def test_stopping_the_session_keeps_what_there_is(tmp_path):
    parts = "[Part('one', [sys.executable, '-c', 'import time; time.sleep(600)'], 60), Part('two', ['true'], 60)]"
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu.session import Part, run; "
        f"print([o.state for o in run({parts}, Path({str(tmp_path)!r}), 120)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for _ in range(100):
        log = tmp_path / "log.txt"
        if log.exists() and "===== one" in log.read_text():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert "['unfinished', 'unfinished']" in out and process.returncode == 0


def test_a_cut_line_is_left_out(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"part": "a"}\n{"part": "b", "na')
    assert results(tmp_path) == [{"part": "a"}]


def test_few_files_come_back(tmp_path):
    run([part("one", f"{RECORD} record(name='x')")], tmp_path, 60)
    assert len(list(Path(tmp_path).iterdir())) <= 8


def test_summary_lines(tmp_path):
    rows = [
        {"part": "facts", "device": "a GPU"},
        {"part": "speed", "name": "exact", "shape": "(1; 2; 3)", "geometry": "random", "ms": 1.25},
        {"part": "checks", "name": "a check", "error": "AssertionError: off"},
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = "\n".join(command.table(tmp_path))
    assert "device: a GPU" in text and "ms 1.25" in text and "a check: AssertionError: off" in text


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(problems, "DEVICE", "cpu")


def test_its_truth_is_the_oracle(on_cpu):
    x, w, labels, upstream = random_problem(31, 101, 61)
    rows, classes = torch.tensor([0, 3, 30]), torch.tensor([0, 50, 100])
    ours = problems.truth(problems.Inputs(x, w, labels), rows, classes, upstream)
    exact = full_truth(x, w, labels, upstream)
    torch.testing.assert_close(ours.row_loss, exact.row_loss[rows])
    torch.testing.assert_close(ours.grad_x, exact.full_grad_x[rows])
    torch.testing.assert_close(ours.grad_w, exact.full_grad_w[classes])


@pytest.mark.parametrize("share", [0.05, 0.9])
def test_dense_inputs_have_the_density_asked_for(on_cpu, share):
    x, w, _ = problems.dense(256, 5003, 64, share, torch.float32)
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(w).t()
    assert abs(float((cos >= problems.ACTIVE_COSINE).float().mean()) - share) < 0.1 * share + 0.01


def test_the_parts_fit_into_the_session(monkeypatch):
    """With every tool there."""
    monkeypatch.setattr(command.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(command, "has", lambda module: True)
    names = [part.name for part in command.session_parts()]
    assert names == ["facts", "build", "checks", "suite", "memcheck", "speed", "racecheck", "profile"]
    assert sum(part.seconds for part in command.session_parts()) <= command.SECONDS < 600


def test_a_check_that_fails_is_recorded(tmp_path, monkeypatch):
    """With its reason, and the process says so."""
    monkeypatch.setenv("GPU_RESULTS", str(tmp_path / "results.jsonl"))

    def wrong():
        raise AssertionError("off by one\nand more")

    def elsewhere():
        raise checks.Skip("one GPU")

    monkeypatch.setattr(checks, "CHECKS", {"wrong": wrong, "elsewhere": elsewhere})
    monkeypatch.setattr(sys, "argv", ["checks", "wrong", "elsewhere"])
    assert checks.main() == 1
    first, second = results(tmp_path)
    assert first["error"] == "AssertionError: off by one" and second["skipped"] == "one GPU"


@pytest.mark.parametrize("opponent", [speed.reference, speed.careful])
def test_what_it_compares_with_is_the_same_loss(on_cpu, opponent):
    inputs = problems.dense(64, 2003, 128, 0.05)
    exact = float(full_truth(*inputs).row_loss.mean())
    assert abs(float(opponent(*inputs)) - exact) <= speed.LOSS_TOLERANCE * max(1.0, abs(exact))
