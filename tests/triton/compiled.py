"""A pytest plugin: the Triton backend's kernels as compiled PTX, executed on the CPU by the emulator ptxemu.

    SFACE_PTX=sm_90 python -m pytest -p tests.triton.compiled tests/triton/test_triton.py -k triton

The emulator is a folder of its own, at $PTXEMU, else ../shared/ptxemu beside this repository; without it every test is
skipped. Triton compiles as for the GPU that SFACE_PTX names, and tensors on the CPU pass for its own. A test also fails
where the emulator finds a fault: an access out of bounds, a race, a result that depends on bytes nobody wrote.
Where the emulator cannot multiply int8, `tiles.INT8_SCREEN` is emptied, so that every screen is in fp16, and the last
line of the run says so. SFACE_PTX_FUSION=0 compiles without the fusion of products and sums; PTXEMU_NOISE=1 lets approximate divisions, square
roots and exponentials be off by an ulp. SFACE_PTX_SPECIALISED=1 specialises the warps of every screen that can be.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("PTXEMU", ROOT.parent / "shared" / "ptxemu"))
GPU = os.environ.get("SFACE_PTX", "sm_90")
MISSING = None if (FOLDER / "emulator.py").exists() else f"no PTX emulator at {FOLDER} (PTXEMU names its folder)"
# What a product of int8 compiles to, but on sm_90 and there.
INT8_PRODUCT = (
    "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32",
    "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8",
)
emulator: Any = None


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before any conftest or test module is imported: the kernels' decorators must not see the interpreter, and
    tests/support/cases.py asks then whether Triton runs on this CPU."""
    global emulator
    if MISSING:
        return
    os.environ.setdefault("PTXEMU_CACHE", str(ROOT / "build" / "ptxemu"))
    sys.path.append(str(FOLDER))
    emulator = importlib.import_module("emulator").install(GPU)
    emulator.options.noise_ulps = int(os.environ.get("PTXEMU_NOISE", "0"))
    _read_jump_tables()
    from sface_kernels.backends.triton import device, kinds, tiles

    if not _multiplies_int8():
        tiles.INT8_SCREEN = ()
    if os.environ.get("SFACE_PTX_SPECIALISED") == "1":
        tiles.SPECIALISED_TILES = 0
    kinds.COMPILE_OPTIONS["enable_fp_fusion"] = os.environ.get("SFACE_PTX_FUSION") != "0"
    capability = int(GPU[3:-1]), int(GPU[-1])
    pretence = device.pretend(capability, allocated=_undefined)
    pretence.__enter__()
    early_config.add_cleanup(lambda: pretence.__exit__(None, None, None))


def pytest_sessionstart() -> None:
    from tests.support.cases import INTERPRETED

    assert MISSING or INTERPRETED, "tests/support/cases.py was imported too early: none of its cases is Triton's"


def _read_jump_tables() -> None:
    """Specialised warps find their part by a jump table, which the emulator does not read: comparisons instead."""
    program = importlib.import_module("ptx").Program
    plain = program.__init__

    def without_tables(ptx: str) -> str:
        table = r"(\$L_brx_\d+):\s*\.branchtargets\s+([^;]+);"
        tables = {name: re.split(r",\s*", targets.strip()) for name, targets in re.findall(table, ptx)}

        def compared(jump: re.Match[str]) -> str:
            *targets, last = tables[jump[2]]
            one_by_one = (f"setp.eq.s32 %p_jump, {jump[1]}, {i};\n@%p_jump bra {to};" for i, to in enumerate(targets))
            return "\n".join([*one_by_one, f"bra {last};"])

        ptx = re.sub(r"brx\.idx\s+(%\w+),\s*(\$L_brx_\d+);", compared, re.sub(table, "", ptx))
        body = ptx.index("{", ptx.index(")", ptx.index(".entry"))) + 1
        return f"{ptx[:body]}\n.reg .pred %p_jump;\n{ptx[body:]}" if tables else ptx

    program.__init__ = lambda self, ptx, *others: plain(self, without_tables(ptx), *others)


def _multiplies_int8() -> bool:
    try:
        importlib.import_module("ptx").operation(INT8_PRODUCT[GPU == "sm_90"])
    except Exception as error:
        if type(error).__name__ != "Unsupported":
            raise
        return False
    return True


def _undefined(buffer: torch.Tensor) -> torch.Tensor:
    return buffer if isinstance(buffer, FakeTensor) or buffer.is_meta else emulator.undefined(buffer)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if MISSING:
        pytest.skip(MISSING)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    emulator.findings.clear()
    try:
        result = yield
        errors = [str(finding) for finding in emulator.findings if finding.is_error]
        assert not errors, "\n".join(errors[:20])
        return result
    finally:
        emulator.forget()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if emulator is not None:
        launches, kernels = sum(emulator.launches.values()), sum(map(len, emulator.variants.values()))
        if launches:  # none where xdist's workers made them
            terminalreporter.write_line(
                f"{GPU}: {launches} launches of {kernels} compiled kernels, {emulator.seconds:.0f} s in the emulator"
            )
        if not importlib.import_module("sface_kernels.backends.triton.tiles").INT8_SCREEN:
            terminalreporter.write_line("screens in fp16 only: this emulator does not multiply int8")
