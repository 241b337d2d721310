"""From a measurement to the documents: the files, the commit they name, tables and pictures."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

import typer
from typer.testing import CliRunner

from benchmarks import accuracy, gpu_model, tables
from sface_kernels import cli
from sface_kernels.bench import machine, plots, providers, report
from tests.support.cases import ROOT
from tests.support.command import one_line

PROVIDERS = {"reference": 100.0, "careful-compiled": 50.0, "native@2^-16": 4.0, "mm-fp32": 10.0}  # ms at 10^6 pairs


def bench_row(n, c, provider, **changes):
    median = PROVIDERS[provider] * n * c / 1e6
    return {
        **{"workload": f"N={n} C={c} D=512 random", "n": n, "c": c, "d": 512, "geometry": "random", "mode": "both"},
        **{"density_requested": None, "density": 1e-6, "device": "cpu", "dtype": "float32", "provider": provider},
        **{"time_ms": {"median": median, "q1": 0.9 * median, "q3": 1.2 * median}, "other_busy_cores": 0.0},
        **{"memory": {"peak_extra_bytes": 3 << 20}, "rates": {"tflops": 0.5, "gb_per_s": 3.25}},
        "ratios": {"speedup_vs_reference": PROVIDERS["reference"] / PROVIDERS[provider], "time_vs_mm_fp32": None},
        **changes,
    }


def error_row(c, filter_eps):
    errors = {"loss": 1e-7, "grad_x": 1e-6 + filter_eps, "grad_w": 2e-6 + filter_eps}
    return {
        **{"geometry": "trained", "n": 128, "c": c, "d": 512, "backend": "native", "dtype": "float32"},
        **{"filter_eps": filter_eps, "errors": errors, "reference": dict.fromkeys(errors, 1e-6)},
    }


def result(rows, kind="bench"):
    return {
        **{**report.FORMAT, "kind": kind, "rows": rows},
        **{"machine": {"cpu": "Abacus", "isa": ["avx2"], "threads": 2, "gpu": None}, "versions": {"torch": "9.9"}},
        **{"commit": "0" * 40 + "-dirty", "date": "2030-01-02T03:04:05+00:00"},
    }


BY_CLASSES = result([bench_row(128, c, p) for c, p in itertools.product((1000, 85_742), PROVIDERS)])
BY_SAMPLES = result([bench_row(n, 1000, p) for n, p in itertools.product((8, 128), PROVIDERS)])
BY_DENSITY = result(
    [
        bench_row(128, 1000, p, density=d, density_requested=d)
        for d in (1e-5, 1e-2)
        for p in ("native@2^-16", "reference")
    ]
)
BY_FILTER = result([error_row(c, eps) for c in (1000, 85_742) for eps in (2.0**-8, 2.0**-24, 0.0)], "accuracy")


def plot(tmp_path, *options, results):
    paths = [tmp_path / f"{number}.json" for number in range(len(results))]
    for path, content in zip(paths, results, strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return cli.main(["plot", *map(str, paths), "--out", str(tmp_path / "new" / "folder"), *options])


@pytest.mark.parametrize(
    "results, options, names",
    [
        ([BY_CLASSES], "--prefix cpu-", "cpu-time_vs_classes cpu-memory_vs_classes cpu-ratio"),
        ([BY_SAMPLES], "--only time,ratio", "time_vs_samples ratio"),
        ([BY_DENSITY], "", "density"),
        ([BY_FILTER, BY_CLASSES], "--only error,ratio", "error_vs_filter_float32 ratio"),
        ([result([row | {"mode": "step"} for row in BY_CLASSES["rows"]])], "--only ratio", "ratio"),
    ],
    ids=["classes", "samples", "density", "two files", "the only mode"],
)
def test_png_and_svg_of_what_the_files_hold(tmp_path, capsys, results, options, names):
    assert plot(tmp_path, *options.split(), results=results) == 0
    drawn = sorted((tmp_path / "new" / "folder").iterdir())
    assert {path.name for path in drawn} == {f"{name}.{end}" for name in names.split() for end in ("png", "svg")}
    assert sorted(capsys.readouterr().out.splitlines()) == list(map(str, drawn))
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in content


def test_axes_say_what_is_on_them_and_the_floor_is_drawn():
    def legend(axes):
        return {text.get_text() for text in axes.get_legend().get_texts()}

    figures = plots.draw([BY_CLASSES, BY_FILTER], "both")
    time, memory = (figures[f"{name}_vs_classes"].axes[0] for name in ("time", "memory"))
    for axes in (time, memory):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log") and axes.get_xlabel() == "classes, C"
        assert "Abacus, AVX2, 2 threads" in axes.get_title() and "others" not in axes.get_title()
    assert "ms" in time.get_ylabel() and "MiB" in memory.get_ylabel()
    assert legend(time) == {"reference", "careful-compiled", "native@2^-16", "floor: ONE fp32 product"}
    assert "∂w itself, returned" in legend(memory)
    (line,) = (line for line in time.get_lines() if line.get_label() == "reference")
    assert line.get_ydata() == pytest.approx([12.8, 1097.4976])
    noisy = result([{**row, "other_busy_cores": 0.9} for row in BY_SAMPLES["rows"]])
    samples = plots.draw([noisy], "both")["time_vs_samples"].axes[0]
    assert samples.get_xlabel() == "samples, N" and "others used up to 0.9 cores" in samples.get_title()
    assert "reference, at any share" in legend(plots.draw([BY_DENSITY], "both")["density"].axes[0])
    assert {"∂x, C=1,000", "∂w, C=85,742"} <= legend(figures["error_vs_filter_float32"].axes[0])
    bars: Any = figures["ratio"].axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([1, 2, 25, 10])


def test_whole_steps_tell_apart():
    styles = [plots._style(name) for name in providers.STEPS]
    looks = [(style["color"], style["linestyle"], style["marker"]) for style in styles]
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize(
    "content, options, word",
    [
        ("not json", "", "not a JSON file"),
        ("[1, 2]", "", "schema"),
        ("[" * 100_000, "", "not a JSON file"),
        ('{"schema": "somebody else"}', "", "somebody else"),
        (BY_CLASSES | {"rows": None}, "", "'rows'"),
        (BY_CLASSES | {"machine": "Abacus"}, "", "'machine'"),
        (result([bench_row(128, 1000, "reference") | {"c": "many"}]), "", "another kind"),
        (BY_CLASSES | {"schema_version": 1}, "", "'schema_version': 1"),
        (BY_CLASSES | {"kind": "poem"}, "", "poem"),
        (result([]), "", "nothing to draw"),
        (result([{"mode": "both"}]), "", "lacks the key"),
        (BY_CLASSES, "--formats jpg", "--formats"),
        (BY_CLASSES, "--only poem", "nothing to draw"),
        (BY_CLASSES, "--mode sideways", "--mode"),
        (BY_CLASSES, "--mode step", "nothing to draw"),
        (BY_CLASSES, "--out /dev/null/plots", "/dev/null/plots"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path, capsys, content, options, word):
    assert plot(tmp_path, *options.split(), results=[content]) == 2
    one_line(capsys, word)


def accuracy_command(options):
    app = typer.Typer()
    app.command()(accuracy.main)
    return CliRunner().invoke(app, options.split())


def test_accuracy_marks_the_filters_within_the_rule(tmp_path):
    out = tmp_path / "accuracy.json"
    done = accuracy_command(f"--n 16 --c 300 --d 64 --dtypes float32,bfloat16 --backend chunked --out {out}")
    assert done.exit_code == 0 and "| trained | 64 | 300 |" in done.output, done.output
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * len(accuracy.FILTERS)
    for row in rows:
        assert row["errors"] is not None, row["reason"]
        if row["dtype"] == "float32":
            assert row["within_rule"] or row["filter_eps"] > 2.0**-24
            assert not row["within_rule"] or row["filter_eps"] < 2.0**-12


def test_accuracy_refuses_an_unknown_backend():
    done = accuracy_command("--backend abacus")
    assert done.exit_code == 2 and "'abacus'" in done.output


def test_commit_is_dirty_where_code_differs_and_not_where_results_do(tmp_path, monkeypatch):
    def git(*command):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *command], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code, *others = (tmp_path / name for name in ("package/code.py", "benchmarks/results/r.json", "a.md"))
    for path in (code, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    assert machine.commit(code.parent) is None
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    head = git("rev-parse", "HEAD").strip()
    assert machine.commit(code.parent) == head
    for path in others:
        path.write_text("new")
    assert machine.commit(code.parent) == head
    code.write_text("new")
    assert machine.commit(code.parent) == head + "-dirty"
    installed = tmp_path / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "code.py").touch()
    assert machine.commit(installed) is None, "of some project that it is installed in"


def test_tables_are_written_from_the_results(tmp_path, monkeypatch, capsys):
    def write(**changes):
        times = {"time_ms": {"median": 1234.5, "q1": 12.34, "q3": 1.234}}
        (tmp_path / "r.json").write_text(json.dumps(result([bench_row(8, 60, "native@2^-16", **times, **changes)])))

    monkeypatch.setattr(tables, "ROOT", tmp_path)
    write()
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: r.json mode=both providers=native@2^-16 -->\nold figures\n<!-- end -->\nafter\n"
    )
    assert tables.main([str(page), "--check"]) == 1 and "old figures" in page.read_text()
    assert tables.main([str(page)]) == 0
    text = page.read_text()
    assert "| native@2^-16 | 1234 | 12.3–1.23 | 25.0 | 3 | 0.50 | 3.2 |" in text and "old figures" not in text
    assert "Abacus, AVX2, 2 threads; torch 9.9; 2030-01-02, commit 0000000000-dirty." in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert tables.main([str(page), "--check"]) == 0
    write(other_busy_cores=0.9)
    assert tables.main([str(page)]) == 0 and "used up to 0.9 cores" in page.read_text()
    page.write_text("<!-- table: r.json providers=native@2^-16,abacus -->\n<!-- end -->\n")
    for word in ("got abacus", "r.json"):
        with pytest.raises(SystemExit) as stop:
            tables.main([str(page)])
        assert stop.value.code == 2 and word in capsys.readouterr().err
        (tmp_path / "r.json").unlink(missing_ok=True)


def test_the_documents_say_what_the_results_say():
    texts = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    written = {path for path, text in texts.items() if "<!-- table:" in text}
    (made,) = re.findall(r"-m benchmarks.tables (.*)", (ROOT / "Makefile").read_text())
    assert {str(path.relative_to(ROOT)) for path in written} == set(made.split())
    for path in written:
        assert tables.rewrite(texts[path]) == texts[path], f"make tables: {path}"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_can_be_read(path):
    result = report.load(path)
    assert result["rows"] and result["commit"] and result["machine"]["cpu"] and not result["interrupted"]


def test_a_report_has_no_number_that_json_lacks(tmp_path):
    path = tmp_path / "report.json"
    report.save({"rows": [{"errors": {"loss": math.nan, "grad_x": math.inf, "grad_w": 1.0}}]}, path)
    assert json.loads(path.read_text())["rows"][0]["errors"] == {"loss": None, "grad_x": None, "grad_w": 1.0}


def test_the_model_of_a_gpu_predicts_no_less_than_the_floor():
    """One product and two passes over w by lists, for every GPU and shape; every kernel's row is found in the tables."""
    text = gpu_model.TABLES.read_text()
    for gpu in gpu_model.GPUS.values():
        rows = gpu_model.compiled(gpu.target, text)
        for n, c in gpu_model.SHAPES:
            floor = 2 * n * c * 512 / (gpu.tflops * 1e9) + 2 * c * 512 * 4 / (gpu.dram_tb * 1e9)
            ways = gpu_model.predict(gpu, rows, n, c)
            assert floor < sum(ways["lists"].values()) < sum(ways["dense"].values())


@pytest.mark.parametrize("name", ["nowhere.json", "cpu-random.json", "cpu-accuracy.json", "cpu-sampling.json"])
def test_the_model_of_a_gpu_says_what_it_cannot_stand_beside(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        gpu_model.main([str(ROOT / "benchmarks" / "results" / name)])
    assert stopped.value.code == 2
    assert ("cannot read" if name == "nowhere.json" else "found none") in capsys.readouterr().err
