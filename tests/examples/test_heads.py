"""The heads beside SFace's own, and what a run shows while it goes on."""

from __future__ import annotations

import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from tests.examples.running import TINY, failed, metrics, run, train_faces, write_faces

from faces import watch  # isort: skip  # running puts it on the path
from faces.arcface import ArcFaceLoss  # isort: skip
from faces.options import TrainOptions  # isort: skip

from sface_kernels import cli
from sface_kernels.angles import count_angles
from tests.support.command import one_line


def by_formula(head: ArcFaceLoss, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log(e^{s·cos(θ_y + m)} / (e^{s·cos(θ_y + m)} + Σ_{j≠y} e^{s·cos θ_j})), row by row with arccos, float64."""
    losses = []
    for row, label in zip(x.double(), labels.tolist(), strict=True):
        theta = torch.stack([torch.dot(row / row.norm(), w / w.norm()) for w in head.weight.double()]).acos()
        own = torch.cos(theta[label] + head.margin)
        if theta[label] > math.pi - head.margin:
            own = theta[label].cos() - head.margin * math.sin(head.margin)
        others = torch.cat((theta[:label], theta[label + 1 :])).cos()
        losses.append(torch.logsumexp(head.s * torch.cat((own.view(1), others)), 0) - head.s * own)
    return torch.stack(losses).mean()


def test_arcface_is_its_formula_and_so_is_its_gradient():
    head = ArcFaceLoss(8, 6, s=16.0).double()
    x, labels = torch.randn(5, 8, dtype=torch.float64), torch.tensor([0, 5, 2, 2, 1])
    x[3] = -head.weight.detach()[2] + 0.1 * torch.randn(8)  # past π − m
    x.requires_grad_()
    loss, stats = head(x, labels, return_stats=True)
    expected = by_formula(head, x, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x, head.weight)), torch.autograd.grad(expected, (x, head.weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(stats.intra + stats.inter, loss.detach())
    cos = F.normalize(x) @ F.normalize(head.weight).t()
    assert float(stats.accuracy) == float((cos.argmax(1) == labels).double().mean())
    assert not any(value.requires_grad for value in stats) and torch.equal(head(x, labels), loss)


def test_arcface_at_its_own_centre_has_finite_gradients():
    head = ArcFaceLoss(8, 6)
    x = head.weight.detach()[:2].clone().requires_grad_()
    head(x, torch.tensor([0, 1])).backward()
    assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(head.weight.grad).all())


def test_a_run_with_arcface_and_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    failed(
        run(*TINY, "--out", tmp_path / "no"),
        2,
        "error: --tensorboard: tensorboard is not installed",
        "--no-tensorboard",
    )
    assert not (tmp_path / "no").exists()
    out = tmp_path / "run"
    result = run(*TINY, "--head", "arcface", "--epochs", 2, "--no-tensorboard", "--live-plot", "--out", out)
    assert result.exit_code == 0 and "ArcFace in plain PyTorch" in result.output and "--logdir" not in result.output
    assert metrics(out)["head"] == "arcface" and set(torch.load(out / "head.pt", weights_only=True)) == {"weight"}
    assert not (out / "tensorboard").exists()
    assert {path.name for path in out.glob("*.png")} == {
        "losses.png",
        "cosines.png",
        "roc.png",
        "angles.png",
        "live.png",
    }
    again = run(*TINY, "--head", "arcface", "--epochs", 2, "--no-tensorboard", "--out", out, "--resume")
    assert again.exit_code == 0 and "going on after epoch 2" in again.output


def test_the_live_plot_is_rewritten_when_it_is_time(tmp_path, monkeypatch):
    clock, drawn = [100.0], []
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(watch, "draw_live", lambda *arguments: drawn.append(arguments))
    live = watch.LivePlot(tmp_path / "live.png", "fused", TrainOptions())
    head = torch.nn.Linear(1, 1)
    for clock[0] in (100.0, 101.0, 114.0, 115.0, 116.0):
        live.update([], head)
    assert len(drawn) == 2
    live.update([], head, now=True)
    assert len(drawn) == 3 and drawn[0][1] is None
    watch.LivePlot(None, "fused", TrainOptions()).update([], head, now=True)
    assert len(drawn) == 3


@pytest.mark.parametrize("width", [12, 20, 30, 40, 60, 80, 120, 200])
def test_progress_takes_one_line_at_any_width(width):
    shown = io.StringIO()
    console = Console(file=shown, width=width, force_terminal=True, color_system=None)
    progress = watch.training_progress(console)
    progress.add_task("reference", total=100_000, completed=4000, loss=-137.25, rate=123_456.0)
    console.print(progress.get_renderable())
    line = shown.getvalue()
    assert line.count("\n") == 1 and len(line) <= width + 1 and "refer" in line
    assert "…" not in line or width < 20
    assert ("loss -137.25" in line) == (width >= 30) and (" left" in line) == (width >= 60)
    assert ("123456 samples/s" in line) == (width >= 80)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_faces, "draw_all", lambda *_: [])
        assert run(*TINY, "--epochs", 2, "--out", folder / "generated").exit_code == 0
        write_faces(folder / "faces", 4)
        options = ["--val-fraction", 0.5, "--embedding-size", 4, "--batch-size", 4, "--epochs", 1]
        assert run("--data", folder / "faces", *options, "--a", 0.9, "--out", folder / "folder").exit_code == 0
    return folder


def test_the_command_shows_the_angles_of_a_checkpoint(trained, tmp_path, capsys, monkeypatch):
    seen = []

    def count(embeddings, weight, labels):
        seen.append((embeddings, weight, labels))
        return count_angles(embeddings, weight, labels)

    monkeypatch.setattr("faces.angles.count_angles", count)
    checkpoint = trained / "folder" / "checkpoint.pt"
    assert (
        cli.main(["angles", str(checkpoint), "--data", str(trained / "faces"), "--out", str(tmp_path / "a.png")]) == 0
    )
    text = capsys.readouterr().out
    assert "of this run" in text and "0.90" in text and "MS1MV2" in text and "a = " in text
    assert (tmp_path / "a.png").stat().st_size > 5000
    ((embeddings, weight, labels),) = seen
    state = torch.load(checkpoint, weights_only=True)
    assert torch.equal(weight, state["head"]["weight"]) and len(embeddings) == len(labels) == 8
    assert cli.main(["angles", str(trained / "generated" / "checkpoint.pt")]) == 0
    state["metrics"]["head"] = "arcface"  # which has no a and b
    torch.save(state, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    assert cli.main(["angles", str(tmp_path / "checkpoint.pt"), "--data", str(trained / "faces")]) == 0
    assert "of this run" not in capsys.readouterr().out


def test_the_command_says_what_it_cannot_use(trained, tmp_path, capsys):
    folder, generated = trained / "folder" / "checkpoint.pt", trained / "generated" / "checkpoint.pt"
    write_faces(tmp_path / "others", 5)
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weight": torch.zeros(2, 4)}, tmp_path / "weights.pt")
    state = torch.load(generated, weights_only=True)
    torch.save({**state, "backbone": {}}, tmp_path / "backbone.pt")
    torch.save({**state, "head": {}}, tmp_path / "head.pt")
    for arguments, words in (
        (["angles"], ["CHECKPOINT"]),
        (["angles", tmp_path / "none.pt"], ["cannot read", "none.pt"]),
        (["angles", tmp_path / "text.pt"], ["text.pt is no checkpoint of this program"]),
        (["angles", tmp_path / "weights.pt"], ["is no checkpoint of this program: it lacks 'epoch'"]),
        (["angles", tmp_path / "backbone.pt"], ["is no checkpoint of this program", "Missing key"]),
        (["angles", tmp_path / "head.pt"], ["is no checkpoint of this program"]),
        (["angles", folder], ["--data: expected the folder of faces", "got none"]),
        (["angles", folder, "--data", tmp_path / "nowhere"], ["--data: expected a folder", "nowhere"]),
        (["angles", folder, "--data", tmp_path / "others"], ["--data: expected the faces that", "training identities 2, got"]),
        (["angles", generated, "--data", trained / "faces"], ["generated faces, leave the folder out"]),
        (["angles", generated, "--out", tmp_path / "no" / "a.png"], ["--out", "cannot write"]),
        (["angles", generated, "--examples", tmp_path], ["--examples: expected the folder examples/ of a checkout"]),
    ):  # fmt: skip
        assert cli.main([str(word) for word in arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(word in error for word in words), error


def test_a_format_that_matplotlib_does_not_know(trained, tmp_path, capsys):
    assert cli.main(["angles", str(trained / "generated" / "checkpoint.pt"), "--out", str(tmp_path / "a.xyz")]) == 2
    one_line(capsys, "--out", "xyz")
