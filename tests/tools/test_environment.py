"""The command in somebody's environment: a notebook's matplotlib backend, odd names, a full disk."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import typer

from sface_kernels import cli
from sface_kernels.bench import report
from sface_kernels.cli import info, options
from sface_kernels.dispatch import BACKENDS
from tests.support.cases import ROOT
from tests.tools.test_results import BY_CLASSES


def written(folder: Path) -> str:
    """A result file that three pictures can be drawn from."""
    path = folder / "classes.json"
    path.write_text(json.dumps(BY_CLASSES))
    return str(path)


ODD_BYTE = "e" if sys.platform == "darwin" else os.fsdecode(b"\xe9")  # no UTF-8; Apple's file system refuses it


def test_plot_with_a_notebooks_backend_odd_names_and_a_terminal_that_knows_ascii_alone(tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    out = f"plots [x] caf{ODD_BYTE}"
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [sys.executable, "-m", "sface_kernels", "plot", written(tmp_path), "--out", os.fsencode(out)],
        env={**os.environ, **notebook, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / out).iterdir())) == len(done.stdout.splitlines()) == 6
    assert b"plots [x] caf" in done.stdout


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 1), (errno.EROFS, 2)])
def test_a_picture_that_cannot_be_written_is_one_line_and_nothing_half_written(
    tmp_path, capsys, monkeypatch, number, status
):
    def replace(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(report.os, "replace", replace)
    out = tmp_path / "p"
    assert cli.main(["plot", written(tmp_path), "--out", str(out), "--only", "ratio"]) == status
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and str(out / "ratio.png") in text and os.strerror(number) in text
    assert not list(out.iterdir())


def test_a_result_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(report.WriteError) as caught:
        report.save({"rows": []}, tmp_path / "folder")
    assert caught.value.filename == str(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_keeps_its_place_and_its_readers(tmp_path):
    link, target = tmp_path / "link.json", tmp_path / "real.json"
    link.symlink_to(target)
    assert options.output_file(str(link)) == link and link.is_symlink() and not target.exists()
    target.touch(0o600)
    report.save({"rows": []}, link)
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_takes_no_file_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "out.json").touch()  # itself writable, but a file is replaced
    monkeypatch.setattr(
        options.tempfile, "TemporaryFile", mock.Mock(side_effect=PermissionError(13, "Permission denied"))
    )
    with pytest.raises(typer.BadParameter, match=r"cannot write .*out\.json: Permission denied"):
        options.output_file(str(tmp_path / "out.json"))


def test_a_pipe_is_written_to_and_a_link_stays_one(tmp_path):
    """Neither is replaced by a file: as root that would take /dev/null from the machine."""
    link, pipe = tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to("real.json")
    report.save({"rows": [1]}, link)
    assert link.is_symlink() and json.loads((tmp_path / "real.json").read_text()) == {"rows": [1]}
    os.mkfifo(pipe)
    assert options.output_file(str(pipe)) == pipe  # it does not wait for a reader
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    report.save({"rows": [2]}, pipe)
    assert json.loads(os.read(reader, 1000)) == {"rows": [2]} and pipe.is_fifo()
    os.close(reader)


@pytest.mark.parametrize("redirection, status", [(">/dev/full", 1), (">&-", 0)])
def test_an_output_that_takes_nothing(redirection, status):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    shell = ["sh", "-c", f'"$0" -m sface_kernels info {redirection}', sys.executable]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr
    assert ("cannot write what is printed: No space left" in done.stderr) == bool(status)


def test_reasons_are_no_markup(capsys, monkeypatch):
    def unavailable(*_):
        return "no [library] here"

    monkeypatch.setitem(BACKENDS, "native", BACKENDS["native"]._replace(unavailable=unavailable))
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["info"]) == 0
    assert info.BACKENDS is BACKENDS and "no [library] here" in capsys.readouterr().out
