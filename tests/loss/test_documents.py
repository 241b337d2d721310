"""What the documents name is there: imports, files, commands, environment variables, and no figure without a source."""

from __future__ import annotations

import importlib
import re

import pytest

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
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"


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


def test_make_targets():
    targets = set(re.findall(r"^([a-z0-9-]+)(?:\s+[a-z0-9-]+)*:", (ROOT / "Makefile").read_text(), re.M))
    for name, text in TEXT.items():
        for called in re.findall(r"(?:^    |`)make ([a-z0-9-]+)(?=[\s`;])", text, re.M):
            assert called in targets, f"{name}: make {called}"


def test_environment_variables():
    for name in set(re.findall(r"`(SFACE_[A-Z_]+)", TEXT["README.md"])):
        assert name in SOURCES, name
