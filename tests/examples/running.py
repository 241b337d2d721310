"""Running the training example in a test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_faces.py"
sys.path.insert(0, str(SCRIPT.parent))

for needed in ("matplotlib", "PIL", "rich", "tensorboard"):
    pytest.importorskip(needed)
typer_testing = pytest.importorskip("typer.testing")
import torch  # noqa: E402
import train_faces  # noqa: E402
import typer  # noqa: E402
from faces.cartoon import generate_faces  # noqa: E402
from PIL import Image  # noqa: E402

# A byte in a file's name that is no UTF-8; Apple's file system refuses it
ODD_BYTE = "e" if sys.platform == "darwin" else os.fsdecode(b"\xe9")
SMALL = ["--identities", "16", "--images-per-identity", "6", "--embedding-size", "32", "--batch-size", "16"]
TINY = ["--identities", "4", "--images-per-identity", "2", "--embedding-size", "4", "--batch-size", "4"]
# One step of TINY is an epoch: 2 of its 4 identities train, 2 images of each.
TINY += ["--val-fraction", "0.5"]


def run(*arguments: object):
    """The command in this process, which keeps its number of threads: losses are compared to the bit."""
    app, threads = typer.Typer(), torch.get_num_threads()
    app.command()(train_faces.command)
    try:
        return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def failed(result, status: int, *words: str) -> None:
    """The run ended with this status, a last line that has the words, and no traceback."""
    output = result.output.strip()
    assert isinstance(result.exception, SystemExit), (result.exception, output)
    assert result.exit_code == status, output
    assert "Traceback" not in output
    assert all(word in output.splitlines()[-1] for word in words), output


def metrics(folder: Path) -> dict[str, Any]:
    return strict_json(folder / "metrics.json")


def strict_json(path: Path) -> Any:
    """The content of a file that is JSON by RFC 8259: no NaN, and text that can be encoded."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{path}: {constant} is not JSON")

    content = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


def write_faces(folder: Path, identities: int, each: int = 4) -> None:
    images, labels = generate_faces(identities, each, seed=1)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        person = folder / f"person{int(label)}"
        person.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze().numpy()).save(person / f"{number}.png")
