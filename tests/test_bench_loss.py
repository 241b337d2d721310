"""The benchmark commands at tiny sizes: the check before timing, failures, interrupts, options, workloads."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import accuracy, bench_loss, density, memory, opponents, providers, report, timing
from benchmarks.checking import Checker, reduced
from benchmarks.truth import compute_truth, measure_errors
from benchmarks.workloads import FAST_EPS, SUITE, Case, Shape, active_cosine, make_workload

TINY = ["--n", "8", "--c", "60", "--d", "16", "--threads", "1", "--repeats", "3", "--no-memory"]
TOP_KEYS = {
    *("schema", "schema_version", "kind", "date", "commit", "machine", "versions", "environment", "settings"),
    *("idle", "interrupted", "rows"),
}
ROW_KEYS = {
    *(
        "workload",
        "n",
        "c",
        "d",
        "geometry",
        "seed",
        "density_requested",
        "density",
        "mode",
        "provider",
        "what",
    ),
    *("status", "reason", "check", "time_ms", "memory", "ratios", "other_busy_cores"),
}


def run(tmp_path, *arguments, names="reference,careful,chunked,mm-fp32"):
    out = tmp_path / "out.json"
    status = bench_loss.main([*TINY, "--providers", names, "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def fake(monkeypatch, name, function):
    """A provider that exists for one test."""
    monkeypatch.setitem(providers.PROVIDERS, name, providers.Provider(name, "fake", lambda: function))


def test_writes_the_documented_schema(tmp_path, capsys):
    status, result = run(tmp_path, "--mode", "all", "--geometry", "trained")
    assert status == 0
    assert set(result) == TOP_KEYS
    assert (result["schema"], result["schema_version"]) == (report.SCHEMA, report.SCHEMA_VERSION)
    assert result["machine"]["threads"] == 1 and result["versions"]["torch"] == torch.__version__
    assert [(row["mode"], row["provider"]) for row in result["rows"]] == list(
        itertools.product(providers.MODES, ("reference", "careful", "chunked", "mm-fp32"))
    )
    for row in result["rows"]:
        assert set(row) == ROW_KEYS
        assert row["status"] == "ok", row["reason"]
        time = row["time_ms"]
        assert 0 < time["min"] <= time["q1"] <= time["median"] <= time["q3"] <= time["max"]
        assert len(time["samples"]) == time["repeats"] >= 3
        assert row["check"]["classes"] == 60
    assert "chunked" in capsys.readouterr().out


def test_ratios_are_of_medians(tmp_path):
    _, result = run(tmp_path)
    rows = {row["provider"]: row for row in result["rows"]}
    median = {name: row["time_ms"]["median"] for name, row in rows.items()}
    ratios = rows["chunked"]["ratios"]
    assert ratios["speedup_vs_reference"] == pytest.approx(median["reference"] / median["chunked"])
    assert ratios["time_vs_mm_fp32"] == pytest.approx(median["chunked"] / median["mm-fp32"])
    assert ratios["speedup_vs_careful_compiled"] is None


@pytest.mark.parametrize("error", [1.01, math.nan], ids=["one percent off", "not finite"])
def test_a_wrong_provider_is_not_timed(tmp_path, monkeypatch, error):
    fake(monkeypatch, "off", lambda x, w, y: opponents.careful(x, w, y) * error)
    status, result = run(tmp_path, names="off,careful")
    wrong, right = result["rows"]
    assert status == 1
    assert (wrong["status"], wrong["time_ms"], wrong["check"]["ok"]) == ("wrong", None, False)
    assert right["status"] == "ok" and right["time_ms"]


def test_a_failing_provider_does_not_stop_the_others(tmp_path, monkeypatch):
    calls = itertools.count()

    def breaks_later(x, w, y):
        if next(calls) > 2:
            raise RuntimeError("out of luck\nsecond line")
        return opponents.careful(x, w, y)

    fake(monkeypatch, "breaks", breaks_later)
    status, result = run(tmp_path, names="breaks,careful")
    assert status == 0
    assert (result["rows"][0]["status"], result["rows"][0]["time_ms"]) == ("failed", None)
    assert result["rows"][0]["reason"] == "RuntimeError: out of luck"
    assert result["rows"][1]["time_ms"]


def test_an_unavailable_backend_says_why(tmp_path, monkeypatch):
    def make():
        raise providers.Unavailable("no such thing here")

    monkeypatch.setitem(providers.PROVIDERS, "absent", providers.Provider("absent", "fake", make))
    _, result = run(tmp_path, names="absent,careful")
    assert (result["rows"][0]["status"], result["rows"][0]["reason"]) == ("unavailable", "no such thing here")


def test_an_interrupt_saves_what_was_timed(tmp_path, monkeypatch):
    calls = itertools.count()

    def interrupted_later(x, w, y):
        if next(calls) == 40:
            raise KeyboardInterrupt
        return opponents.careful(x, w, y)

    fake(monkeypatch, "stopped", interrupted_later)
    status, result = run(tmp_path, "--repeats", "50", names="careful,stopped")
    assert status == 130 and result["interrupted"]
    assert result["rows"][0]["provider"] == "careful" and result["rows"][0]["time_ms"]["repeats"] >= 1


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--providers", "nonsense"], "nonsense"),
        (["--providers", "native@2"], "native@2"),
        (["--providers", "careful,careful"], "once"),
        (["--n", "0"], "--n"),
        (["--geometry", "spiral"], "--geometry"),
        (["--density", "0.1"], "--density"),
        (["--geometry", "dense", "--density", "1.5"], "--density"),
        (["--out", "/nonexistent/out.json"], "/nonexistent/out.json"),
        (["--out", "/"], "--out"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line_and_exit_2(capsys, arguments, word):
    with pytest.raises(SystemExit) as stop:
        bench_loss.main([*TINY, *arguments])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and word in text


def test_a_rejected_run_leaves_the_old_result(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("old")
    with pytest.raises(SystemExit):
        bench_loss.main(["--out", str(out), "--n", "0"])
    assert out.read_text() == "old"


def test_huge_pages_restart_the_process_once(monkeypatch):
    started = []

    def execve(path, command, environment):
        started.append((command, environment))
        raise SystemExit(0)

    monkeypatch.delenv(bench_loss.THP_VARIABLE, raising=False)
    monkeypatch.setattr(bench_loss.os, "execve", execve)
    with pytest.raises(SystemExit):
        bench_loss.main([*TINY, "--thp"])
    command, environment = started[0]
    assert command[1:3] == ["-m", "benchmarks.bench_loss"] and "--thp" in command
    assert environment[bench_loss.THP_VARIABLE] == "1"


def test_opponents_alone_get_bf16_products():
    work = make_workload(Case(Shape(4, 30, 16)))
    for name, expected in (("careful", "medium"), ("mm-fp32", "medium"), ("chunked", "highest")):
        assert providers.Contestant(providers.resolve(name), work, "both", True).precision == expected


def test_peak_memory_of_a_process_of_its_own():
    # 4·N·C bytes = 8 MB: the reference holds several such tensors, and 9 at its peak
    found = memory.measure(providers.resolve("reference"), Case(Shape(100, 20_000, 8)), threads=1)
    assert found.get("error") is None
    if found["method"].startswith("VmHWM"):
        assert 5 * 8e6 < found["peak_extra_bytes"] < 16 * 8e6


def test_a_killed_process_counts_as_out_of_memory(monkeypatch):
    class Done:
        returncode, stdout, stderr = memory.KILLED, "", ""

    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: Done)
    found = memory.measure(providers.resolve("reference"), Case(Shape(4, 30, 16)), threads=1)
    assert found["out_of_memory"]


def test_orders_are_balanced():
    names = ["a", "b", "c", "d"]
    rounds = list(itertools.islice(timing.balanced_orders(names), 8))
    assert all(sorted(order) == names for order in rounds)
    for name in names:
        assert len({order.index(name) for order in rounds}) >= 2
    followers = {(left, right) for order in rounds for left, right in itertools.pairwise(order)}
    assert len(followers) >= 8  # of 12 possible: nobody always comes after the same one


def test_summary_in_milliseconds():
    summary = timing.summarise([0.004, 0.001, 0.002, 0.003, 0.005])
    assert [summary[key] for key in ("min", "q1", "median", "q3", "max")] == pytest.approx([1, 2, 3, 4, 5])
    assert timing.summarise([0.002])["median"] == pytest.approx(2)


def test_the_budget_ends_the_rounds():
    class Slow:
        def prepare(self):
            pass

        def run(self):
            timing.time.sleep(0.06)

    samples = timing.interleave({"slow": Slow()}, repeats=100, budget_seconds=0.1)
    assert len(samples.seconds["slow"]) == timing.MIN_ROUNDS


@pytest.mark.parametrize("geometry", ["random", "trained", "dense"])
def test_workloads_are_deterministic_by_seed(geometry):
    case = Case(Shape(16, 200, 32), geometry, seed=3)
    first, again, other = make_workload(case), make_workload(case), make_workload(case._replace(seed=4))
    assert all(torch.equal(a, b) for a, b in zip(first[1:4], again[1:4], strict=True))
    assert not torch.equal(first.x, other.x) and not torch.equal(first.w, other.w)
    assert first.x.abs().min(dim=1).values.count_nonzero() == 16


@pytest.mark.parametrize("share", [1e-3, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("d", [64, 256])
def test_requested_density_is_reached(share, d):
    work = make_workload(Case(Shape(64, 3000, d), "dense", share))
    assert work.density == pytest.approx(share, rel=0.02)
    cos = F.normalize(work.x) @ F.normalize(work.w).t()
    active = cos >= active_cosine(FAST_EPS)
    assert active.float().mean() == pytest.approx(share, rel=0.1)  # the targets counted as well
    if share >= 0.05:  # scattered: every hundred classes have some
        assert active.any(0).view(30, 100).any(1).all()


def test_density_is_what_a_backend_counts():
    sface_kernels = pytest.importorskip("sface_kernels")
    work = make_workload(Case(Shape(32, 1000, 64), "dense", 0.05))
    _, stats = sface_kernels.sface_loss(
        work.x, work.w, work.y, filter_eps=FAST_EPS, backend="chunked", return_stats=True
    )
    assert int(stats.active_pairs) == pytest.approx(work.density * 32 * 999, abs=2)  # ties of rounding


def test_trained_geometry_is_like_a_trained_head():
    work = make_workload(Case(Shape(64, 4000, 512), "trained"))
    cos = F.normalize(work.x) @ F.normalize(work.w).t()
    positives = cos[torch.arange(64), work.y]
    assert positives.mean() == pytest.approx(0.70, abs=0.03) and 0.03 < positives.std() < 0.09
    assert cos.std() == pytest.approx(0.062, abs=0.004)
    assert 5e-4 < work.density < 2.5e-3


def test_suite_is_the_one_announced():
    assert {case.shape for case in SUITE} == {Shape(128, 85_742, 512), Shape(512, 10_575, 512)}
    assert any(case.density == 0.05 for case in SUITE)


@pytest.mark.parametrize("shape", [Shape(8, 60, 16), Shape(33, 701, 96)])
@pytest.mark.parametrize("function", [opponents.reference, opponents.careful])
def test_opponents_agree_with_float64(function, shape):
    work = make_workload(Case(shape, "trained"))
    truth = compute_truth(work.x, work.w, work.y)
    for dtype, limit in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        x, w = (t.to(dtype, copy=True).requires_grad_() for t in (work.x, work.w))
        loss = function(x, w, work.y)
        loss = loss.loss if isinstance(loss, tuple) else loss
        loss.backward()
        errors = measure_errors(truth, loss.detach(), x.grad, w.grad)
        assert max(errors) < limit, (dtype, errors)


def test_the_filtered_float64_result_is_the_autograd_of_kept_entries():
    work = make_workload(Case(Shape(8, 200, 16), "trained"))
    x, w = (t.double().requires_grad_() for t in (work.x, work.w))
    cos = F.normalize(x) @ F.normalize(w).t()
    own = F.one_hot(work.y, 200).bool()
    with torch.no_grad():
        p, q = (64 * torch.sigmoid(v) for v in (80 * (cos.acos() - 0.80), -80 * (cos.acos() - 1.23)))
        coef = torch.where(own, -p, torch.where(q < FAST_EPS * 64, 0, q))
    loss = (coef * cos).sum(1).mean()
    loss.backward()
    filtered = compute_truth(work.x, work.w, work.y, FAST_EPS)
    errors = measure_errors(filtered, torch.tensor(filtered.loss, dtype=torch.float64), x.grad, w.grad)
    assert max(errors) < 1e-12
    exact = compute_truth(work.x, work.w, work.y)
    assert filtered.loss == exact.loss and not torch.equal(filtered.grad_x, exact.grad_x)


def test_reference_returns_the_six_published_values():
    work = make_workload(Case(Shape(8, 60, 16), "trained"))
    outputs = opponents.reference(work.x, work.w, work.y)
    cos = F.normalize(work.x) @ F.normalize(work.w).t()
    own = cos[torch.arange(8), work.y]
    assert torch.allclose(outputs.logits, 64 * cos, atol=1e-4)
    assert torch.allclose(outputs.loss, outputs.intra + outputs.inter)
    assert torch.allclose(outputs.cos_target, own.mean())
    assert torch.allclose(outputs.cos_other, (cos.sum() - own.sum()) / cos.numel(), atol=1e-6)


def test_large_workloads_are_checked_on_fewer_classes(monkeypatch):
    monkeypatch.setattr("benchmarks.checking.FULL_CHECK_LIMIT", 8 * 16 * 100)
    work = make_workload(Case(Shape(8, 1000, 16), "trained"))
    part = reduced(work)
    assert 50 < part.case.shape.c < 120 and len(part.w) == part.case.shape.c
    assert torch.equal(part.w[part.y], work.w[work.y])
    found = Checker(work).check(providers.resolve("careful"))
    assert found["ok"] and found["classes"] == part.case.shape.c


def test_density_sweep_writes_json_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "density.json", tmp_path / "density.png"
    arguments = [
        "--n",
        "8",
        "--c",
        "200",
        "--d",
        "32",
        "--threads",
        "1",
        "--repeats",
        "3",
        "--densities",
        "0.01,0.1,1",
    ]
    names = ["--providers", "chunked@2^-16,reference"]
    assert density.main([*arguments, *names, "--out", str(out), "--plot", str(plot)]) == 0
    rows = json.loads(out.read_text())["rows"]
    ends = ["chunked@2^-16", "reference"]
    assert [row["provider"] for row in rows] == [*ends, "chunked@2^-16", *ends]
    assert all(row["ratios"]["speedup_vs_reference"] > 0 for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_accuracy_marks_the_filters_within_the_rule(tmp_path, capsys):
    out = tmp_path / "accuracy.json"
    arguments = ["--n", "16", "--c", "300", "--d", "64", "--threads", "1", "--dtypes", "float32,bfloat16"]
    assert accuracy.main([*arguments, "--backend", "chunked", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * len(accuracy.FILTERS)
    for row in rows:
        assert row["errors"] is not None, row["reason"]
        if row["dtype"] == "float32":
            assert row["within_rule"] or row["filter_eps"] > 2.0**-24
            assert not row["within_rule"] or row["filter_eps"] < 2.0**-12
    assert "| trained | 64 | 300 |" in capsys.readouterr().out


def test_accuracy_rejects_an_unknown_backend(capsys):
    with pytest.raises(SystemExit) as stop:
        accuracy.main(["--backend", "nonsense"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
