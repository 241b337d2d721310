"""What the documents name is there: imports, files, commands, environment variables, and no figure without a source.
The snippets of docs/training.md run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.cases import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text() for path in DOCUMENTS}
SOURCES = "".join(
    path.read_text()
    for path in [ROOT / "setup.py", *(ROOT / "sface_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
)


def test_imports():
    found = {
        match for text in TEXT.values() for match in re.findall(r"from (sface_kernels[\w.]*) import ([\w, ]+)", text)
    }
    assert ("sface_kernels", "SFaceLoss") in found
    for module, names in found:
        if module == "sface_kernels.compat.metric_learning" and not importlib.util.find_spec("pytorch_metric_learning"):
            continue
        for name in names.split(","):
            name = name.strip()
            is_module = importlib.util.find_spec(f"{module}.{name}") if module == "sface_kernels" else None
            assert is_module or hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


def test_files_and_folders():
    """Paths in backquotes that look like this repository's."""
    roots = ("sface_kernels/", "csrc/", "benchmarks/", "tests/", "docs/", "examples/")
    package = ("backends/", "testing/", "bench/", "compat/", "cli/")
    for name, text in TEXT.items():
        for path in re.findall(r"`([\w./-]+/[\w./-]*)`", text):
            if path.startswith(roots):
                assert (ROOT / path).exists(), f"{name}: {path}"
            elif path.startswith(package):
                assert (ROOT / "sface_kernels" / path).exists(), f"{name}: {path}"


def test_named_tests_are_there():
    """In a table row the file may be named once, with several tests of it."""
    for line in TEXT["robustness.md"].splitlines():
        paths = re.findall(r"`(tests/[\w/]+\.py)", line)
        for name in re.findall(r"\b(test_\w+|Test\w+)(?!\w*\.py|/)`", line):
            assert (
                any(re.search(rf"^ *(def|class) {name}\b", (ROOT / path).read_text(), re.M) for path in paths)
                or not paths
            ), name


def test_the_installation_names_what_the_build_needs():
    """Without pip's build isolation nobody brings it: a fresh environment of Python 3.10 or 3.11 has an older one."""
    (needed,) = re.findall(r'requires = \["(setuptools[^"]+)"\]', (ROOT / "pyproject.toml").read_text())
    assert f"'{needed}'" in TEXT["README.md"].partition("pip install --no-build-isolation")[0]


def test_make_targets():
    targets = set(re.findall(r"^([a-z0-9-]+)(?:\s+[a-z0-9-]+)*:", (ROOT / "Makefile").read_text(), re.M))
    for name, text in TEXT.items():
        for called in re.findall(r"(?:^    |`)make ([a-z0-9-]+)(?=[\s`;])", text, re.M):
            assert called in targets, f"{name}: make {called}"


def test_environment_variables():
    described = set(re.findall(r"^\| `(SFACE_[A-Z_]+)", TEXT["README.md"], re.M))
    read = set(re.findall(r'(?:environ\.get|getenv)\("(SFACE_[A-Z_]+)"', SOURCES))
    assert described == read and "SFACE_VERIFY" in read


def snippets(text: str) -> list[tuple[int, str]]:
    """Indented blocks with the number of their first line, without those that hold nothing but a shell's commands."""
    found: list[tuple[int, str]] = []
    block: list[str] = []
    for number, line in enumerate([*text.splitlines(), "end"], 1):
        if line.startswith("    ") or (block and not line):
            block.append(line[4:])
        elif block:
            if not all(part.startswith(("pip ", "python ", "sface-kernels ", "make ", "#")) for part in block if part):
                found.append((number - len(block), "\n".join(block)))
            block = []
    return found


@pytest.mark.parametrize("first, code", [pytest.param(*s, id=f"line{s[0]}") for s in snippets(TEXT["training.md"])])
def test_training_snippets_run(first, code, tmp_path, monkeypatch):
    """Each by itself, with what a reader has already: a backbone, a loader and its batch."""
    nodes = list(ast.walk(ast.parse(code)))
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for module in [*imported, *(node.module for node in nodes if isinstance(node, ast.ImportFrom))]:
        if not module.startswith("sface_kernels"):
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)  # Lightning writes logs and a checkpoint
    data = TensorDataset(torch.randn(24, 6), torch.arange(24) % 11)
    loader = DataLoader(data, batch_size=8)
    images, labels = next(iter(loader))
    reader = dict(torch=torch, backbone=nn.Linear(6, 16), embedding_size=16, num_classes=11, loader=loader)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of a loader without workers
        exec(
            compile("\n" * (first - 1) + code, "docs/training.md", "exec"),
            {**reader, "images": images, "labels": labels},
        )


def test_a_snippet_that_fails_is_seen():
    text = "Text.\n\n    x = 1\n\n    assert x == 2\n\n    pip install nothing\n"
    ((first, code),) = snippets(text)
    assert first == 3 and code.startswith("x = 1\n\nassert")
    assert snippets("    pip install\n\nText\n    y = 1\n") == [(4, "y = 1")]
    with pytest.raises(SyntaxError):
        ast.parse(snippets("    pip install\n\n    y = 1\n")[0][1])
