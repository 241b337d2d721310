"""Tile shapes, warps and pipeline stages of every kernel, by family of GPU: one table, each row with its reason.

`SFACE_TILES` overrides it for tuning: a JSON object of kernel names and the fields to change, for example
`SFACE_TILES='{"screen": {"block_n": 64, "warps": 4}}'`; blocks are 16, 32, 64 or 128. Nothing tunes itself at import or
in a training step; `python -m sface_kernels.backends.triton.tools.tune` times the alternatives on a GPU and prints the
object to set. No tile depends on the number of samples: each would be another kernel to compile, in the last batch of
an epoch for example, and few samples cost a pass over w whatever the tile.
Imports neither torch nor Triton.
"""

from __future__ import annotations

import functools
import json
import os
from typing import NamedTuple

FAMILIES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")
GRANULE = 128  # the largest block of samples, classes or features; buffers are padded to whole ones
BLOCKS = (16, 32, 64, GRANULE)


class Tile(NamedTuple):
    """What one kernel is compiled with."""

    block_n: int  # samples
    block_c: int  # classes
    block_k: int  # features of a step of the product
    warps: int
    stages: int


# Elements of a row-wise kernel's block [rows, D] per program: 32 fp32 registers a thread at 4 warps. On an H200 that is
# faster than twice as many, by a twentieth in prepare and a fifth in finish_samples.
ROW_ELEMENTS = 4096
ROW_WARPS = 4
FINISH_ENTRIES = 16  # candidates of a sample that finish_samples takes at once, as far as ROW_ELEMENTS allow
# Classes from which rescore takes the candidates, in parts: fewer are soon done, and it is one more launch.
CLASSES_OF_PARTS = 1 << 16
# Elements of their rows at once, and features a warp: one warp exchanges sums without a barrier, and as all wait for
# chains of loads, many programs at the same time hide most of it.
RESCORE_ELEMENTS, RESCORE_FEATURES = 2048, 512
# scatter_classes: its sums [classes, features] are int64. A program lasts as long as its class with the most links, so
# one class of 512 features, and a program is small, as each waits for chains of loads: on an H200 a trained head takes
# 1.4 ms so, 3.3 with 4 classes and 4 warps.
SCATTER_ELEMENTS, SCATTER_FEATURES, SCATTER_WARPS = 512, 512, 2
SCATTER_ROUNDS = 8  # blocks of classes of a program, at most: the next one's links are loaded under the stores of one
# The interpreter costs by the operation, not by its size, so its tiles are large; tests set small ones.
INTERPRETER_BLOCK = 64

# Screen. 8 warps: with 4 the accumulator of 128 × 128 fills the registers and the epilogue spills, as it does at 8 on
# sm_80, sm_89 and sm_120, whose products take more registers for operands. gfx942 has 64 KB of shared memory, and
# spills with steps of 64 features.
SCREEN = {
    "sm_80": Tile(128, 64, 64, 8, 3),
    "sm_89": Tile(128, 64, 64, 8, 3),
    "sm_90": Tile(128, 128, 64, 8, 3),
    "sm_100": Tile(128, 128, 64, 8, 3),
    "sm_120": Tile(128, 64, 64, 8, 3),
    "gfx942": Tile(128, 128, 32, 8, 2),
    "interpreter": Tile(64, 128, 64, 4, 1),
}
# Families whose screen reads by tensor descriptors (TMA): no registers for addresses, and no barrier before each step
# of the product. Its buffers meet what they ask for: rows of a multiple of 16 bytes, aligned, without gaps.
BY_DESCRIPTOR = ("sm_90", "sm_100")
# Columns side by side in a thread, by the layout of a product: sums over a tile then stay in the thread.
RUN = {"sm_80": 2, "sm_89": 2, "sm_90": 2, "sm_100": 32, "sm_120": 2, "gfx942": 32, "interpreter": 2}
# Families that multiply int8 twice as fast as fp16, and whose screen does where the filter is coarse
# (`plan.screens_int8`). Not sm_100: the B300 among them is slow at it. Empty, every screen is in fp16.
INT8_SCREEN: tuple[str, ...] = ("sm_80", "sm_89", "sm_90", "interpreter")
# Programs on a multiprocessor, for which registers are limited: the sums of one run under the products of others.
PROGRAMS = {"sm_90": {"screen": 2, "coefficients": 3, "class_gradient": 3}}
# Families whose screen specialises its warps (`kernels.specialised`), and versions of Triton that compile it; another
# version, and SFACE_TILES where it names the screen, take the one above. On an H200 it takes 0.82 of its time.
SPECIALISED = {"sm_90": ("3.6.", "3.7.")}
SPECIALISED_TILES = 2  # of each stripe at least: with fewer the loads of a program's x are most of it
SPECIALISED_BYTES, LEAST_RING, MOST_RING = 222 << 10, 3, 8  # of shared memory for rows; steps of the classes' ring
# Stages of the screen with more features: with three of them sm_90 spills in the loop of the product at 1024.
DEEP_FEATURES, DEEP_STAGES = 512, 2
# The dense kernels' products, the shape that plain products run best at. block_n and block_c are the tile of the
# output; for row_gradient block_c, for class_gradient block_n are features, and block_k what is summed over.
PRODUCT = {
    "sm_80": Tile(128, 128, 64, 8, 3),
    "sm_89": Tile(128, 128, 32, 8, 3),
    "sm_90": Tile(128, 128, 64, 8, 3),
    "sm_100": Tile(128, 128, 64, 8, 3),
    "sm_120": Tile(128, 128, 32, 8, 3),
    "gfx942": Tile(128, 128, 32, 8, 2),
    "interpreter": Tile(64, 64, 64, 4, 1),
}
# On an H200 ∂x gains a tenth from a fourth stage, and ∂w a third from three small programs instead of a large one.
ROW_GRADIENT = {**PRODUCT, "sm_90": Tile(128, 128, 64, 8, 4)}
CLASS_GRADIENT = {**PRODUCT, "sm_90": Tile(128, 64, 64, 4, 3)}
# Their coefficients: arccos and the sigmoid of a tile hold more than its accumulator, so a smaller one. With three
# stages sm_89 and sm_120 spill in the loop of the product.
COEFFICIENTS = {
    "sm_80": Tile(128, 64, 64, 8, 3),
    "sm_89": Tile(128, 64, 32, 8, 2),
    "sm_90": Tile(64, 64, 64, 4, 4),
    "sm_100": Tile(128, 64, 64, 8, 3),
    "sm_120": Tile(128, 64, 32, 8, 2),
    "gfx942": Tile(128, 64, 32, 8, 2),
    "interpreter": Tile(64, 128, 64, 4, 1),
}
# With these versions of Triton sm_90 spills with three stages at 512 features too, and with two it does not.
TWO_STAGES = {"screen": ("3.4.", "3.9."), "coefficients": ("3.9.",)}
TABLES = {
    "screen": SCREEN,
    "coefficients": COEFFICIENTS,
    "row_gradient": ROW_GRADIENT,
    "class_gradient": CLASS_GRADIENT,
}


def _fits(field: str, value: object) -> bool:
    """Blocks are powers of two that divide what buffers are padded to."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value in BLOCKS if field.startswith("block") else value > 0


@functools.cache
def _overrides(text: str) -> dict[str, dict[str, int]]:
    allowed = f"{list(Tile._fields)}, blocks of {BLOCKS}"
    expected = f"SFACE_TILES: expected a JSON object of {sorted(TABLES)} with {allowed}"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}, got {text!r} ({error})") from error
    well_formed = isinstance(found, dict) and all(
        kernel in TABLES
        and isinstance(fields, dict)
        and all(name in Tile._fields and _fits(name, value) for name, value in fields.items())
        for kernel, fields in found.items()
    )
    if not well_formed:
        raise ValueError(f"{expected}, got {text!r}")
    return found


def tile(kernel: str, family: str, operands: str, triton: str = "") -> Tile:
    """The tile of `kernel` for a GPU of `family`, the `operands` of its products and a version of Triton.

    "half" are fp16. "split" ones, two fp16 each, take half the features (or samples, or classes) at a time, as they are
    twice as wide, and "int8" twice as many.
    """
    chosen = TABLES[kernel][family]
    if operands == "int8":
        chosen = chosen._replace(block_k=2 * chosen.block_k)
    elif operands == "split" and family != "interpreter":
        chosen = chosen._replace(block_k=chosen.block_k // 2)
    if family == "sm_90" and triton.startswith(TWO_STAGES.get(kernel, ())):
        chosen = chosen._replace(stages=2)
    return chosen._replace(**_overrides(os.environ.get("SFACE_TILES", "{}")).get(kernel, {}))


def ring(family: str, operands: str, triton: str, padded_d: int) -> int:
    """Steps of classes that a screen with specialised warps keeps in shared memory beside x; 0 where there is none."""
    named = "screen" in _overrides(os.environ.get("SFACE_TILES", "{}"))
    if named or not triton.startswith(SPECIALISED.get(family, ())):
        return 0
    size = 1 if operands == "int8" else 2
    chosen = tile("screen", family, operands)
    left = SPECIALISED_BYTES - chosen.block_n * padded_d * size
    steps = min(MOST_RING, left // (chosen.block_c * chosen.block_k * size))
    return steps if steps >= LEAST_RING else 0


def rows_at_once(wanted: int, family: str) -> int:
    return INTERPRETER_BLOCK if family == "interpreter" else wanted


def programs(kernel: str, family: str, operands: str) -> int:
    """How many programs of `kernel` a multiprocessor is to run at the same time."""
    if (kernel, operands) == ("class_gradient", "split"):
        return 1  # it would spill in the loop of the product
    return PROGRAMS.get(family, {}).get(kernel, 1)


def most_registers(count: int, warps: int) -> int:
    """Registers of a thread, in eights, that leave room for so many programs."""
    return min(255, 65536 // (count * 32 * warps) // 8 * 8)


def family(capability: tuple[int, int] | None, hip: str | None) -> str:
    """The row of the tables for a CUDA capability, or for an AMD architecture."""
    if hip is not None:
        return "gfx942"
    if capability is None:
        return "interpreter"
    major, minor = capability
    if major == 8:
        return "sm_89" if minor else "sm_80"
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_120"  # as sm_86 and sm_89 it has 99 KB of shared memory
