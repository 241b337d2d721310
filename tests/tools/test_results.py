"""From a measurement to the documents: the sweeps, the files, the commit they name, tables and pictures."""

from __future__ import annotations

import json
import math
import re
import subprocess

import pytest

from benchmarks import accuracy, density, tables
from sface_kernels.bench import machine, report
from tests.support.cases import ROOT


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


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md", "docs/accuracy.md"])
def test_the_documents_say_what_the_results_say(document):
    text = (ROOT / document).read_text()
    assert "<!-- table:" in text and tables.rewrite(text) == text, "make tables"


def test_tables_of_errors_by_dtype():
    block = tables.block("benchmarks/results/cpu-accuracy.json", " dtypes=float32")
    assert "Embeddings float32" in block and "bfloat16" not in block and "commit " in block


def test_every_picture_in_the_documents_is_there():
    for document in ("README.md", "docs/performance.md", "docs/accuracy.md"):
        path = ROOT / document
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text())
        assert pictures and all((path.parent / picture).is_file() for picture in pictures), pictures


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_committed_results_can_be_read(path):
    result = report.load(path)
    assert result["rows"] and result["commit"] and result["machine"]["cpu"] and not result["interrupted"]


def test_a_report_has_no_number_that_json_lacks(tmp_path):
    path = tmp_path / "report.json"
    report.save({"rows": [{"errors": {"loss": math.nan, "grad_x": math.inf, "grad_w": 1.0}}]}, path)
    assert json.loads(path.read_text())["rows"][0]["errors"] == {"loss": None, "grad_x": None, "grad_w": 1.0}
