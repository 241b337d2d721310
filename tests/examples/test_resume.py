"""What a checkpoint promises: it is good, it is of this training, and what it is not is said in one line."""

from __future__ import annotations

import copy
import io
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.examples.running import ODD_BYTE, TINY, failed, metrics, run, strict_json, train_faces, write_faces

from faces import checkpoint  # isort: skip
from faces.checkpoint import CHECKPOINT, CheckpointError, read_checkpoint  # isort: skip
from faces.data import FaceSet, Split  # isort: skip
from faces.files import printable  # isort: skip
from faces.options import TrainOptions  # isort: skip

OPTIONS = [*TINY, "--epochs", 2]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train_faces, "draw_all", lambda *_: [])


def stop_in_epoch(monkeypatch, epoch: int, then=None) -> None:
    """Ctrl-C in the step that is this epoch of TINY, or what `then` makes of the step's values and arguments."""
    steps: list[int] = []
    plain = train_faces.training_step

    def step(*arguments):
        steps.append(1)
        if len(steps) == epoch and then is None:
            raise KeyboardInterrupt
        values = plain(*arguments)
        return then(values, *arguments) if len(steps) == epoch and then else values

    monkeypatch.setattr(train_faces, "training_step", step)


@pytest.fixture(scope="module")
def half_done(tmp_path_factory) -> Path:
    """A run of two epochs that was stopped in the second."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(patch, 2)
        failed(run(*OPTIONS, "--out", folder), 130, "--resume goes on after epoch 1")
    return folder


@pytest.fixture
def out(half_done, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(half_done, tmp_path / "out"))


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_faces, "draw_all", lambda *_: [])
        assert run(*OPTIONS, "--out", folder).exit_code == 0
    return [step["loss"] for step in metrics(folder)["steps"]]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _paths(tree, prefix=()):
    """Of every key in nested dicts; of a list its first entry stands for all."""
    for key in list(tree) if isinstance(tree, dict) else range(min(1, len(tree))):
        if isinstance(tree, dict):
            yield (*prefix, key)
        if isinstance(tree[key], (dict, list)):
            yield from _paths(tree[key], (*prefix, key))


def test_a_checkpoint_that_lacks_any_key(half_done, tmp_path, losses):
    """It is refused in one line, or it goes on as if the key had been there; and what was there is left alone."""
    whole = read_checkpoint(half_done)
    refused = 0
    for number, path in enumerate(_paths(whole)):
        out = Path(shutil.copytree(half_done, tmp_path / str(number)))
        state = copy.deepcopy(whole)
        parent = state
        for key in path[:-1]:
            parent = parent[key]
        del parent[path[-1]]
        torch.save(state, out / CHECKPOINT)
        before = files(out)
        result = run(*OPTIONS, "--out", out, "--resume")
        if result.exit_code == 0:
            assert [step["loss"] for step in metrics(out)["steps"]] == losses, path
            continue
        refused += 1
        failed(result, 2, "error: --resume:", str(out / CHECKPOINT))
        assert files(out) == before, path
    # At least all at the top, in the weights and in the momentum, and the options that make a training what it is
    assert refused >= len(whole) + len(whole["backbone"]) + 2 * len(whole["optimizer"]) + len(OTHER)


class Touch:
    """What pickle would run when it loads this."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def _saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_no_checkpoint_at_all(out, tmp_path):
    good = (out / CHECKPOINT).read_bytes()
    wrong = {
        "empty": b"",
        "text": b"no checkpoint",
        "cut": good[: len(good) // 2],
        "a number": _saved(3),
        "a list": _saved([1, 2]),
        "weights alone": (out / "head.pt").read_bytes(),
        "code": _saved({"head": Touch(tmp_path / "it ran")}),
        "wrong types": _saved(dict.fromkeys(read_checkpoint(out), 1)),
        "other numbers of epochs": _saved({**read_checkpoint(out), "epoch": 7}),
    }
    for name, content in wrong.items():
        (out / CHECKPOINT).write_bytes(content)
        before = files(out)
        failed(run(*OPTIONS, "--out", out, "--resume"), 2, "error: --resume:", str(out / CHECKPOINT))
        assert files(out) == before, name
    assert not (tmp_path / "it ran").exists()


def test_a_checkpoint_is_read_before_the_faces(out, monkeypatch):
    monkeypatch.setattr(train_faces, "load_faces", None)
    (out / CHECKPOINT).write_bytes(b"")
    failed(run(*OPTIONS, "--out", out, "--resume"), 2, "is no checkpoint")
    (out / CHECKPOINT).unlink()
    (out / CHECKPOINT).mkdir()
    failed(run(*OPTIONS, "--out", out, "--resume"), 2, "Is a directory")
    (out / CHECKPOINT).rmdir()
    failed(run(*OPTIONS, "--out", out, "--resume"), 2, "found none")


OTHER = {
    **{"--lr": 0.01, "--s": 32, "--k": 40, "--a": 0.7, "--b": 1.3, "--seed": 1, "--epochs": 3, "--batch-size": 3},
    **{"--embedding-size": 8, "--val-fraction": 0.4, "--identities": 5, "--images-per-identity": 3},
}


@pytest.mark.parametrize("option, value", OTHER.items(), ids=OTHER)
def test_another_option_is_another_training(out, option, value):
    before = files(out)
    failed(run(*OPTIONS, option, value, "--out", out, "--resume"), 2, f"differs in {option[2:].replace('-', ' ')}: ")
    assert files(out) == before


def test_every_option_is_compared_or_free():
    compared = {option[2:].replace("-", "_") for option in OTHER}
    assert compared | checkpoint.FREE_ON_RESUME == {*TrainOptions().as_json(), "source", "left_out"}


def test_the_other_head_is_another_training(out):
    failed(run(*OPTIONS, "--head", "reference", "--out", out, "--resume"), 2, "differs in head: fused", "reference")


def _trained_on_files(tmp_path, monkeypatch) -> list[object]:
    write_faces(tmp_path / "data", 4)
    options = ["--data", tmp_path / "data", "--val-fraction", 0.5, "--embedding-size", 4, "--epochs", 2]
    stop_in_epoch(monkeypatch, 2)
    failed(run(*options, "--out", tmp_path / "out"), 130, "--resume goes on after epoch 1")
    monkeypatch.undo()
    monkeypatch.setattr(train_faces, "draw_all", lambda *_: [])
    return [*options, "--out", tmp_path / "out", "--resume"]


def test_other_data_is_another_training(tmp_path, monkeypatch):
    options = _trained_on_files(tmp_path, monkeypatch)
    face = tmp_path / "data" / "person0" / "0.png"
    content = face.read_bytes()
    shutil.copy(tmp_path / "data" / "person1" / "4.png", face)
    failed(run(*options), 2, "differs in checksum of images")
    face.unlink()
    failed(run(*options), 2, "differs in", "images")
    face.write_bytes(content)
    # The last image of one becomes the first of the next: the same images in the same order, by other people
    (tmp_path / "data" / "person1" / "7.png").rename(tmp_path / "data" / "person2" / "07.png")
    failed(run(*options), 2, "differs in")


def test_the_labels_are_compared_too():
    images = torch.arange(8 * 4, dtype=torch.uint8).view(8, 2, 2)
    unseen = FaceSet(images, torch.arange(8) // 4, "")
    one, other = (
        Split(FaceSet(images, torch.tensor(labels), ""), unseen).as_json()
        for labels in ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1])
    )
    assert {name for name in one if one[name] != other[name]} == {"checksum_of_labels"}


def test_the_same_training_may_go_on_elsewhere(tmp_path, monkeypatch):
    """The faces in another folder, the run in another one with a name that is no UTF-8, other threads."""
    options = _trained_on_files(tmp_path, monkeypatch)
    moved, out = tmp_path / "moved", tmp_path / f"out {ODD_BYTE} [1]"
    (tmp_path / "data").rename(moved)
    (tmp_path / "out").rename(out)
    (moved / "a note").touch()
    again = run("--data", moved, *options[2:-3], "--out", out, "--threads", 1, "--resume")
    assert again.exit_code == 0 and "going on after epoch 1" in again.output, again.output
    assert len(metrics(out)["epochs"]) == 2 and metrics(out)["data"]["left_out"]
    assert printable(out) in again.output


def poison(values, backbone, *_):
    next(backbone.parameters()).data.view(-1)[0] = math.nan
    return values


def test_weights_that_are_no_numbers_do_not_replace_good_ones(tmp_path, monkeypatch):
    """The loss of the last step is still finite."""
    stop_in_epoch(monkeypatch, 2, poison)
    failed(run(*OPTIONS, "--out", tmp_path), 1, "not finite after epoch 2")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path)["epoch"] == 1
    for name in ("backbone.pt", "head.pt"):
        assert all(part.isfinite().all() for part in torch.load(tmp_path / name, weights_only=True).values())
    assert len(metrics(tmp_path)["steps"]) == 2


def test_a_checkpoint_with_weights_that_are_no_numbers_is_refused(out):
    state = read_checkpoint(out)
    state["head"]["weight"][0, 0] = math.inf
    torch.save(state, out / CHECKPOINT)
    failed(run(*OPTIONS, "--out", out, "--resume"), 2, "not finite")


def test_a_loss_that_is_no_number_is_null_in_the_json(tmp_path, monkeypatch):
    stop_in_epoch(monkeypatch, 2, lambda values, *_: {**values, "loss": math.nan, "inter": -math.inf})
    failed(run(*OPTIONS, "--out", tmp_path), 1, "the loss is nan at step 2")
    last = strict_json(tmp_path / "metrics.json")["steps"][-1]
    assert last["loss"] is None and last["inter"] is None
    assert read_checkpoint(tmp_path)["epoch"] == 1


def test_ctrl_c_in_the_first_epoch_promises_nothing(tmp_path, monkeypatch):
    stop_in_epoch(monkeypatch, 1)
    failed(run(*OPTIONS, "--out", tmp_path), 130, "nothing to go on from")
    monkeypatch.undo()
    assert not (tmp_path / CHECKPOINT).exists() and metrics(tmp_path)["steps"] == []
    failed(run(*OPTIONS, "--out", tmp_path, "--resume"), 2, "found none")


def test_a_new_run_does_not_destroy_an_old_one_before_it_has_something_better(out, monkeypatch, losses):
    good = (out / CHECKPOINT).read_bytes(), (out / "backbone.pt").read_bytes()
    stop_in_epoch(monkeypatch, 1)
    failed(run(*OPTIONS, "--lr", 0.01, "--out", out), 130, "nothing to go on from")  # the old one is another training
    stop_in_epoch(monkeypatch, 1)
    failed(run(*OPTIONS, "--out", out), 130, "--resume goes on after epoch 1")
    monkeypatch.undo()
    assert good == ((out / CHECKPOINT).read_bytes(), (out / "backbone.pt").read_bytes())
    monkeypatch.setattr(train_faces, "draw_all", lambda *_: [])
    assert run(*OPTIONS, "--out", out, "--resume").exit_code == 0
    assert [step["loss"] for step in metrics(out)["steps"]] == losses


def test_resuming_mends_what_an_interrupt_left_behind_the_checkpoint(out):
    """metrics.json, backbone.pt and head.pt are written after it."""
    assert run(*OPTIONS, "--out", out, "--resume").exit_code == 0
    for name in ("metrics.json", "backbone.pt", "head.pt"):
        (out / name).unlink()
    assert run(*OPTIONS, "--out", out, "--resume").exit_code == 0
    state = read_checkpoint(out)
    assert torch.equal(torch.load(out / "head.pt", weights_only=True)["weight"], state["head"]["weight"])
    assert len(metrics(out)["epochs"]) == state["epoch"] == 2


def test_reading_a_checkpoint_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_checkpoint(tmp_path)
