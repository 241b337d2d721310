"""The training example under torchrun: rows and classes over two processes, and checkpoints that go between one and two."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.examples.running import SCRIPT, SMALL, failed, metrics, run, train_faces
from tests.examples.test_resume import stop_in_epoch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
OPTIONS = [*SMALL, "--epochs", "2", "--threads", "1"]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--class-parallel", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = torchrun(*OPTIONS, "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fused epoch 2/2") == 1  # one process speaks
    return folder


def test_two_processes_leave_what_one_leaves(trained, tmp_path):
    assert run(*OPTIONS, "--out", tmp_path).exit_code == 0
    assert sorted(p.name for p in trained.iterdir()) == sorted(p.name for p in tmp_path.iterdir())
    ours, theirs = metrics(trained), metrics(tmp_path)
    assert [step["step"] for step in ours["steps"]] == [step["step"] for step in theirs["steps"]]
    assert all(0 < epoch["verification"]["auc"] <= 1 for epoch in ours["epochs"])
    for name in ("head.pt", "backbone.pt"):
        saved, plain = (torch.load(folder / name, weights_only=True) for folder in (trained, tmp_path))
        assert {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in plain.items()}
        assert all(type(value) is torch.Tensor for value in saved.values())


def test_a_run_of_one_process_goes_on_in_two(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_in_epoch(patch, 2)
        failed(run(*OPTIONS, "--batch-size", 72, "--out", tmp_path), 130, "--resume goes on after epoch 1")
    done = torchrun(*OPTIONS, "--batch-size", 72, "--out", tmp_path, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on after epoch 1" in done.stdout and len(metrics(tmp_path)["epochs"]) == 2


def test_a_run_of_two_processes_goes_on_in_one(trained):
    """It has no epoch left: what is restored is the head and the optimizer, whole."""
    result = run(*OPTIONS, "--out", trained, "--resume")
    assert result.exit_code == 0 and "going on after epoch 2" in result.output


def test_a_last_batch_of_one_row_for_a_process_is_left_out(tmp_path):
    """Three rows for two: batch normalisation would raise in the one, and the other wait for it."""
    assert run(*SMALL, "--batch-size", 23, "--epochs", 1, "--out", tmp_path / "one").exit_code == 0
    done = torchrun(*SMALL, "--batch-size", 23, "--epochs", 1, "--threads", 1, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [len(metrics(tmp_path / folder)["steps"]) for folder in ("one", "two")] == [4, 3]


def test_batches_too_small_for_the_processes(monkeypatch):
    monkeypatch.setattr(train_faces, "fewest_rows", lambda: 17)
    failed(run(*SMALL, "--epochs", 1), 2, "at least 17 images, two for each process, got 16 of 72 training images")


@pytest.mark.parametrize(
    "options, word",
    [([], "torchrun"), (["--head", "both"], "--head fused"), (["--device", "cuda:1"], "a GPU of its own")],
)
def test_without_torchrun_or_with_another_head(options, word):
    failed(run(*SMALL, "--class-parallel", *options), 2, word)
