"""The command `sface-kernels` as its users meet it: outputs, the results file, failures, interrupts, nonsense."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT

pytest.importorskip("rich")
pytest.importorskip("typer")

from sface_kernels import __version__, cli
from sface_kernels.benchmarking import machine, memory, opponents, providers, report, selfcheck
from sface_kernels.benchmarking.contestant import MODES
from sface_kernels.benchmarking.workloads import CLASSES, Shape
from sface_kernels.cli import bench, check
from sface_kernels.dispatch import BACKENDS

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


def test_info_names_every_backend_and_what_auto_takes(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and __version__ in text and "auto" in text
    assert all(backend in text for backend in BACKENDS)


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cpu = found["devices"][0]
    assert cpu["device"] == "cpu" and set(cpu["backends"]) == set(BACKENDS)
    assert cpu["backends"]["reference"]["unavailable"] == dict.fromkeys(cpu["auto"])
    for dtype, chosen in cpu["auto"].items():
        assert cpu["backends"][chosen]["unavailable"][dtype] is None
    if "native" in cpu["backends"]:
        assert "float64" in cpu["backends"]["native"]["unavailable"]["float64"]


def test_check_is_within_budget_here(capsys, tmp_path):
    out = tmp_path / "check.json"
    assert cli.main(["check", "--backends", "chunked,reference", "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "0 over their budget" in text and "chunked" in text and "float64" in text
    rows = json.loads(out.read_text())
    assert all(row["ok"] for row in rows)
    assert {row["problem"] for row in rows} > set(selfcheck.HARD)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16", "float16", "float64"}


def test_check_says_what_is_over_and_exits_1(capsys, monkeypatch):
    def errors(truth, x, w, y, backend, filter_eps):
        found = honest(truth, x, w, y, backend, filter_eps)
        return found._replace(grad_w=math.nan) if backend == "chunked" and len(x) == 257 else found

    honest = selfcheck.package_errors
    monkeypatch.setattr(selfcheck, "package_errors", errors)
    assert cli.main(["check", "--backends", "chunked", "--device", "cpu", "-v"]) == 1
    text = capsys.readouterr().out
    assert "OVER: chunked, float32, filter 2^-24, random 257×331×127" in text and "nan of" in text


def test_check_in_the_interpreter_is_a_process_with_the_variable_set(monkeypatch):
    started = []

    def start(command, env):
        started.append((command, env))
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(check.subprocess, "run", start)
    assert cli.main(["check", "--interpret"]) == 1
    command, environment = started[0]
    assert command[1:4] == ["-m", "sface_kernels", "check"] and command[-4:] == [
        "--backends",
        "triton",
        "--device",
        "cpu",
    ]
    assert environment["TRITON_INTERPRET"] == "1"


def compiled(problem):
    """The module that the Triton backend brings, with one kernel."""
    row = {
        **{"kernel": "screen", "variant": "bf16", "registers": 168, "spills": 0, "shared_bytes": 98304},
        **{"tensor_core_instructions": 4, "problem": problem},
    }
    return types.SimpleNamespace(names=lambda: ["sm_80", "sm_90"], compile_table=lambda target: [row])


@pytest.mark.parametrize("problem, status", [(None, 0), ("spills in the loop", 1)])
def test_check_compiles_for_named_targets(monkeypatch, capsys, problem, status):
    monkeypatch.setitem(sys.modules, check.TARGETS, compiled(problem))
    assert cli.main(["check", "--targets", "sm_80,sm_90"]) == status
    text = capsys.readouterr().out
    assert text.count("screen") == 2 and "168" in text and "98304" in text and (problem or "") in text


def test_check_rejects_an_unknown_target(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, check.TARGETS, compiled(None))
    assert cli.main(["check", "--targets", "sm_80,sm_1"]) == 2
    one_line(capsys, "--targets", "sm_1", "sm_90")


def test_check_without_the_triton_kernels_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, check.TARGETS, None)  # makes its import fail
    assert cli.main(["check", "--targets", "sm_80"]) == 2
    one_line(capsys, "--targets", "cannot be compiled here")


def test_bench_writes_the_documented_schema(tmp_path, capsys):
    status, result = run(tmp_path, "--mode", "all", "--geometry", "trained")
    assert status == 0
    assert set(result) == TOP_KEYS
    assert (result["schema"], result["schema_version"], result["kind"]) == (
        report.SCHEMA,
        report.SCHEMA_VERSION,
        "bench",
    )
    assert result["machine"]["threads"] == 1 and result["versions"]["torch"] == torch.__version__
    assert result["settings"]["repeats"] == 3 and result["settings"]["geometry"] == "trained"
    assert [(row["mode"], row["provider"]) for row in result["rows"]] == list(
        itertools.product(MODES, ("reference", "careful", "chunked", "mm-fp32"))
    )
    documented = (ROOT / "benchmarks" / "README.md").read_text()
    for row in result["rows"]:
        assert set(row) == ROW_KEYS
        assert all(f"`{key}`" in documented for key in row), [key for key in row if f"`{key}`" not in documented]
        assert row["status"] == "ok", row["reason"]
        times = row["time_ms"]
        assert 0 < times["min"] <= times["q1"] <= times["median"] <= times["q3"] <= times["max"]
        assert len(times["samples"]) == times["repeats"] >= 3
        assert row["check"]["classes"] == 60
        assert row["rates"]["tflops"] == pytest.approx(row["work"]["flop"] / times["median"] / 1e9)
    text = capsys.readouterr().out
    assert "chunked" in text and "TFLOP/s" in text and "GFLOP" in text


def test_ratios_are_of_medians(tmp_path):
    _, result = run(tmp_path)
    rows = {row["provider"]: row for row in result["rows"]}
    median = {name: row["time_ms"]["median"] for name, row in rows.items()}
    ratios = rows["chunked"]["ratios"]
    assert ratios["speedup_vs_reference"] == pytest.approx(median["reference"] / median["chunked"])
    assert ratios["time_vs_mm_fp32"] == pytest.approx(median["chunked"] / median["mm-fp32"])
    assert ratios["speedup_vs_careful_compiled"] is ratios["time_vs_mm_bf16"] is None


def test_several_sizes_and_workloads_by_name(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run_case", lambda case, *rest: seen.append(case.shape))
    assert cli.main(["bench", "casia", "4m", "--n", "8,16", "--d", "32"]) == 0
    assert seen == [Shape(n, CLASSES[name], 32) for n in (8, 16) for name in ("casia", "4m")]
    seen.clear()
    assert cli.main(["bench", "--c", "10,1_000"]) == 0
    assert seen == [Shape(128, 10, 512), Shape(128, 1000, 512)]


def test_another_loss_is_labelled_so(tmp_path, capsys):
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    _, result = run(tmp_path, names="linear-cross-entropy,careful")
    assert result["rows"][0]["status"] == "ok" and "another loss" in result["rows"][0]["what"]
    assert "linear-cross-entropy (another loss)" in capsys.readouterr().out


def test_half_embeddings(tmp_path):
    status, result = run(tmp_path, "--dtype", "bfloat16", names="reference,reference-bf16,chunked")
    assert status == 0 and [row["status"] for row in result["rows"]] == ["ok"] * 3
    assert {row["dtype"] for row in result["rows"]} == {"bfloat16"}


@pytest.mark.parametrize("error", [1.01, math.nan], ids=["one percent off", "not finite"])
def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, error):
    fake(monkeypatch, "off", lambda x, w, y: opponents.careful(x, w, y) * error)
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
        return opponents.careful(x, w, y)

    fake(monkeypatch, "breaks", breaks_later)
    exit_status, result = run(tmp_path, names="breaks,careful")
    assert exit_status == 0
    broken, fine = result["rows"]
    assert (broken["status"], broken["time_ms"]) == (status, None)
    assert broken["reason"].endswith(str(error).splitlines()[0])
    assert fine["time_ms"] and f"breaks: {status}" in capsys.readouterr().out


def test_memory_that_runs_out_in_the_probe_is_reported_and_not_tried_here(tmp_path, monkeypatch):
    def measure(provider, case, setting):
        if provider.name == "reference":
            return {"error": "killed, most likely out of memory", "out_of_memory": True}
        return {"peak_extra_bytes": 1, "method": "made up", "mode": "both"}

    monkeypatch.setattr(memory, "measure", measure)
    status, result = run(tmp_path, "--memory", names="reference,careful")
    large, fine = result["rows"]
    assert status == 0 and (large["status"], large["check"]) == ("out of memory", None)
    assert fine["time_ms"] and fine["memory"]["peak_extra_bytes"] == 1


@pytest.mark.parametrize("name, word", [("triton@0", "triton"), ("mm-tf32", "CUDA")])
def test_what_cannot_run_says_why(tmp_path, name, word):
    if (
        name.startswith("triton")
        and "triton" in BACKENDS
        and not selfcheck.unavailable("triton", torch.device("cpu"), torch.float32)
    ):
        pytest.skip("the Triton backend runs on this CPU, in its interpreter")
    _, result = run(tmp_path, names=f"{name},careful")
    row = result["rows"][0]
    assert row["status"] == "unavailable" and word in row["reason"]


def test_an_interrupt_saves_what_was_timed(tmp_path, monkeypatch, capsys):
    calls = itertools.count()

    def interrupted_later(x, w, y):
        if next(calls) == 40:
            raise KeyboardInterrupt
        return opponents.careful(x, w, y)

    fake(monkeypatch, "stopped", interrupted_later)
    status, result = run(tmp_path, "--repeats", "50", names="careful,stopped")
    assert status == 130 and result["interrupted"]
    assert result["rows"][0]["provider"] == "careful" and result["rows"][0]["time_ms"]["repeats"] >= 1
    assert "interrupted: 2 finished rows" in capsys.readouterr().err


def test_ctrl_c_in_a_terminal(tmp_path):
    """A real signal to a real process, in the second of three workloads."""
    out = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "sface_kernels",
        *TINY,
        "--c",
        "60,61,62",
        "--repeats",
        "100000",
        "--budget-seconds",
        "2",
    ]
    command += ["--providers", "careful,chunked", "--out", str(out)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits "ignore"
    )
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
    assert "interrupted" in text and "Traceback" not in text
    result = json.loads(out.read_text())
    assert result["interrupted"] and {row["c"] for row in result["rows"]} >= {60}
    assert all(row["time_ms"] for row in result["rows"])


BAD = [
    (["bench", "nowhere"], ["nowhere", "ms1mv2"]),
    (["bench", "casia", "--c", "5"], ["--c", "casia"]),
    (["bench", "casia", "--suite"], ["--suite"]),
    (["bench", "casia", "casia"], ["twice"]),
    (["bench", "--providers", "nonsense"], ["nonsense", "reference"]),
    (["bench", "--providers", "native@2"], ["native@2"]),
    (["bench", "--providers", "careful,careful"], ["twice"]),
    (["bench", "--n", "0"], ["--n", "'0'"]),
    (["bench", "--d", "512,many"], ["--d", "many"]),
    (["bench", "--geometry", "spiral"], ["--geometry", "spiral"]),
    (["bench", "--density", "0.1"], ["--density"]),
    (["bench", "--geometry", "dense", "--density", "1.5"], ["--density", "1.5"]),
    (["bench", "--mode", "sideways"], ["--mode", "sideways"]),
    (["bench", "--dtype", "float64"], ["--dtype"]),
    (["bench", "--device", "tpu"], ["--device", "tpu"]),
    (["bench", "--device", "cuda:99"], ["cuda:99"]),
    (["bench", "--repeats", "0"], ["--repeats"]),
    (["bench", "--budget-seconds", "-1"], ["--budget-seconds"]),
    (["bench", "--out", "/nonexistent/out.json"], ["--out", "/nonexistent/out.json"]),
    (["bench", "--out", "/"], ["--out"]),
    (["bench", "--frobnicate"], ["--frobnicate"]),
    (["check", "--backends", "abacus"], ["abacus"]),
    (["check", "--device", "cuda:99"], ["cuda:99"]),
    (["check", "--out", "/nonexistent/out.json"], ["--out"]),
    (["plot"], ["files"]),
    (["plot", "/nonexistent.json"], ["/nonexistent.json"]),
    (["dance"], ["dance"]),
    (["--frobnicate"], ["--frobnicate"]),
]


@pytest.mark.parametrize("arguments, words", BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_options_are_one_line_and_exit_2(capsys, monkeypatch, arguments, words):
    def never(*args, **kwargs):
        raise AssertionError("something was run")

    monkeypatch.setattr(bench, "run_case", never)
    monkeypatch.setattr(selfcheck, "run", never)
    assert cli.main(arguments) == 2
    one_line(capsys, *words)


def test_a_check_of_nothing_is_no_success(capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "unavailable", lambda *_: "it is Sunday")
    assert cli.main(["check", "--backends", "chunked", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "chunked is not checked: it is Sunday" in captured.out
    assert captured.err.count("\n") == 1 and "chunked" in captured.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(capsys, tmp_path):
    tmp_path.chmod(0o500)
    assert cli.main(["bench", "--out", str(tmp_path / "out.json")]) == 2
    one_line(capsys, "--out", str(tmp_path))


def test_a_rejected_run_leaves_the_old_result(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("old")
    assert cli.main(["bench", "--out", str(out), "--n", "0"]) == 2
    assert out.read_text() == "old"


def test_huge_pages_restart_the_process_once(monkeypatch):
    started = []

    def execve(path, command, environment):
        started.append((command, environment))
        raise KeyboardInterrupt  # stands for the end of this process

    monkeypatch.delenv(bench.THP_VARIABLE, raising=False)
    monkeypatch.setattr(bench.os, "execve", execve)
    cli.main([*TINY, "--thp"])
    command, environment = started[0]
    assert command[1:] == ["-m", "sface_kernels", *TINY, "--thp"]
    assert environment[bench.THP_VARIABLE] == "1"


def test_without_the_extra_one_line_says_what_to_install():
    code = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "typer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from sface_kernels.cli import main
sys.exit(main(["info"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "typer" in done.stderr and "pip install 'sface-kernels[cli]'" in done.stderr


@pytest.mark.parametrize("module", ["sface_kernels", "benchmarks.bench_loss"])
def test_help_from_a_shell(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bench" in done.stdout and "Traceback" not in done.stderr
