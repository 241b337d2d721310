"""What is left when a write fails: nothing half-written, the last good checkpoint, and a line that says so."""

from __future__ import annotations

import errno
import itertools
import math
import os
import re
from pathlib import Path

import pytest
import torch

from tests.examples.running import TINY, failed, metrics, run, strict_json, train_faces, write_faces

import matplotlib.figure  # isort: skip
from faces import files  # isort: skip
from tensorboard.summary.writer import record_writer  # isort: skip
from faces.checkpoint import CHECKPOINT, read_checkpoint  # isort: skip
from faces.files import OutputError, printable, write_file, write_json  # isort: skip


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """Counts the steps of all writing (open, write, fsync, replace), and lets step number `at` fail before it is done.

    With `after` it counts replacements alone and fails after one: an interrupt just after any other step is one just
    before the next.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, failure, after: bool = False) -> None:
        self.at, self.failure, self.after, self.count = at, failure, after, 0
        self.path: Path | None = None  # of the file whose write failed
        self.was_replace = False
        patch.setattr(files, "open", self._open, raising=False)
        patch.setattr(os, "fsync", self._around(os.fsync))
        patch.setattr(os, "replace", self._around(os.replace, replace=True))

    def _around(self, do, replace: bool = False):
        def step(*arguments):
            if self.after and not replace:
                return do(*arguments)
            self.count += 1
            if self.count != self.at:
                return do(*arguments)
            self.path, self.was_replace = self.writing, replace
            if self.after:
                do(*arguments)
            raise self.failure()

        return step

    def _open(self, path, mode):
        self.writing = path.with_suffix("")
        file = self._around(open)(path, mode)
        return _File(file, self._around(file.write), self)


class _File:
    def __init__(self, file, write, faults: Faults) -> None:
        self.file, self.whole, self.faults = file, write, faults
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, content) -> None:
        if self.faults.count + 1 == self.faults.at and not self.faults.after:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
        self.whole(content)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def is_sound(folder: Path) -> int | None:
    """Every file can be read to its end, and none is a left-over. The epoch of the checkpoint, if there is one."""
    for path in folder.rglob("*"):
        assert path.suffix in (".json", ".pt", ".png") or path.is_dir() or "tfevents" in path.name, path
        if path.suffix == ".json":
            strict_json(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)
    return read_checkpoint(folder)["epoch"] if (folder / CHECKPOINT).exists() else None


def promised(output: str) -> int | None:
    found = re.search(r"--resume goes on after epoch (\d+)", output)
    assert found or "--resume has nothing to go on from" in output, output
    return int(found[1]) if found else None


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> list[float]:
    """Of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_faces, "draw_all", lambda *_: [])
        assert run(*TINY, "--epochs", 2, "--out", folder).exit_code == 0
    return [step["loss"] for step in metrics(folder)["steps"]]


@pytest.mark.parametrize(
    "failure, after, status",
    [(full, False, 1), (KeyboardInterrupt, False, 130), (KeyboardInterrupt, True, 130)],
    ids=["full disk", "Ctrl-C", "Ctrl-C just after"],
)
def test_each_step_of_each_write_in_turn(tmp_path, monkeypatch, losses, failure, after, status):
    monkeypatch.setattr(train_faces, "draw_all", lambda *_: [])
    failures = resumed = 0
    for at in itertools.count(1):
        out = tmp_path / str(at)
        with monkeypatch.context() as patch:
            faults = Faults(patch, at, failure, after)
            result = run(*TINY, "--epochs", 2, "--out", out)
        if faults.count < at:
            break
        failures += 1
        if status == 1:
            failed(result, status, f"cannot write {faults.path}", "No space left on device")
        else:
            failed(result, status, "interrupted after step")
        saved = is_sound(out)
        assert promised(result.output) == saved
        if saved and faults.was_replace:
            again = run(*TINY, "--epochs", 2, "--out", out, "--resume")
            assert again.exit_code == 0 and f"going on after epoch {saved}" in again.output, again.output
            assert [step["loss"] for step in metrics(out)["steps"]] == losses
            assert is_sound(out) == 2
            resumed += 1
    # Two epochs, each with checkpoint.pt, metrics.json, backbone.pt and head.pt, in four steps
    assert failures == (8 if after else 32) and resumed >= 6


def test_a_training_that_fails_in_its_first_epoch_leaves_another_as_it_was(tmp_path):
    def content():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert run(*TINY, "--epochs", 2, "--out", tmp_path).exit_code == 0
    before = content()
    assert sum("tfevents" in path.name for path in before) == 1
    again = (*TINY, "--epochs", 1, "--batch-size", 2, "--lr", 1e20, "--seed", 1)
    failed(run(*again, "--out", tmp_path), 1, "nan at step 2")
    assert content() == before
    assert run(*TINY, "--epochs", 1, "--no-tensorboard", "--out", tmp_path).exit_code == 0
    assert not any("tfevents" in path.name for path in content()), "of another training than the rest"


@pytest.mark.parametrize("at", range(1, 5))
@pytest.mark.parametrize("failure", [full, KeyboardInterrupt])
def test_a_failing_write_keeps_the_old_file(tmp_path, failure, at):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch, pytest.raises((OutputError, KeyboardInterrupt)):
        Faults(patch, at, failure)
        write_file(path, b"the new content")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_failing_picture_leaves_no_half_of_it(tmp_path, monkeypatch):
    """The weights are saved by then, and resuming draws the pictures."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, file, **_: file.write(b"a picture"))
    with monkeypatch.context() as patch:
        faults = Faults(patch, 4 * 4 + 6, full)  # the second picture
        failed(run(*TINY, "--epochs", 1, "--out", tmp_path), 1, "cosines.png", "No space left on device")
        assert faults.path == tmp_path / "cosines.png"
    assert is_sound(tmp_path) == 1
    assert {file.name for file in tmp_path.glob("*.png")} == {"losses.png"}
    assert run(*TINY, "--epochs", 1, "--out", tmp_path, "--resume").exit_code == 0
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_full_disk_under_the_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(train_faces, "draw_all", lambda *_: [])
    writes, plain = [], record_writer.RecordWriter.write

    def write(self, record):
        writes.append(record)
        if len(writes) == 20:  # in the second epoch
            raise full()
        plain(self, record)

    monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    result = run(*TINY, "--epochs", 2, "--out", tmp_path)
    failed(result, 1, str(tmp_path / "tensorboard"), "No space left on device")
    assert promised(result.output) == is_sound(tmp_path) == 1


def test_curves_can_be_read_back(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(train_faces, "draw_all", lambda *_: [])
    assert run(*TINY, "--epochs", 3, "--out", tmp_path).exit_code == 0
    curves = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0}).Reload()  # 0: all of them
    steps = metrics(tmp_path)["steps"]
    shown = curves.Scalars("train/loss")
    assert [point.step for point in shown] == [step["step"] for step in steps]
    assert [point.value for point in shown] == pytest.approx([step["loss"] for step in steps], rel=1e-6)
    assert [point.step for point in curves.Scalars("unseen/auc")] == [1, 2, 3]
    for kind in ("target", "other", "hardest"):
        assert [point.step for point in curves.Histograms(f"angles/{kind}")] == [1, 2, 3]
    # an epoch has one step of 4 rows and 2 classes
    assert [point.histogram_value.num for point in curves.Histograms("angles/target")] == [4, 4, 4]


def test_json_is_strict_whatever_is_in_it(tmp_path):
    name = os.fsdecode(b"caf\xe9 [1]")
    write_json(tmp_path / "a.json", {"loss": [math.nan, {"x": math.inf}, (-math.inf, 1.5)], "out": name})
    found = strict_json(tmp_path / "a.json")
    assert found == {"loss": [None, {"x": None}, [None, 1.5]], "out": "caf\\xe9 [1]"}


def test_names_are_printed_on_one_line_and_can_be_encoded():
    assert printable("o3 [faces] é 顔") == "o3 [faces] é 顔"
    assert printable(os.fsdecode(b"a\nb\x1b[31m\xff")) == "a\\nb\\x1b[31m\\xff"


def tree(folder: Path) -> dict[str, bytes | None]:
    found = {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return found | {str(path): os.readlink(path).encode() for path in folder.rglob("*") if path.is_symlink()}


IN_THE_WAY = {
    "a file": ("o", [], lambda o: o.touch()),
    "below a file": ("o/p/q", [], lambda o: o.parents[1].touch()),
    "a link to nothing": ("o", [], lambda o: o.symlink_to("nowhere")),
    "a link to itself": ("o", [], lambda o: o.symlink_to("o")),
    "a name too long": ("p/" + "x" * 300, [], lambda o: None),
    "a folder for a file": ("o", [], lambda o: (o / "metrics.json").mkdir(parents=True)),
    "a folder for a picture": ("o", [], lambda o: (o / "roc.png").mkdir(parents=True)),
    "a file for the curves": ("o", [], lambda o: (o.mkdir(), (o / "tensorboard").touch())),
    "a file for a head": ("o", ["--head", "both"], lambda o: (o.mkdir(), (o / "reference").touch())),
}


@pytest.mark.parametrize("name, options, put", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_out_is_checked_before_a_face_is_read(tmp_path, monkeypatch, name, options, put):
    out = tmp_path / name
    put(out)
    before = tree(tmp_path)
    monkeypatch.setattr(train_faces, "load_faces", None)  # what calls it fails
    failed(run(*TINY, *options, "--out", out), 2, "error: --out: cannot write", str(out))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "number, status", [(errno.EROFS, 2), (errno.EACCES, 2), (errno.EIO, 2), (errno.ENOSPC, 1), (errno.EDQUOT, 1)]
)
@pytest.mark.parametrize("at", ["mkdir", "the first file"])
def test_a_disk_that_takes_nothing(tmp_path, monkeypatch, number, status, at):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    if at == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    else:
        monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(train_faces, "load_faces", None)
    failed(run(*TINY, "--out", tmp_path / "new" / "o"), status, str(tmp_path / "new" / "o"), os.strerror(number))
    assert not list(tmp_path.iterdir())


def test_out_among_the_faces_would_become_an_identity(tmp_path):
    write_faces(tmp_path / "faces", 4)
    (tmp_path / "link").symlink_to("faces")
    for out in ("faces", "faces/out", "link/new"):
        failed(run("--data", tmp_path / "faces", "--out", tmp_path / out), 2, "--out", "outside --data")
    assert not (tmp_path / "faces" / "out").exists()


def test_ctrl_c_while_faces_are_read_leaves_no_folder(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_faces, "load_faces", interrupt)
    failed(run(*TINY, "--out", tmp_path / "new" / "o"), 130, "interrupted")
    assert not list(tmp_path.iterdir())
