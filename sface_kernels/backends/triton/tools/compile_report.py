"""What the kernels compile to for a named GPU, without one: registers, spills, shared memory, tensor-core use.

    python -m sface_kernels.backends.triton.tools.compile_report --targets sm_90 --every --jobs 2

Runs the launch code on tensors without memory and compiles every launch that it would make (`device.pretend` records
them instead), with the specialisations that Triton would choose. Not to be used with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ....types import HyperParameters
from .. import sequence
from ..device import MULTIPROCESSORS, gpu_of, pretend
from ..kinds import COMPILE_OPTIONS, OPTIONS
from ..plan import screens_int8
from . import machine_code


class Target(NamedTuple):
    gpu: GPUTarget
    capability: tuple[int, int] | None  # of CUDA
    shared_bytes: int  # of shared memory that a program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), (8, 0), 163 << 10),
    "sm_89": Target(GPUTarget("cuda", 89, 32), (8, 9), 99 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), (9, 0), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), (10, 0), 227 << 10),
    "sm_120": Target(GPUTarget("cuda", 120, 32), (12, 0), 99 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), None, 64 << 10),
}
ONCE_A_TILE = 16  # words that a kernel in Gluon may keep elsewhere during a tile
TENSOR_MEMORY = 512  # columns that a program may have on sm_100; where it asks for more, Triton's code is one trap
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
LARGE = (1024, 1_000_000, 512)  # samples, classes, features
# (shape, dtype, weight's dtype). The two widths of a product's operands, which choose the tiles, at a size that counts.
FEW_CASES = [(LARGE, bf16, f32), (LARGE, f32, f32)]
# The other dtypes, and the shapes that choose other tiles and blocks; 100 features leave remainders.
SHAPES = (512, 85_742, 128), (32, 10_575, 1024), (100, 1009, 100)
CASES = [
    *FEW_CASES,
    (LARGE, bf16, bf16),
    (LARGE, f16, f16),
    *((s, dtype, f32) for s in SHAPES for dtype in (bf16, f32)),
]
# (dense, whether ∂x is asked for, of what reduction the forward makes ∂w, whether there is a filter)
MODES = [
    (False, True, "", True),
    (True, True, "", False),
    (True, False, "", False),
    (True, True, "mean", False),
    (True, True, "mean", True),
]


def recorded(
    target: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    hp: HyperParameters,
    dense: bool,
    need_x: bool = True,
    rule: str = "",
    reduction: str = "",
    own_upstream: bool = True,
) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, arguments) of each launch of a forward and backward, or of a step by a rule of `sequence.Move`, on a GPU
    of a name in TARGETS. Each sample has an upstream gradient of its own, or all have that of a mean."""
    n, c, d = shape
    x = torch.empty(n, d, dtype=dtype, device="meta")
    w = torch.empty(c, d, dtype=weight_dtype, device="meta")
    y = torch.empty(n, dtype=torch.int64, device="meta")
    taken: list[tuple[Any, dict[str, Any]]] = []
    capability = TARGETS[target].capability
    hip = None if capability else str(TARGETS[target].gpu.arch)
    with pretend(capability, hip, run=lambda kernel, grid, arguments: taken.append((kernel, arguments))):
        int8 = not dense and screens_int8(hp, d, gpu_of(x.device).family)
        outputs = sequence.forward(x, w, y, hp, need_x, True, dense, MULTIPROCESSORS, int8, reduction)
        if reduction:
            sequence.scale_by(outputs[-1], outputs[0][0])
            return taken
        if rule:
            taken.clear()
        move = sequence.Move(rule, 0.1, 1e-4, w, w if rule == "adamw" else None) if rule else None
        upstream = x.new_empty(n if own_upstream else 1, dtype=f32).expand(n)
        sequence.grad_weight(x, w, y, upstream, hp, dense, list(outputs[5:-3]), move)
    return taken


def _launches(target: str, every: bool) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(kernel, arguments, which call it came from) of forwards and backwards in every mode."""
    cases = itertools.product(CASES if every else FEW_CASES, MODES)
    for (shape, dtype, weight_dtype), (dense, need_x, reduction, filtered) in cases:
        eps = 2.0**-24 if dtype == f32 else 2.0**-16  # the defaults: screens in fp16, and in int8
        hp = HyperParameters(64.0, 80.0, 80.0, 0.8, 1.23, eps if filtered else 0.0)
        short = "×".join(TYPES[t] for t in dict.fromkeys((dtype, weight_dtype)))
        calls: list[dict[str, Any]] = [{"reduction": reduction}]
        if dense and not reduction:
            calls.append({"own_upstream": False})
        elif not dense and weight_dtype == f32:
            calls += [{"rule": "momentum"}, {"rule": "adamw"}]
        for call in calls:
            for kernel, arguments in recorded(target, shape, dtype, weight_dtype, hp, dense, need_x, **call):
                yield kernel, arguments, f"{short} D={shape[2]}" + (f", {call['rule']}" if "rule" in call else "")


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The kernel specialised as Triton does at a launch, and the compiler's options.

    1 is a constant and multiples of 16 are marked, but where the kernel says not to.
    """
    signature, constants, attributes = {}, {}, {}
    options = {key: arguments[key] for key in (*OPTIONS, *COMPILE_OPTIONS) if key in arguments}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        looks = not parameter.do_not_specialize
        if name.isupper() or value is None or (looks and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if hasattr(value, "block_shape"):  # a descriptor, in Gluon with a layout
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            signature[name], divisible = f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}{layout}>", False
        elif isinstance(value, torch.Tensor):
            signature[name], divisible = "*" + TYPES[value.dtype], True
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32" if value < 2**31 else "i64", looks and value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source: Any = ASTSource
    if kernel.is_gluon():
        source = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    return source(kernel, signature, constants, attributes), options


def distinct(launches: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The launches, tuples of kernel, arguments and anything, that are compiled differently, each once."""
    found: dict[Any, tuple[Any, ...]] = {}
    for entry in launches:
        source, options = specialised(*entry[:2])
        found.setdefault((source.hash(), *sorted(options.items())), entry)
    return list(found.values())


def _machine_code(compiled: Any) -> tuple[str, int]:
    """The disassembly, and the registers of a thread."""
    if "amdgcn" in compiled.asm:
        listing = compiled.asm["amdgcn"]
        registers = re.search(r"\.vgpr_count:\s*(\d+)", listing)
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            tool = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
            listing = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
            registers = re.search(r"REG:(\d+)", listing)
    if registers is None:
        raise RuntimeError("the disassembly does not say how many registers the kernel takes")
    return listing, int(registers[1])


def _compile(kernel: Any, arguments: dict[str, Any], call: str, target: str) -> dict[str, Any]:
    gpu, _, shared_limit = TARGETS[target]
    flags = [name.lower() for name, value in arguments.items() if name.isupper() and value is True]
    row: dict[str, Any] = {"kernel": kernel.fn.__name__, "variant": ", ".join([call, *flags])}
    if kernel.is_gluon():
        row["variant"] += ", specialised warps"
    source, options = specialised(kernel, arguments)
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # a compiler crash is a finding, not a failure of this program
        last = (str(error).strip().splitlines() or [""])[-1]
        return {**row, "problem": f"does not compile: {type(error).__name__}: {last}"[:200]}
    listing, registers = _machine_code(compiled)
    code = machine_code.parse(listing)
    epilogue = machine_code.epilogue(code)
    if epilogue is not None:
        held = arguments["BLOCK_N"] * arguments["BLOCK_C"] / (arguments["num_warps"] * gpu.warp_size)
        epilogue = round(epilogue / held, 1)
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    spilling, products = (machine_code.count(code, p) for p in (machine_code.LOCAL_MEMORY, machine_code.TENSOR_CORES))
    in_products = machine_code.count_in_product_loops(code, machine_code.LOCAL_MEMORY)
    fp64 = machine_code.count(code, machine_code.FP64)
    residues = machine_code.rounding_residues(compiled.asm.get("ptx", ""))
    narrow = machine_code.narrow_strides(compiled.asm.get("ttir", ""))
    problems = (
        (shared > shared_limit, f"{shared} B of shared memory, the target has {shared_limit}"),
        (columns > TENSOR_MEMORY, f"{columns} columns of tensor memory, the target has {TENSOR_MEMORY}"),
        (fp64, f"{fp64} fp64 instructions"),
        (residues, f"{len(residues)} differences of a product and itself are fused: {residues[:1]}"),
        (narrow, f"{len(narrow)} strides are multiplied in 32 bits: {narrow[:1]}"),
        # the loop over tiles is a loop of a product where a tile's steps are unrolled: some words once a tile
        (in_products > (ONCE_A_TILE if kernel.is_gluon() else 0), f"{in_products} spills in the loop of a product"),
        ("BLOCK_K" in arguments and not products, "no tensor-core instruction"),
    )
    found = registers, spilling, in_products, shared, products, len(code), epilogue
    row |= dict(zip(MEASURED, found, strict=True))
    return {**row, "problem": "; ".join(text for is_one, text in problems if is_one) or None}


@functools.cache
def _found(target: str, every: bool) -> list[tuple[Any, ...]]:
    return distinct(_launches(target, every))


def _row(target: str, every: bool, number: int) -> dict[str, Any]:
    kernel, arguments, call = _found(target, every)[number]
    return _compile(kernel, arguments, call, target)


def compile_table(target: str, every: bool = False, jobs: int = 1) -> list[dict[str, Any]]:
    """One row per distinct kernel that a call would launch on `target`, an entry of TARGETS.

    Keys: kernel, variant, registers, spills (local-memory instructions), spills_in_products (those in a loop of a
    product), shared_bytes, tensor_core_instructions, instructions, epilogue_per_element (instructions that a thread
    executes from a tile's product to the next one, per element of the tile that it holds; None without a tile loop),
    problem (None or what is wrong). A kernel that does not compile has kernel, variant and problem alone.

    Every case is a call in all its `MODES`; `every` takes all `CASES`, else it is `FEW_CASES`. `jobs` processes compile
    at the same time.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {list(TARGETS)}, got {target!r}")
    row, numbers = functools.partial(_row, target, every), range(len(_found(target, every)))
    if jobs == 1:
        return list(map(row, numbers))
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.map(row, numbers, chunksize=1)


MEASURED = {
    "registers": "registers",
    "spills": "spills",
    "spills_in_products": "in product loops",
    "shared_bytes": "shared memory, B",
    "tensor_core_instructions": "tensor-core instructions",
    "instructions": "instructions",
    "epilogue_per_element": "epilogue, per element",
}
COLUMNS = {"kernel": "kernel", "variant": "variant", **MEASURED}
BEGIN, END = "<!-- compile table: written by a command, see above -->", "<!-- end of the compile table -->"


def markdown(target: str, table: list[dict[str, Any]]) -> str:
    lines = [f"### {target}, Triton {triton.__version__}", ""]
    lines += ["| " + " | ".join(COLUMNS.values()) + " | problem |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in table:
        cells = ("" if row.get(key) is None else str(row[key]) for key in COLUMNS)
        lines.append("| " + " | ".join(cells) + f" | {row['problem'] or ''} |")
    return "\n".join(lines)


def write_between_markers(path: Path, text: str) -> None:
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{path}: expected the lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100", help=f"of {', '.join(TARGETS)}")
    parser.add_argument(
        "--every", action="store_true", help="every dtype, precision and kind of shape, not only the two widths"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at the same time")
    parser.add_argument("--json", action="store_true", help="print JSON, not Markdown")
    parser.add_argument("--write", type=Path, help="a Markdown file to put the tables in, between its two markers")
    options = parser.parse_args()
    targets = options.targets.split(",")
    if not set(targets) <= TARGETS.keys():
        parser.error(f"--targets: expected some of {', '.join(TARGETS)}, got {options.targets!r}")
    tables = {name: compile_table(name, options.every, options.jobs) for name in targets}
    text = "\n\n".join(markdown(name, table) for name, table in tables.items())
    if options.write:
        write_between_markers(options.write, text)
    else:
        print(json.dumps(tables) if options.json else text)
    return int(any(row["problem"] for table in tables.values() for row in table))


if __name__ == "__main__":
    sys.exit(main())
