"""setup.py and compilers that know less than today's: what they cannot compile is left out, by itself, and said.

The compiler of `build` is a script that writes down what it is asked and makes empty files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.support.cases import ROOT

SETS = ("amx", "avx512", "avx2")  # files of csrc/cpu/simd that a compiler may lack the instructions of
COMPILER = """#!/bin/sh
echo "$*" >> {log}
[ "$1" = --version ] && echo "g++ 9.9.9" && exit
for word; do
  case "$word" in {refused}) echo "error: unknown instruction set" >&2; exit 1;; esac
  [ "$before" = -o ] && : > "$word"
  [ "$before" = -MF ] && : > "$word"
  before=$word
done
"""


def build(folder: Path, refused: str, ninja: bool) -> tuple[str, list[str]]:
    """What `setup.py build_ext` prints with a compiler that refuses files of these names, and what it asked of it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "sface_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so"))
    tools, log = folder / "tools", folder / "log"
    tools.mkdir()
    compiler = tools / "c++"
    compiler.write_text(COMPILER.format(log=log, refused=refused))
    compiler.chmod(0o755)
    found = shutil.which("ninja") if ninja else None
    if ninja and found is None:
        pytest.skip("no ninja on this machine")
    if found:
        (tools / "ninja").symlink_to(found)
    told = {"CXX": str(compiler), "CC": str(compiler), "LDSHARED": str(compiler), "PATH": f"{tools}:/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **told},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, log.read_text().splitlines()


def warnings(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("warning: sface_kernels")]


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
@pytest.mark.parametrize("unknown", [(), ("amx",), SETS], ids="-".join)
def test_an_instruction_set_is_left_out_by_itself(tmp_path, unknown, ninja):
    printed, asked = build(tmp_path, "|".join(f"*/simd/{name}.cpp" for name in unknown) or "none", ninja)
    (linked,) = [line for line in asked if "_C.so" in line]
    assert {name for name in (*SETS, "baseline") if f"/{name}.o" in linked} == {*SETS, "baseline"} - set(unknown)
    compiled = [line for line in asked if "dispatch.cpp" in line]
    assert compiled
    for name in SETS:
        assert all((f"-DSFACE_WITHOUT_{name.upper()}" in line) == (name in unknown) for line in compiled)
    assert len(warnings(printed)) == len(unknown)
    assert all(f"{name}.cpp" in line for name, line in zip(unknown, warnings(printed), strict=True))
    assert (tmp_path / "sface_kernels" / "_C.so").exists()


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_a_compiler_that_compiles_nothing(tmp_path, ninja):
    """The package is built without the library, and one line says so."""
    printed, _ = build(tmp_path, "*.cpp", ninja)
    assert not (tmp_path / "sface_kernels" / "_C.so").exists()
    assert len(warnings(printed)) == 1 and "without its C++ kernels" in printed


def test_nothing_refers_to_what_is_left_out(tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("no C++ compiler or no nm on this machine")
    flags = ["-std=c++2a", "-O0", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    where = [f"-I{path}" for path in include_paths()]
    for without in ((), SETS):
        out = tmp_path / "dispatch.o"
        left_out = [f"-DSFACE_WITHOUT_{name.upper()}" for name in without]
        command = [compiler, *flags, *left_out, *where, "-c", str(ROOT / "csrc/cpu/dispatch.cpp"), "-o", str(out)]
        subprocess.run(command, check=True)
        listed = subprocess.run(["nm", "-C", str(out)], capture_output=True, text=True, check=True).stdout
        referred = {name for name in ("amx", "avx2", "avx512") if f"sface::{name}::" in listed}
        assert not referred & set(without)
        assert without or sys.platform != "linux" or os.uname().machine != "x86_64" or referred == set(SETS)
