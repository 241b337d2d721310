"""Every kernel compiled for GPUs that need not be here: it compiles, fits, uses the tensor cores and does not spill.

In processes of its own, as nothing else in the suite imports Triton and the interpreter would stand in for the compiler.
sm_90 gets every case, the others the two widths of a product's operands; SFACE_COMPILE_EVERY=1 gives all of them every case.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.cases import ROOT

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
MULTIPLYING = {"screen", "coefficients", "row_gradient", "class_gradient"}
KERNELS = MULTIPLYING | {"prepare", "finish_samples", "scatter_classes"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def table(target: str, *options: str, tiles: str = "{}") -> tuple[list[dict], int]:
    """The rows, and the command's exit status."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "sface_kernels.backends.triton.tools.compile_report",
        "--json",
        "--targets",
        target,
        *options,
    ]
    environment["SFACE_TILES"] = tiles
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)[target], done.returncode


@functools.cache
def rows_of(target: str) -> list[dict]:
    every = target == "sm_90" or os.environ.get("SFACE_COMPILE_EVERY") == "1"
    return table(target, "--jobs", "2", *(["--every"] if every else []))[0]


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_fits_and_uses_the_tensor_cores(target):
    """`problem` also tells of fp64, of products without tensor cores and of spills in a product's loop."""
    if any("ROCm linker" in (row["problem"] or "") for row in rows_of(target)):
        pytest.skip("this Triton brings no linker for AMD, and TRITON_HIP_LLD_PATH names none")
    problems = [f"{row['kernel']} ({row['variant']}): {row['problem']}" for row in rows_of(target) if row["problem"]]
    assert not problems, "\n".join(problems)
    assert {row["kernel"] for row in rows_of(target)} == KERNELS
    assert all(row["tensor_core_instructions"] for row in rows_of(target) if row["kernel"] in MULTIPLYING)


def test_no_spill_at_all_in_the_default_call_on_sm_90():
    rows = [row for row in rows_of("sm_90") if row["variant"].startswith("bf16×fp32 D=512")]
    assert len(rows) >= 10
    assert not [row for row in rows if row["spills"]]


@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100"))
def test_epilogue_of_the_screen_stays_short(target):
    """Its instructions per pair are what the tensor cores wait for."""
    for row in rows_of(target):
        if row["kernel"] == "screen" and "D=512" in row["variant"]:
            assert row["epilogue_per_element"] < 28, row


def test_a_spilling_tile_is_found():
    """The count itself can fail: an accumulator of 128 × 128 does not fit into the registers of 2 warps."""
    rows, status = table("sm_90", tiles='{"screen": {"warps": 2}}')
    spilling = [row for row in rows if row["kernel"] == "screen"]
    assert status == 1 and spilling and all(row["spills_in_products"] > 0 for row in spilling)
    assert all("spills in the loop of a product" in row["problem"] for row in spilling)


def test_too_much_shared_memory_is_found():
    rows, status = table("sm_120", tiles='{"screen": {"stages": 6}}')
    found = [row for row in rows if "B of shared memory, the target has" in (row["problem"] or "")]
    assert status == 1 and {row["kernel"] for row in found} == {"screen"}


def test_the_command_names_its_targets():
    done = subprocess.run(
        [sys.executable, "-m", "sface_kernels.backends.triton.tools.compile_report", "--targets", "sm_70"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "expected one of ['sm_80'" in done.stderr
