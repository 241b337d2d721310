"""What the benchmarks measure with: workloads, float64 results, opponents, the check, interleaved timing, memory."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from benchmarks import accuracy, density, tables
from sface_kernels import sface_loss
from sface_kernels.benchmarking import machine, memory, opponents, providers, report, selfcheck, timing, work
from sface_kernels.benchmarking.checking import Checker, reduced
from sface_kernels.benchmarking.contestant import MODES, enter
from sface_kernels.benchmarking.truth import compute_truth, measure_errors
from sface_kernels.benchmarking.workloads import (
    FAST_EPS,
    SUITE,
    Case,
    Shape,
    active_cosine,
    make_workload,
)


def test_opponents_alone_get_bf16_products():
    work = make_workload(Case(Shape(4, 30, 16)))
    for name, expected in (("careful", "medium"), ("mm-fp32", "medium"), ("chunked", "highest")):
        assert enter(providers.resolve(name), work, "both", True).precision == expected


def test_peak_memory_of_a_process_of_its_own():
    # 4·N·C bytes = 8 MB: the reference makes 21 such tensors and holds 9 at its peak. What the allocator keeps of the
    # others varies from process to process (8 to 15 in all were seen), so the middle of three.
    case, setting = Case(Shape(100, 20_000, 8)), memory.Setting(threads=1)
    found = [memory.measure(providers.resolve("reference"), case, setting) for _ in range(3)]
    assert all(measured.get("error") is None for measured in found)
    if found[0]["method"].startswith("VmHWM"):
        assert 5 * 8e6 < sorted(measured["peak_extra_bytes"] for measured in found)[1] < 21 * 8e6


def test_a_killed_process_counts_as_out_of_memory(monkeypatch):
    class Done:
        returncode, stdout, stderr = memory.KILLED, "", ""

    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: Done)
    found = memory.measure(providers.resolve("reference"), Case(Shape(4, 30, 16)), memory.Setting(threads=1))
    assert found["out_of_memory"]


def test_memory_that_ran_out_in_the_process_is_told_from_other_failures(monkeypatch):
    case, setting = Case(Shape(4, 30, 16)), memory.Setting(threads=1)
    for error, expected in ((RuntimeError("can't allocate memory: you tried"), True), (RuntimeError("broken"), False)):
        monkeypatch.setattr(memory, "_measure_here", lambda *args, error=error: (_ for _ in ()).throw(error))
        described = {"provider": "careful", "case": [list(case.shape), *case[1:]], "setting": list(setting)}
        status = memory.main([json.dumps(described)])
        assert (status == memory.OUT_OF_MEMORY) == expected and status != 0
    assert timing.out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and timing.out_of_memory(MemoryError())


class Recorder(timing.Timed):
    """A contestant on a made-up clock, that notes which inputs each run had and whether its turn had ended."""

    def __init__(self, copies=3, fails_at=None):
        self.rotates, self.rests = copies > 1, copies > 1
        self.turns, self.at, self.seen, self.fails_at = itertools.cycle(range(copies)), 0, [], fails_at

    def prepare(self):
        self.at = self.at if self.hot else next(self.turns)

    def run(self):
        if len(self.seen) == self.fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.seen.append((self.at, self.hot))

    def rest(self):
        self.seen.append("rest")


def test_inputs_rotate_and_hot_runs_stand_beside():
    """As on a GPU, with a clock of its own: cold runs never have the inputs of the run before, hot ones always do."""
    one = Recorder()

    def clock(run):
        run()
        return 0.001 if one.hot else 0.002

    samples = timing.interleave({"one": one}, repeats=4, budget_seconds=60, clock=clock)
    assert set(samples.seconds["one"]) == {0.002} and set(samples.hot["one"]) == {0.001}
    for before, after in itertools.pairwise(one.seen):
        if "rest" in (before, after) or before[1] != after[1]:
            continue
        assert (before[0] == after[0]) == after[1]
    assert one.seen.count("rest") == 1 + 4  # after the warm-up and after every turn


def test_memory_that_runs_out_while_timing_leaves_the_others():
    def clock(run):
        run()
        return 0.001

    contestants = {"large": Recorder(fails_at=20), "small": Recorder()}
    samples = timing.interleave(contestants, repeats=5, budget_seconds=60, clock=clock)
    assert timing.out_of_memory(samples.failures["large"]) and list(samples.failures) == ["large"]
    assert len(samples.seconds["small"]) == 5 * timing.MAX_VISIT


def test_contestants_rotate_their_own_copies():
    data = make_workload(Case(Shape(4, 30, 16), "trained"))
    for name in ("careful", "mm-fp32"):
        one = enter(providers.resolve(name), data, "both", copies=2)
        seen = []
        for hot in (False, False, True, False):
            one.hot = hot
            one.prepare()
            one.run()
            seen.append(one.now[1] if name == "mm-fp32" else one.now.w)
        pointers = [w.data_ptr() for w in seen]
        assert pointers[0] != pointers[1] == pointers[2] != pointers[3] == pointers[0]
        assert all(torch.equal(w, data.w) for w in seen)


@pytest.mark.parametrize("mode", MODES)
def test_work_is_counted_as_stated(mode):
    n, c, d = 3, 50, 8
    loss = work.count(providers.resolve("native"), Shape(n, c, d), mode, torch.bfloat16)
    product = work.count(providers.resolve("mm-bf16"), Shape(n, c, d), mode, torch.bfloat16)
    ncd, inputs = n * c * d, 2 * n * d + 4 * c * d
    assert loss.flop == {"forward": 2, "backward": 4, "both": 6, "step": 6}[mode] * ncd
    assert loss.bytes == inputs * (1 if mode in ("forward", "backward") else 2) + 20 * c * d * (mode == "step")
    assert product == (2 * ncd, 2 * (n * d + c * d + n * c))
    bare = [work.count(providers.resolve(name), Shape(n, c, d), mode, torch.float32) for name in ("read-w", "write-w")]
    assert bare == [(c * d, 4 * (c * d + c)), (0, 4 * c * d)]
    assert work.rates(work.Work(10**12, 10**9), 500.0) == {"tflops": 2.0, "gb_per_s": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_provider_that_runs_here_passes_the_check(dtype):
    data = make_workload(Case(Shape(16, 300, 64), "trained"), dtype=dtype)
    checker = Checker(data)
    checked = []
    for provider in providers.PROVIDERS.values():
        if provider.compiled:  # the same arithmetic, and minutes of compiling
            continue
        try:
            function = providers.build(provider, torch.device("cpu"), dtype)
        except providers.Unavailable as reason:
            assert str(reason)
            continue
        found = checker.check(provider, function)
        assert found["ok"], (provider.name, found)
        checked.append(provider.name)
    assert {"reference", "careful-bf16", "chunked", "mm-fp32", "mm-bf16", "read-w", "write-w"} <= set(checked)


@pytest.mark.parametrize("wrong", ["loss", "grad_x", "grad_w"])
def test_the_check_sees_an_error_of_a_ten_thousandth(monkeypatch, wrong):
    """The budget has teeth: each result in turn is off by 1e-4 in a backend that is right otherwise."""

    def errors(truth, x, w, y, backend, filter_eps):
        found = honest(truth, x, w, y, backend, filter_eps)
        return found._replace(**{wrong: 1e-4}) if backend == "chunked" else found

    honest = selfcheck.package_errors
    monkeypatch.setattr(selfcheck, "package_errors", errors)
    outcomes = list(selfcheck.run(["chunked", "reference"], torch.device("cpu"), torch.float32))
    chunked, others = ([o for o in outcomes if (o.backend == "chunked") == own] for own in (True, False))
    assert all(outcome.ok for outcome in others)
    seen = [outcome for outcome in chunked if not outcome.ok]
    assert len(seen) > 0.8 * len(chunked), f"{len(seen)} of {len(chunked)}"


def test_products_of_half_embeddings_have_the_budget_of_autocast(monkeypatch):
    """A backend that multiplies half embeddings as they are may err as the reference under autocast does, with ignored
    rows too, and no more; in float32 nothing changes."""
    monkeypatch.setattr(selfcheck, "HALF_PRODUCTS", ("chunked",))
    strict = {o.problem: o for o in selfcheck.run(["chunked"], torch.device("cpu"), torch.float32)}
    wide = {o.problem: o for o in selfcheck.run(["chunked"], torch.device("cpu"), torch.bfloat16)}
    for name in ("random 31×101×61", "half the rows ignored"):
        assert strict[name].limits.grad_w < 1e-4 and 1e-3 < wide[name].limits.grad_w < 1
    assert all(outcome.ok for outcome in wide.values())


def test_a_failing_backend_is_over_its_budget(monkeypatch):
    def errors(truth, x, w, y, backend, filter_eps):
        if backend == "chunked":
            raise RuntimeError("no such luck")
        return honest(truth, x, w, y, backend, filter_eps)

    honest = selfcheck.package_errors
    monkeypatch.setattr(selfcheck, "package_errors", errors)
    outcomes = list(selfcheck.run(["chunked"], torch.device("cpu"), torch.float32))
    assert outcomes and not any(outcome.ok for outcome in outcomes)
    assert outcomes[0].failure == "RuntimeError: no such luck" and outcomes[0].as_json()["errors"] is None


def test_small_problems_are_small():
    for problem in selfcheck.problems(torch.device("cpu"), torch.float32, small=True):
        assert len(problem.x) <= selfcheck.SMALL.n and problem.w.numel() <= selfcheck.SMALL.c * selfcheck.SMALL.d


def test_a_report_has_no_number_that_json_lacks(tmp_path):
    path = tmp_path / "report.json"
    report.save({"rows": [{"errors": {"loss": math.nan, "grad_x": math.inf, "grad_w": 1.0}}]}, path)
    assert json.loads(path.read_text())["rows"][0]["errors"] == {"loss": None, "grad_x": None, "grad_w": 1.0}


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
    class Slow(timing.Timed):
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
    work = make_workload(Case(Shape(32, 1000, 64), "dense", 0.05))
    _, stats = sface_loss(work.x, work.w, work.y, filter_eps=FAST_EPS, backend="chunked", return_stats=True)
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
    monkeypatch.setattr("sface_kernels.benchmarking.checking.FULL_CHECK_LIMIT", 8 * 16 * 100)
    work = make_workload(Case(Shape(8, 1000, 16), "trained"))
    part = reduced(work)
    assert 50 < part.case.shape.c < 120 and len(part.w) == part.case.shape.c
    assert torch.equal(part.w[part.y], work.w[work.y])
    found = Checker(work).check(providers.resolve("careful"))
    assert found["ok"] and found["classes"] == part.case.shape.c


def test_density_sweep_writes_json(tmp_path):
    out = tmp_path / "density.json"
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
    assert density.main([*arguments, *names, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    ends = ["chunked@2^-16", "reference"]
    assert [row["provider"] for row in rows] == [*ends, "chunked@2^-16", *ends]
    assert all(row["ratios"]["speedup_vs_reference"] > 0 for row in rows)


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


def write_result(path, **changes):
    """A results file of one row, as `bench` writes it."""
    row = {
        **{
            "workload": "N=8 C=60 D=16 random",
            "n": 8,
            "c": 60,
            "d": 16,
            "geometry": "random",
            "density_requested": None,
        },
        **{"density": 0.5, "device": "cpu", "dtype": "float32", "mode": "both", "provider": "native"},
        **{"hot_ms": None, "rates": {"tflops": 0.5, "gb_per_s": 3.25}, "memory": {"peak_extra_bytes": 3 << 20}},
        **{"time_ms": {"median": 1234.5, "q1": 12.34, "q3": 1.234}, "other_busy_cores": 0.0},
        "ratios": {"speedup_vs_reference": 24.06, "time_vs_mm_fp32": None},
    }
    result = {
        **{
            "schema": report.SCHEMA,
            "schema_version": report.SCHEMA_VERSION,
            "kind": "bench",
            "commit": "0" * 40 + "-dirty",
        },
        **{"date": "2030-01-02T03:04:05+00:00", "versions": {"torch": "9.9"}},
        **{"machine": {"cpu": "Abacus", "isa": ["avx2"], "threads": 2, "gpu": None}, "rows": [{**row, **changes}]},
    }
    path.write_text(json.dumps(result))


def test_commit_is_dirty_where_code_differs_and_not_where_results_do(tmp_path):
    def git(*command):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    code, results, page = (
        tmp_path / "package" / "code.py",
        tmp_path / "benchmarks" / "results" / "r.json",
        tmp_path / "a.md",
    )
    for path in (code, results, page):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    head = git("rev-parse", "HEAD").strip()
    assert machine.commit(code.parent) == head
    results.write_text("new")
    page.write_text("new")
    assert machine.commit(code.parent) == head
    code.write_text("new")
    assert machine.commit(code.parent) == head + "-dirty"


def test_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit(tmp_path) is None


def test_tables_are_written_from_the_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    write_result(tmp_path / "r.json")
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- table: r.json mode=both providers=native -->\nold figures\n<!-- end -->\nafter\n")
    assert tables.main([str(document), "--check"]) == 1 and "old figures" in document.read_text()
    assert tables.main([str(document)]) == 0
    text = document.read_text()
    assert "| native | 1234 | 12.3–1.23 | 24.1 | 3 | 0.50 | 3.2 |" in text and "old figures" not in text
    assert "Abacus, AVX2, 2 threads; torch 9.9; 2030-01-02, commit 0000000000-dirty." in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert tables.main([str(document), "--check"]) == 0
    write_result(tmp_path / "r.json", other_busy_cores=0.9)
    assert tables.main([str(document)]) == 0 and "used up to 0.9 cores" in document.read_text()
    (tmp_path / "r.json").unlink()
    with pytest.raises(SystemExit) as stop:
        tables.main([str(document)])
    assert stop.value.code == 2 and "r.json" in capsys.readouterr().err


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_the_documents_say_what_the_results_say(document):
    text = (ROOT / document).read_text()
    assert "<!-- table:" in text and tables.rewrite(text) == text, (
        "python -m benchmarks.tables README.md docs/performance.md"
    )


def test_every_picture_in_the_documents_is_there():
    for document in ("README.md", "docs/performance.md"):
        path = ROOT / document
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text())
        assert pictures and all((path.parent / picture).is_file() for picture in pictures), pictures


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_can_be_read(path):
    result = report.load(path)
    assert result["rows"] and result["commit"] and result["machine"]["cpu"] and not result["interrupted"]
