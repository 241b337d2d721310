"""The study of wrong labels: what it does to labels, and how runs become lines."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch

from benchmarks import noise_study
from tests.examples.running import generate_faces

from faces.data import FaceSet  # isort: skip  # running puts it on the path


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 1.0])
def test_exactly_the_share_gets_another_label(share):
    labels = torch.arange(300) % 7
    noisy = noise_study.mislabelled(labels, share, seed=1)
    assert int((noisy != labels).sum()) == round(300 * share)
    assert int(noisy.min()) >= 0 and int(noisy.max()) <= 6
    assert torch.equal(noisy, noise_study.mislabelled(labels, share, seed=1)) and torch.equal(
        labels, torch.arange(300) % 7
    )
    if share == 1.0:  # each of the 6 other classes 50 times on average
        assert bool((((noisy - labels) % 7).bincount(minlength=7)[1:] - 50).abs().le(6 * 50**0.5).all())


def test_lines_of_the_table_by_hand():
    runs = {}
    for seed, (sface, arcface) in enumerate([(0.90, 0.80), (0.92, 0.84), (0.94, 0.82), (0.96, 0.86), (0.98, 0.88)]):
        for name, auc in (("default", sface), ("ArcFace", arcface)):
            row = {"a": 0.8, "b": 1.23, "auc": auc, "tar": {"1e-02": auc / 2}}
            runs["real", 0.1, seed, name] = row
    line, other = noise_study.summary(runs)
    assert line["AUC"] == "0.9400 ± 0.0393"  # 2.78 · 0.0316 / √5
    assert line["TAR at FAR 1e-02"] == "0.4700 ± 0.0197" and line["a, b"] == "0.80, 1.23"
    assert line["AUC less ArcFace's"] == "0.1000 ± 0.0176"  # of 0.10, 0.08, 0.12, 0.10, 0.10
    assert other["AUC less ArcFace's"] == "0.0000 ± 0.0000" and other["a, b"] == "–" and line["wrong labels"] == "10%"


def test_it_goes_on_where_it_stopped_and_refuses_other_settings(tmp_path, monkeypatch, capsys):
    out, made = tmp_path / "study.json", []

    def trained(key, faces, a, b):
        made.append((key, a, b))
        return {**dict(zip(noise_study.KEY, key, strict=True)), "a": a, "b": b, "suggested": [0.7, 1.1], "auc": 0.9, "tar": {"1e-02": 0.5}}  # fmt: skip

    monkeypatch.setattr(noise_study, "trained", trained)
    monkeypatch.setattr(noise_study.cartoon, "generate_faces", lambda *_: generate_faces(4, 2, 0))
    for runs in (3, 2):
        monkeypatch.setattr(sys, "argv", ["noise_study", "--out", str(out), "--runs", str(runs)])
        noise_study.main()
    assert [key for key, _, _ in made] == [("generated", noise, 0, name) for noise, name in itertools.product((0.0, 0.1), noise_study.HEADS)][:5]  # fmt: skip
    assert made[2][1:] == (0.7, 1.1) and made[3][1:] == (0.8, 1.23) and len(json.loads(out.read_text())["runs"]) == 5
    monkeypatch.setitem(noise_study.SETTINGS, "batch", 7)
    with pytest.raises(SystemExit):
        noise_study.main()
    assert "has runs with the settings" in capsys.readouterr().err and len(made) == 5


def test_one_training(monkeypatch):
    monkeypatch.setattr(noise_study, "EPOCHS", {"generated": 1})
    faces = FaceSet(*generate_faces(8, 4, 0), "generated")
    for name in ("default", "ArcFace"):
        row = noise_study.trained(("generated", 0.2, 0, name), faces, 0.8, 1.23)
        assert 0 <= row["auc"] <= 1 and row["head"] == name and (row["suggested"] is None) == (name == "ArcFace")
