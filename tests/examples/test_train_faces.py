"""The training example: what it writes, how it resumes, and what it says to bad input."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.examples.running import ROOT, SMALL, generate_faces, metrics, run, train_faces, write_faces

from faces.folder import load_folder  # isort: skip  # running puts it on the path
from faces.verification import area, best_threshold, roc, tar_at_far  # isort: skip

REAL_FACES = ROOT.parent / "shared" / "data" / "orl_faces"
STEP_KEYS = {"loss", "intra", "inter", "cos_target", "cos_other", "accuracy"}


def test_both_heads_side_by_side(tmp_path):
    """The real faces where they are, generated ones elsewhere."""
    data = ["--data", REAL_FACES] if REAL_FACES.is_dir() else ["--identities", "40", "--images-per-identity", "10"]
    result = run(*data, "--head", "both", "--epochs", 6, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    fused, reference = metrics(tmp_path / "fused"), metrics(tmp_path / "reference")
    # The same weights and images, so only rounding parts the first losses. A cosine off by 2⁻²³ moves a coefficient
    # by k·2⁻²³ = 1e-5 of itself, and the terms of a loss near 0 are tens of times larger than their sum.
    first, other = fused["steps"][0], reference["steps"][0]
    assert first["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-4)
    assert first.keys() >= STEP_KEYS
    for run_metrics in (fused, reference):
        last = run_metrics["epochs"][-1]
        assert "tar" in str(last).lower() and "auc" in str(last).lower()
        values = [value for key, value in _flat(last).items() if key.lower().endswith("auc")]
        # Above chance, 0.5: scores that know nothing of the 10 unseen people stray by less than 0.05 (450 genuine
        # pairs, of which about 100 are independent: 0.5/√100). A short run cannot promise more.
        assert values and values[0] > 0.65
    for name in ("fused", "reference"):
        assert set(torch.load(tmp_path / name / "head.pt", weights_only=True)) == {"weight"}
        assert (tmp_path / name / "backbone.pt").exists() and list((tmp_path / name).rglob("events.out.tfevents*"))
    if sys.platform == "linux":  # head_memory reads /proc
        assert all(head["head_peak_mib"] is not None for head in metrics(tmp_path)["heads"].values())
    for plot in ("losses", "cosines", "roc", "angles"):
        assert (tmp_path / f"{plot}.png").stat().st_size > 5000


def _flat(tree: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    whole = run(*SMALL, "--epochs", 3, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    steps: list = []
    plain = train_faces.training_step

    def interrupted(*arguments):
        steps.append(None)
        if len(steps) == 8:  # in the second epoch
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(train_faces, "training_step", interrupted)
    broken = run(*SMALL, "--epochs", 3, "--out", tmp_path / "parts")
    assert broken.exit_code == 130 and "--resume" in broken.output
    assert len(metrics(tmp_path / "parts")["steps"]) == 7
    monkeypatch.undo()
    resumed = run(*SMALL, "--epochs", 3, "--out", tmp_path / "parts", "--resume")
    assert resumed.exit_code == 0, resumed.output
    losses = [[step["loss"] for step in metrics(tmp_path / name)["steps"]] for name in ("whole", "parts")]
    assert losses[0] == losses[1]

    other = run(
        *SMALL[:-4], "--embedding-size", 16, "--batch-size", 16, "--epochs", 3, "--out", tmp_path / "parts", "--resume"
    )
    assert other.exit_code == 2 and "embedding size: 32, and this run has 16" in " ".join(other.output.split())


def test_a_broken_image_is_named_counted_and_skipped(tmp_path):
    write_faces(tmp_path, 5)
    (tmp_path / "person2" / "bad.png").write_bytes(b"no image")
    faces, broken = load_folder(tmp_path)
    assert len(broken) == 1 and "person2/bad.png" in broken[0]
    assert len(faces.images) == 20


@pytest.mark.parametrize("identities", [0, 1])
def test_too_few_identities(tmp_path, identities):
    write_faces(tmp_path / "data", identities) if identities else (tmp_path / "data").mkdir()
    result = run("--data", tmp_path / "data", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "expected" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option, value", [("--lr", -1), ("--val-fraction", 2), ("--k", 0), ("--device", "cuda:7"), ("--batch-size", 0)]
)
def test_nonsense_options(tmp_path, option, value):
    result = run(*SMALL, "--out", tmp_path, option, value)
    assert result.exit_code == 2
    assert option in result.output and "expected" in result.output


def test_generated_faces_are_the_seeds():
    first, again, other = (generate_faces(3, 2, seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_verification_by_hand():
    """Four scores, genuine at 0.9 and 0.3: one impostor of two lies above the second genuine pair."""
    scores, same = torch.tensor([0.9, 0.5, 0.3, 0.1]), torch.tensor([True, False, True, False])
    far, tar = roc(scores, same)
    assert area(far, tar) == pytest.approx(0.75)
    assert tar_at_far(far, tar, 0.0) == 0.5 and tar_at_far(far, tar, 0.5) == 1.0
    assert best_threshold(scores, same) == pytest.approx(0.7) or best_threshold(scores, same) == pytest.approx(0.2)
