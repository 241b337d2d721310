"""`sface-kernels plot` on made-up results: which pictures it draws, what is on them, and what it refuses."""

from __future__ import annotations

import itertools
import json

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

from sface_kernels import cli
from sface_kernels.bench import plots, report

PROVIDERS = {"reference": 100.0, "careful-compiled": 50.0, "native@2^-16": 4.0, "mm-fp32": 10.0}  # ms
MACHINE = {"cpu": "Abacus", "isa": ["avx512f"], "threads": 2, "gpu": None}


def bench_row(n, c, provider, **changes):
    median = PROVIDERS[provider] * n * c / 1e6
    times = {"median": median, "q1": 0.9 * median, "q3": 1.2 * median}
    return {
        **{"workload": f"N={n} C={c} D=512 random", "n": n, "c": c, "d": 512, "geometry": "random", "mode": "both"},
        **{"density_requested": None, "density": 1e-6, "device": "cpu", "dtype": "float32", "provider": provider},
        **{"time_ms": times, "memory": {"peak_extra_bytes": 4 * n * c}},
        "ratios": {"speedup_vs_reference": PROVIDERS["reference"] / PROVIDERS[provider]},
        **changes,
    }


def error_row(c, filter_eps):
    errors = {"loss": 1e-7, "grad_x": 1e-6 + filter_eps, "grad_w": 2e-6 + filter_eps}
    return {
        **{"geometry": "trained", "n": 128, "c": c, "d": 512, "backend": "native", "dtype": "float32"},
        **{"filter_eps": filter_eps, "errors": errors, "reference": dict.fromkeys(errors, 1e-6)},
    }


def result(kind, rows):
    return {
        **{"schema": report.SCHEMA, "schema_version": report.SCHEMA_VERSION, "kind": kind},
        **{"machine": MACHINE, "rows": rows},
    }


BY_CLASSES = result("bench", [bench_row(128, c, p) for c, p in itertools.product((1000, 85_742), PROVIDERS)])
BY_SAMPLES = result("bench", [bench_row(n, 1000, p) for n, p in itertools.product((8, 128), PROVIDERS)])
BY_DENSITY = result(
    "density",
    [bench_row(128, 1000, p, density=d) for d in (1e-5, 1e-2) for p in ("native@2^-16", "reference")],
)
BY_FILTER = result("accuracy", [error_row(c, eps) for c in (1000, 85_742) for eps in (2.0**-8, 2.0**-24, 0.0)])


def written(tmp_path, *results):
    paths = []
    for number, content in enumerate(results):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(content))
    return [str(path) for path in paths]


@pytest.mark.parametrize(
    "results, names",
    [
        ([BY_CLASSES], {"time_vs_classes", "memory_vs_classes", "ratio"}),
        ([BY_SAMPLES], {"time_vs_samples", "memory_vs_samples", "ratio"}),
        ([BY_DENSITY], {"density"}),
        ([BY_FILTER], {"error_vs_filter_float32"}),
        ([BY_CLASSES, BY_FILTER], {"time_vs_classes", "memory_vs_classes", "ratio", "error_vs_filter_float32"}),
    ],
    ids=["classes", "samples", "density", "filter", "two files"],
)
def test_png_and_svg_of_what_the_files_hold(tmp_path, capsys, results, names):
    out = tmp_path / "new" / "folder"
    assert cli.main(["plot", *written(tmp_path, *results), "--out", str(out), "--prefix", "cpu-"]) == 0
    assert {path.name for path in out.iterdir()} == {f"cpu-{name}.{end}" for name in names for end in ("png", "svg")}
    printed = capsys.readouterr().out.splitlines()
    assert sorted(printed) == sorted(str(path) for path in out.iterdir())
    for path in out.iterdir():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in content


def test_the_only_mode_in_the_files_is_drawn(tmp_path):
    steps = result("bench", [row | {"mode": "step"} for row in BY_CLASSES["rows"]])
    assert cli.main(["plot", *written(tmp_path, steps), "--out", str(tmp_path / "p"), "--only", "ratio"]) == 0
    assert (tmp_path / "p" / "ratio.png").is_file()


def test_a_disturbed_measurement_says_so():
    rows = [{**row, "other_busy_cores": 0.04} for row in BY_CLASSES["rows"]]
    assert "others" not in plots.draw([result("bench", rows)], "both")["ratio"].axes[0].get_title()
    rows[-1]["other_busy_cores"] = 0.9
    titles = [axes.get_title() for axes in plots.draw([result("bench", rows)], "both")["ratio"].axes]
    assert "others used up to 0.9 cores" in titles[-1] and "others" not in titles[0]


def test_one_kind_of_picture_in_one_format(tmp_path):
    arguments = ["--out", str(tmp_path / "p"), "--only", "ratio", "--formats", "svg"]
    assert cli.main(["plot", *written(tmp_path, BY_CLASSES), *arguments]) == 0
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["ratio.svg"]


def legend(axes):
    return {text.get_text() for text in axes.get_legend().get_texts()}


def test_axes_say_what_is_on_them_and_the_floor_is_drawn():
    figures = plots.draw([BY_CLASSES, BY_SAMPLES, BY_DENSITY, BY_FILTER], "both")
    time, memory = (figures[f"{name}_vs_classes"].axes[0] for name in ("time", "memory"))
    for axes in (time, memory):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert axes.get_xlabel() == "classes, C" and "Abacus, AVX-512, 2 threads" in axes.get_title()
    assert "ms" in time.get_ylabel() and "MiB" in memory.get_ylabel()
    assert legend(time) == {"reference", "careful-compiled", "native@2^-16", "floor: ONE fp32 product"}
    assert "∂w itself, returned" in legend(memory)
    lines = {line.get_label(): list(line.get_ydata()) for line in time.get_lines()}
    assert lines["reference"] == pytest.approx([12.8, 1097.4976])
    assert figures["time_vs_samples"].axes[0].get_xlabel() == "samples, N"
    assert "reference, at any share" in legend(figures["density"].axes[0])
    assert {"∂x, C=1,000", "∂w, C=85,742"} <= legend(figures["error_vs_filter_float32"].axes[0])
    bars = [bar.get_width() for bar in figures["ratio"].axes[0].patches]
    assert bars == pytest.approx([1, 2, 25, 10])


@pytest.mark.parametrize(
    "content, word",
    [
        ("not json", "not a JSON file"),
        ("[1, 2]", "schema"),
        ('{"schema": "somebody else"}', "somebody else"),
        (json.dumps(BY_CLASSES | {"schema_version": 1}), "version 1"),
        (json.dumps(BY_CLASSES | {"kind": "poem"}), "poem"),
        (json.dumps(result("bench", [])), "nothing to draw"),
        (json.dumps(result("bench", [{"mode": "both"}])), "lacks the key"),
    ],
    ids=["text", "list", "schema", "version", "kind", "no rows", "a broken row"],
)
def test_what_is_no_result_is_refused_in_one_line(tmp_path, capsys, content, word):
    path = tmp_path / "file.json"
    path.write_text(content)
    assert cli.main(["plot", str(path), "--out", str(tmp_path / "p")]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and word in text


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--formats", "jpg"], "--formats"),
        (["--only", "poem"], "--only"),
        (["--mode", "sideways"], "--mode"),
        (["--mode", "step"], "nothing to draw"),
        (["--out", "/dev/null/plots"], "/dev/null/plots"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(tmp_path, capsys, arguments, word):
    out = ["--out", str(tmp_path / "p")] if "--out" not in arguments else []
    assert cli.main(["plot", *written(tmp_path, BY_CLASSES), *out, *arguments]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and word in text
