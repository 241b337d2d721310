"""What a user's names, numbers and environment may be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import matplotlib
import pytest

from tests.examples.running import ODD_BYTE, SCRIPT, TINY, failed, metrics, run, train_faces, write_faces

from faces.files import printable  # isort: skip  # running puts it on the path

# What a notebook's kernel hands down to all that it starts, on a machine where that module may be missing
NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
ASCII = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}


def shell(*arguments: object, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), **NOTEBOOK, **ASCII}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run([os.fsencode(str(word)) for word in command], env=environment, capture_output=True, **options)


def test_help_in_a_notebook_and_on_a_terminal_that_knows_ascii_alone():
    done = shell("--help")
    assert done.returncode == 0 and b"--val-fraction" in done.stdout and b"Traceback" not in done.stderr


def test_a_whole_run_with_odd_names_in_an_odd_environment(tmp_path):
    """LaTeX asked for in the user's matplotlibrc, names that are no UTF-8, brackets that look like markup."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\n")
    write_faces(tmp_path / "faces", 4)
    broken = tmp_path / "faces" / "person0" / f"portrait [edited] caf{ODD_BYTE}.jpg"
    broken.write_text("no image")
    out = f"o3 [faces] :smile: {ODD_BYTE}"
    options = ["--val-fraction", 0.5, "--embedding-size", 4, "--epochs", 1]
    done = shell("--data", "faces", "--out", out, *options, cwd=tmp_path)
    text = done.stdout.decode()
    assert done.returncode == 0, (text, done.stderr)
    assert f"left out: 1, listed in metrics.json: {printable(broken.relative_to(tmp_path / 'faces'))} (not an" in text
    assert f"Plots: {printable(out)}/losses.png, " in text and f"tensorboard --logdir '{printable(out)}'" in text
    assert len(list((tmp_path / out).glob("*.png"))) == 4
    assert metrics(tmp_path / out)["options"]["out"] == printable(out)


def test_the_users_style_does_not_reach_the_plots(tmp_path):
    assert run(*TINY, "--epochs", 1, "--seed", 3, "--out", tmp_path / "plain").exit_code == 0
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "figure.dpi": 20}):
        result = run(*TINY, "--epochs", 1, "--seed", 3, "--out", tmp_path / "styled")
    assert result.exit_code == 0, result.output
    for name in ("losses", "cosines", "roc", "angles"):
        plain, styled = (tmp_path / folder / f"{name}.png" for folder in ("plain", "styled"))
        assert plain.read_bytes() == styled.read_bytes()


@pytest.mark.parametrize("name", ["o3 [faces]", "[/b]", ":smile:", "[bold red]", "\\[x]"])
def test_names_are_no_markup(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_faces, "draw_all", lambda runs, options, folder: [folder / "losses.png"])
    result = run(*TINY, "--epochs", 1, "--out", name)
    assert result.exit_code == 0, result.output
    assert f"Plots: {train_faces.Path(name)}/losses.png\n" in result.output
    assert run("--data", "missing [x]", "--out", "new").output.endswith("got missing [x]: No such file or directory\n")


NUMBERS = (
    "--epochs",
    "--batch-size",
    "--embedding-size",
    "--threads",
    "--seed",
    "--identities",
    "--images-per-identity",
)


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("value", [-1, 2**63, 2**70])
def test_numbers_out_of_range_are_one_line(tmp_path, option, value):
    result = run(*TINY, option, value, "--out", tmp_path / "out")
    failed(result, 2, f"error: {option}: expected a whole number from", f"got {value}")
    assert result.output.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--lr", "--s", "--k"])
@pytest.mark.parametrize("value", ["nan", "inf", "0", "1e308"])
def test_a_number_that_float32_cannot_work_with_is_one_line(tmp_path, option, value):
    result = run(*TINY, option, value, "--out", tmp_path / "out")
    failed(result, 2, f"error: {option}: expected a number > 0", f"got {float(value):g}")


def test_a_full_disk_below_what_is_printed_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train_faces, "load_faces", full)
    failed(run(*TINY, "--out", tmp_path / "out"), 1, "error: cannot write what is printed: No space left")


@pytest.mark.parametrize("seed", [2**45, 2**63 - 1])
def test_every_seed_in_the_range_can_be_used(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(train_faces, "draw_all", lambda *_: [])
    assert run(*TINY, "--epochs", 1, "--seed", seed, "--out", tmp_path).exit_code == 0


def test_too_little_memory_is_one_line(tmp_path):
    result = run("--identities", 10_000_000, "--images-per-identity", 1_000_000, "--out", tmp_path / "out")
    failed(result, 1, "error: too little memory")
    assert not (tmp_path / "out").exists()


def test_an_error_of_the_program_is_not_swallowed(tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(train_faces, "load_faces", wrong)
    result = run(*TINY, "--out", tmp_path / "out")
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1
