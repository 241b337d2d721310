"""Every kernel compiled for GPUs that need not be here: it compiles, fits, uses the tensor cores and does not spill.

In processes of its own, as nothing else in the suite imports Triton and the interpreter would stand in for the compiler.
The two widths of a product's operands, at the size that counts; SFACE_COMPILE_EVERY=1 takes every case of the report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.support.cases import ROOT

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
MULTIPLYING = {"screen", "coefficients", "row_gradient", "class_gradient"}
REPORT = [sys.executable, "-m", "sface_kernels.backends.triton.tools.compile_report"]
# Words of a thread, most of those of coefficients for tiles with masks: 36 with Triton 3.7, 44 with 3.6, 339 with 3.9.
# A few numbers wait in memory where the compiler takes fewer registers of its own accord, for more programs.
SPILLS = {"screen": 40, "class_gradient": 40, "coefficients": 350, "scatter_classes": 8, "rescore": 8}
KERNELS = MULTIPLYING | {"prepare", "regroup", "rescore", "finish_samples", "scatter_classes", "scale"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


# compiles one screen alone: as the command, with what it is asked for cut down
SCREEN_ALONE = """import sys
from sface_kernels.backends.triton.tools import compile_report
distinct = compile_report.distinct
compile_report.distinct = lambda launches: [one for one in distinct(launches) if one[0].fn.__name__ == "screen"][:1]
sys.exit(compile_report.main())"""


def table(target: str, *options: str, tiles: str | None = None) -> tuple[list[dict], int]:
    """The rows, and the command's exit status; with `tiles`, that of one screen."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["SFACE_TILES"] = tiles or "{}"
    command = [sys.executable, "-c", SCREEN_ALONE] if tiles else REPORT
    command = [*command, "--json", "--targets", target, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)[target], done.returncode


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_fits_and_uses_the_tensor_cores(target):
    """All that is asked of a target in one test, as its kernels take up to a minute to compile.

    `problem` also tells of fp64, of products without tensor cores and of spills in a product's loop.
    """
    rows = table(target, *(["--every"] if os.environ.get("SFACE_COMPILE_EVERY") == "1" else []))[0]
    if any("ROCm linker" in (row["problem"] or "") for row in rows):
        pytest.skip("this Triton brings no linker for AMD, and TRITON_HIP_LLD_PATH names none")
    problems = [f"{row['kernel']} ({row['variant']}): {row['problem']}" for row in rows if row["problem"]]
    assert not problems, "\n".join(problems)
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["tensor_core_instructions"] for row in rows if row["kernel"] in MULTIPLYING)
    if target in ("sm_80", "sm_90", "sm_100"):  # the instructions per pair that the tensor cores wait for
        screens = [row for row in rows if row["kernel"] == "screen" and "D=512" in row["variant"]]
        assert screens and all(row["epilogue_per_element"] < 28 for row in screens), screens
    if target == "sm_90":  # outside of products some words for another program on the multiprocessor, which is faster
        default = [row for row in rows if row["variant"].startswith("bf16×fp32 D=512")]
        assert len(default) >= 10 and all(row["spills"] <= SPILLS.get(row["kernel"], 0) for row in default)


def test_a_spilling_tile_is_found():
    """The count itself can fail: an accumulator of 128 × 128 does not fit into the registers of 2 warps."""
    rows, status = table("sm_90", tiles='{"screen": {"warps": 2}}')
    assert status == 1 and rows and all(row["spills_in_products"] > 0 for row in rows)
    assert all("spills in the loop of a product" in row["problem"] for row in rows)


def test_too_much_shared_memory_is_found():
    rows, status = table("sm_120", tiles='{"screen": {"stages": 6}}')
    assert status == 1 and any("B of shared memory, the target has" in (row["problem"] or "") for row in rows)


def test_the_command_names_its_targets():
    done = subprocess.run([*REPORT, "--targets", "sm_70"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "expected some of sm_80" in done.stderr
