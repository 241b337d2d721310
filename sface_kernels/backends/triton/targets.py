"""What the kernels compile to for a named GPU, without one: registers, spills, shared memory, tensor-core use.

    python -m sface_kernels.backends.triton.targets --markdown

Runs the launch code on tensors without memory and compiles every launch that it would make (`launch.recording`), with
the specialisations that Triton would choose. Not to be used with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...types import HyperParameters
from . import launch, launch_backward, launch_forward, tiles

# name: (what Triton calls it, threads in a warp, bytes of shared memory that a program may have)
TARGETS = {
    "sm_80": (("cuda", 80), 32, 163 << 10),
    "sm_90": (("cuda", 90), 32, 227 << 10),
    "sm_100": (("cuda", 100), 32, 227 << 10),
    "sm_120": (("cuda", 120), 32, 99 << 10),
    "gfx942": (("hip", "gfx942"), 64, 64 << 10),
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|OMMA)\b|v_mfma_")
# (samples, classes, features): the row shapes that choose tiles and blocks; 100 features leave remainders
SHAPES = [(1024, 1_000_000, 512), (512, 85_742, 128), (32, 10_575, 1024), (100, 1009, 100)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
LOOP_GAP = 400  # lines of machine code; a step of a product is shorter, an epilogue longer


def names() -> list[str]:
    """Targets that can be asked for."""
    return list(TARGETS)


def _launches(family: str, every: bool) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(kernel, arguments, which call it came from) of forwards and backwards in every mode."""
    shapes, dtypes = (SHAPES, DTYPES) if every else (SHAPES[:1], DTYPES[1:2])
    for (n, c, d), (dtype, weight_dtype) in itertools.product(shapes, dtypes):
        x = torch.empty(n, d, dtype=dtype, device="meta")
        w = torch.empty(c, d, dtype=weight_dtype, device="meta")
        target = torch.empty(n, dtype=torch.int64, device="meta")
        recorder = launch.Recorder(family, [])
        with launch.recording(recorder):
            # the default, and a slope for which the cheap form of the screen is not accurate
            for k_inter, dense, need_x in (
                (80.0, False, True),
                (20.0, False, True),
                (80.0, True, True),
                (80.0, True, False),
            ):
                hp = HyperParameters(64.0, 80.0, k_inter, 0.8, 1.23, 0.0 if dense else 2.0**-16)
                saved = launch_forward.forward(x, w, target, hp, need_x, True, dense)[-1]
                launch_backward.grad_weight(x, w, target, x.new_empty(n, dtype=torch.float32), hp, dense, saved)
        short = "×".join(str(t).removeprefix("torch.") for t in dict.fromkeys((dtype, weight_dtype)))
        for kernel, arguments in recorder.taken:
            yield kernel, arguments, f"{short} D={d}"


def _source(kernel: Any, arguments: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel specialised as Triton does at a launch: 1 is a constant, multiples of 16 are marked."""
    signature, constants, attributes = {}, {}, {}
    options = {key: arguments[key] for key in ("num_warps", "num_stages") if key in arguments}
    for index, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name.isupper() or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = "*" + TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


@functools.cache
def _disassembler() -> str | None:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name in ("cuobjdump", "nvdisasm"):
        if (folder / name).exists():
            return str(folder / name)
    return shutil.which("cuobjdump")


def _machine_code(compiled: Any) -> tuple[str, str]:
    """The machine code, and what the tool says of its resources."""
    if "amdgcn" in compiled.asm:
        return compiled.asm["amdgcn"], ""
    tool = _disassembler()
    if tool is None:
        return "", ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        return run([tool, "-sass", file.name]).stdout, run([tool, "-res-usage", file.name]).stdout


def _between_products(code: str, pattern: str) -> int:
    """Occurrences between the first and the last tensor-core instruction of each stretch that has no exit between.

    A stretch is what stands between two of the kernel's other tensor-core loops: instructions more than LOOP_GAP lines
    apart belong to different ones.
    """
    lines = code.splitlines()
    at = [index for index, line in enumerate(lines) if TENSOR_CORES.search(line)]
    stretches: list[list[int]] = []
    for index in at:
        if stretches and index - stretches[-1][1] <= LOOP_GAP:
            stretches[-1][1] = index
        else:
            stretches.append([index, index])
    return sum(bool(re.search(pattern, line)) for first, last in stretches for line in lines[first:last])


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else -1


def _compile(kernel: Any, arguments: dict[str, Any], target: str) -> dict[str, Any]:
    (backend, architecture), warp, shared_limit = TARGETS[target]
    name = kernel.fn.__name__
    row: dict[str, Any] = {"kernel": name, "problem": None}
    source, options = _source(kernel, arguments)
    try:
        compiled = triton.compile(source, target=GPUTarget(backend, architecture, warp), options=options)
    except Exception as error:  # a compiler crash is a finding, not a failure of this program
        text = str(error).strip().splitlines()
        return {**row, "problem": f"does not compile: {type(error).__name__}: {text[-1] if text else ''}"[:200]}
    code, resources = _machine_code(compiled)
    row["shared_bytes"] = compiled.metadata.shared
    if backend == "hip":
        row["registers"] = _number(r"\.vgpr_count:\s*(\d+)", code)
        row["spills"] = _number(r"\.vgpr_spill_count:\s*(\d+)", code)
        fp64 = len(re.findall(r"v_(?:add|mul|fma|cvt\w*)_f64", code))
        row["spills_in_products"] = _between_products(code, r"scratch_(?:load|store)")
    else:
        row["registers"] = _number(r"REG:(\d+)", resources)
        row["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", code))
        row["spills_in_products"] = _between_products(code, r"\b(?:LDL|STL)\b")
        fp64 = len(re.findall(r"\b(?:DADD|DMUL|DFMA|F2F\.F64\S*)\b", code))
    row["tensor_core_instructions"] = len(TENSOR_CORES.findall(code))
    row["instructions"] = len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+\S", code))
    problems = []
    if row["shared_bytes"] > shared_limit:
        problems.append(f"{row['shared_bytes']} B of shared memory, the target has {shared_limit}")
    if fp64:
        problems.append(f"{fp64} fp64 instructions")
    ieee = arguments.get("PRECISION") == "ieee"
    if code and name in tiles.TABLES and not ieee and not row["tensor_core_instructions"]:
        problems.append("no tensor-core instruction")
    row["problem"] = "; ".join(problems) or None
    return row


def variant(arguments: dict[str, Any], call: str) -> str:
    flags = [name.lower() for name, value in arguments.items() if name.isupper() and value is True]
    return ", ".join([call, *flags, *([arguments["PRECISION"]] if "PRECISION" in arguments else [])])


def compile_table(target: str, every: bool = False) -> list[dict[str, Any]]:
    """One row per distinct kernel that a call would launch on `target`, an entry of `names()`.

    Keys: kernel, variant, registers, spills (local-memory instructions), shared_bytes, tensor_core_instructions,
    instructions, problem (None or what is wrong). `every` covers all dtypes and shapes, else one call in all its modes.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {names()}, got {target!r}")
    rows, seen = [], set()
    for kernel, arguments, call in _launches(target, every):
        source, options = _source(kernel, arguments)
        key = (source.hash(), *sorted(options.items()))
        if key in seen:
            continue
        seen.add(key)
        rows.append({**_compile(kernel, arguments, target), "variant": variant(arguments, call)})
    return rows


def markdown(table: list[dict[str, Any]]) -> str:
    columns = (
        "kernel",
        "variant",
        "registers",
        "spills",
        "spills_in_products",
        "shared_bytes",
        "tensor_core_instructions",
        "instructions",
    )
    lines = ["| " + " | ".join(columns) + " | problem |", "|---" * (len(columns) + 1) + "|"]
    for row in table:
        lines.append("| " + " | ".join(str(row.get(c, "")) for c in columns) + f" | {row['problem'] or ''} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--every", action="store_true", help="all dtypes and shapes")
    options = parser.parse_args()
    failed: collections.Counter[str] = collections.Counter()
    for target in options.targets.split(","):
        table = compile_table(target, options.every)
        failed[target] = sum(row["problem"] is not None for row in table)
        print(f"\n### {target}, Triton {triton.__version__}\n\n{markdown(table)}")
    return 1 if failed.total() else 0


if __name__ == "__main__":
    sys.exit(main())
