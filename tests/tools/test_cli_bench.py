"""`sface-kernels bench` as its users meet it: the results file, failures, interrupts."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch

from sface_kernels import cli
from sface_kernels.bench import memory, providers, report
from sface_kernels.bench.timing import MODES
from sface_kernels.cli import bench
from sface_kernels.testing import selfcheck
from sface_kernels.testing.workloads import CLASSES, Shape
from tests.support import command
from tests.support.cases import ROOT
from tests.support.command import TINY, fake, run

same_threads = command.same_threads


def test_bench_writes_the_documented_schema(tmp_path, capsys):
    status, result = run(tmp_path, "--mode", "all", "--geometry", "trained", "--kernels")
    assert status == 0
    assert {key: result[key] for key in (*report.FORMAT, "kind")} == {**report.FORMAT, "kind": "bench"}
    assert result["machine"]["threads"] == 1 and result["versions"]["torch"] == torch.__version__
    assert result["settings"]["repeats"] == 3
    expected = itertools.product(MODES[:4], ("reference", "careful", "chunked", "mm-fp32"))
    assert [(row["mode"], row["provider"]) for row in result["rows"]] == list(expected)
    documented = (ROOT / "benchmarks" / "README.md").read_text()
    assert all(f"`{key}`" in documented for key in {*result, *result["rows"][0]})
    for row in result["rows"]:
        assert row["status"] == "ok", row["reason"]
        times = row["time_ms"]
        assert 0 < times["min"] <= times["q1"] <= times["median"] <= times["q3"] <= times["max"]
        assert len(times["samples"]) == times["repeats"] >= 3
        assert row["check"] is None if row["provider"] == "mm-fp32" else row["check"]["classes"] == 60
        assert row["rates"]["tflops"] == pytest.approx(row["work"]["flop"] / times["median"] / 1e9)
        assert any("mm" in kernel for kernel in row["kernels"])
    rows = {row["provider"]: row for row in result["rows"] if row["mode"] == "both"}
    median = {name: row["time_ms"]["median"] for name, row in rows.items()}
    ratios = rows["chunked"]["ratios"]
    assert ratios["speedup_vs_reference"] == pytest.approx(median["reference"] / median["chunked"])
    assert ratios["time_vs_mm_fp32"] == pytest.approx(median["chunked"] / median["mm-fp32"])
    assert ratios["speedup_vs_careful_compiled"] is ratios["time_vs_mm_bf16"] is None
    text = capsys.readouterr().out
    assert "chunked" in text and "TFLOP/s" in text and "aten::mm" in text


def test_several_sizes_workloads_by_name_and_what_bf16_is_allowed_to(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run_case", lambda case, chosen, *rest: seen.append((case.shape, chosen)))
    assert cli.main(["bench", "casia", "4m", "--n", "8,16", "--d", "32"]) == 0
    assert [shape for shape, _ in seen] == [Shape(n, CLASSES[name], 32) for n in (8, 16) for name in ("casia", "4m")]
    seen.clear()
    assert cli.main(["bench", "--c", "10,1_000", "--bf16-opponents", "--providers", "careful,mm-fp32,chunked"]) == 0
    assert [shape for shape, _ in seen] == [Shape(128, 10, 512), Shape(128, 1000, 512)]
    assert [provider.precision for provider in seen[0][1]] == ["medium", "medium", "highest"]


def test_another_loss_is_labelled_so(tmp_path, capsys):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    _, result = run(tmp_path, names="linear-cross-entropy,careful")
    assert result["rows"][0]["status"] == "ok" and "another loss" in result["rows"][0]["what"]
    assert "linear-cross-entropy (another loss)" in capsys.readouterr().out


def test_whole_steps_with_several_optimizers(tmp_path, capsys):
    status, result = run(tmp_path, "--mode", "step", names="reference+adamw,chunked+head-sgd,chunked@0+head-adamw")
    assert status == 0 and [row["status"] for row in result["rows"]] == ["ok"] * 3
    assert all(row["time_ms"]["median"] > 0 for row in result["rows"])
    medians = [row["time_ms"]["median"] for row in result["rows"]]
    ratios = [row["ratios"]["speedup_vs_reference"] for row in result["rows"]]
    assert ratios == [1, None, medians[0] / medians[2]], "the reference with the same optimizer"
    assert cli.main(["bench", "--mode", "step", "--providers", "native+lion"]) == 2
    assert "unknown optimizer" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["bench", "--providers", "chunked+head-sgd"]) == 2
    assert "an optimizer is for --mode step alone, got chunked+head-sgd" in " ".join(capsys.readouterr().err.split())
    assert [providers.resolve(name).optimizer for name in providers.STEPS[:3]] == ["sgd", "sgd", "head-sgd"]


def test_half_embeddings_at_several_densities(tmp_path):
    arguments = ["--dtype", "bfloat16", "--geometry", "dense", "--density", "0.01,0.5"]
    status, result = run(tmp_path, *arguments, names="reference,reference-bf16,chunked")
    assert status == 0 and [row["status"] for row in result["rows"]] == ["ok"] * 6
    assert {row["dtype"] for row in result["rows"]} == {"bfloat16"}
    assert report.is_density_sweep(result["rows"]) and result["rows"][-1]["density"] == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("error", [1.01, math.nan], ids=["one percent off", "not finite"])
def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, error):
    fake(monkeypatch, "off", lambda x, w, y: providers.careful(x, w, y) * error)
    status, result = run(tmp_path, names="off,careful")
    wrong, right = result["rows"]
    assert status == 1
    assert (wrong["status"], wrong["time_ms"], wrong["check"]["ok"]) == ("wrong", None, False)
    assert right["status"] == "ok" and right["time_ms"]


@pytest.mark.parametrize(
    "error, status",
    [
        (RuntimeError("out of luck\nsecond line"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
    ids=["failed", "out of memory"],
)
@pytest.mark.parametrize("calls_before", [0, 3], ids=["in the check", "in the timing"])
def test_a_failing_provider_does_not_stop_the_others(tmp_path, monkeypatch, capsys, error, status, calls_before):
    calls = itertools.count()

    def breaks_later(x, w, y):
        if next(calls) >= calls_before:
            raise error
        return providers.careful(x, w, y)

    fake(monkeypatch, "breaks", breaks_later)
    exit_status, result = run(tmp_path, names="breaks,careful")
    assert exit_status == 0
    broken, fine = result["rows"]
    assert (broken["status"], broken["time_ms"]) == (status, None)
    assert broken["reason"].endswith(str(error).splitlines()[0])
    assert fine["time_ms"] and f"breaks: {status}" in capsys.readouterr().out


def test_memory_that_runs_out_in_the_probe_is_reported_and_not_tried_here(tmp_path, monkeypatch):
    def measure(provider, case, threads, dtype):
        if provider.name == "reference":
            return {"error": "killed, most likely out of memory", "out_of_memory": True}
        return {"peak_extra_bytes": 1, "method": "made up"}

    monkeypatch.setattr(memory, "measure", measure)
    status, result = run(tmp_path, "--memory", names="reference,careful")
    large, fine = result["rows"]
    assert status == 0 and (large["status"], large["check"]) == ("out of memory", None)
    assert fine["time_ms"] and fine["memory"]["peak_extra_bytes"] == 1


def test_data_that_do_not_fit_are_reported_for_everybody(tmp_path, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sface_kernels.bench.runner.make_workload", no_room)
    status, result = run(tmp_path)
    assert status == 0 and [row["status"] for row in result["rows"]] == ["out of memory"] * 4


@pytest.mark.parametrize("name, word", [("triton@0", "triton"), ("mm-tf32", "CUDA")])
def test_what_cannot_run_says_why(tmp_path, name, word):
    if word == "triton" and not selfcheck.unavailable("triton", torch.device("cpu"), torch.float32):
        pytest.skip("the Triton backend runs on this CPU, in its interpreter")
    _, result = run(tmp_path, names=f"{name},careful")
    row = result["rows"][0]
    assert row["status"] == "unavailable" and word in row["reason"]
    assert run(tmp_path, names=name)[0] == 1, "nothing ran"


def test_an_interrupt_before_the_first_row_leaves_an_older_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run_case", mock.Mock(side_effect=KeyboardInterrupt))
    out = tmp_path / "out.json"
    out.write_text("older")
    assert cli.main([*TINY, "--out", str(out)]) == 130
    assert out.read_text() == "older" and "before the first row" in " ".join(capsys.readouterr().err.split())


def test_what_is_measured_is_shown_where_it_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "save", mock.Mock(side_effect=report.WriteError(28, "No space left", "out.json")))
    assert cli.main([*TINY, "--providers", "chunked", "--out", str(tmp_path / "out.json")]) == 1
    shown = capsys.readouterr()
    assert "chunked" in shown.out and "cannot write out.json: No space left" in shown.err


def test_a_pipe_gets_one_document(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    assert cli.main([*TINY, "--c", "60,61", "--providers", "chunked", "--out", str(pipe)]) == 0
    reader.join()
    assert len(json.loads(got[0])["rows"]) == 2


def test_ctrl_c_in_a_terminal(tmp_path):
    """A real signal to a real process, in the second of three workloads."""
    out = tmp_path / "out.json"
    more = f"--c 60,61,62 --repeats 100000 --budget-seconds 2 --providers careful,chunked --out {out}".split()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    interruptible = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # in the background it is ignored
    command = [sys.executable, "-m", "sface_kernels", *TINY, *more]
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=interruptible, **streams)
    try:
        end = time.monotonic() + 120
        while not out.exists() and time.monotonic() < end:  # written when the first workload is done
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    # Python ends itself by the signal where an import was interrupted; a shell shows 130 for both
    assert process.returncode in (130, -signal.SIGINT), text
    assert "interrupted: " in text and "Traceback" not in text
    result = json.loads(out.read_text())
    assert result["interrupted"] and {row["c"] for row in result["rows"]} >= {60}
    assert all(row["time_ms"] for row in result["rows"])
