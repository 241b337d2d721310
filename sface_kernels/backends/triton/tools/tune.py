"""Times other tiles on this GPU and prints the SFACE_TILES to set. Offline: no training step ever comes here.

    python -m sface_kernels.backends.triton.tools.tune --shape 1024,1000000,512 --dtype bfloat16

Kernel by kernel, from the table's tile to neighbours that are faster until none is. What is timed is a whole forward
and backward, by lists or by dense products; an alternative counts only if it gives the default's result.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from ....types import HyperParameters
from .. import kinds, sequence, tiles
from ..device import gpu_of
from ..plan import screens_int8

WAYS = {"lists": ("screen",), "dense": ("coefficients", "row_gradient", "class_gradient")}  # of a call: its kernels
LEAST_GAIN = 0.02  # smaller differences are noise between runs
MOST_DIFFERENCE = 1e-3  # relative, of each result: other orders of the sums, and coefficients rounded to fp16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MILLISECONDS = 300  # of repeats of one alternative

Overrides = dict[str, dict[str, int]]
Measure = Callable[[Overrides], float | None]


def neighbours(tile: tiles.Tile) -> Iterator[tiles.Tile]:
    """Tiles with one field changed that every kernel can take: no block is larger than what buffers are padded to."""
    limits = {"block_n": (16, tiles.GRANULE), "block_c": (32, tiles.GRANULE), "block_k": (16, tiles.GRANULE)}
    for name, (least, most) in {**limits, "warps": (4, 8), "stages": (1, 5)}.items():
        value = getattr(tile, name)
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            if least <= other <= most:
                yield tile._replace(**{name: other})


def search(
    kernel: str, start: tiles.Tile, chosen: Overrides, measure: Measure, log: Callable[[str], None]
) -> Overrides:
    """`chosen` with the best tile found for `kernel`. `measure` returns ms, or None where a tile does not do."""

    def with_tile(tile: tiles.Tile) -> Overrides:
        changed = {name: value for name, value in tile._asdict().items() if value != getattr(start, name)}
        return {**chosen, kernel: {**chosen.get(kernel, {}), **changed}} if changed else chosen

    best, best_ms = start, measure(chosen)
    if best_ms is None:
        raise RuntimeError(f"{kernel}: its own tile {start} does not run")
    log(f"{kernel}: {best_ms:.4f} ms with {start}")
    seen = {start}
    while True:
        found = []
        for tile in neighbours(best):
            if tile in seen:
                continue
            seen.add(tile)
            ms = measure(with_tile(tile))
            log(f"{kernel}: {'does not run or is wrong' if ms is None else f'{ms:.4f} ms'} with {tile}")
            if ms is not None:
                found.append((ms, tile))
        if not found or min(found)[0] > best_ms * (1 - LEAST_GAIN):
            break
        best_ms, best = min(found)
    return with_tile(best)


class Step:
    """A forward and backward on this GPU, and the results that alternatives must give."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype, dense: bool):
        n, c, d = shape
        generator = torch.Generator("cuda").manual_seed(0)
        self.x = torch.randn(n, d, generator=generator, device="cuda").to(dtype)
        self.w = torch.randn(c, d, generator=generator, device="cuda").to(weight_dtype)
        self.target = torch.randint(0, c, (n,), generator=generator, device="cuda")
        self.upstream = torch.rand(n, generator=generator, device="cuda") + 0.5
        self.hp = HyperParameters(64.0, 80.0, 80.0, 0.80, 1.23, 0.0 if dense else 2.0**-16)
        self.dense, self.gpu = dense, gpu_of(self.x.device)
        self.int8 = not dense and screens_int8(self.hp, d, self.gpu.family)
        self.expected = self.run()

    def run(self) -> list[Tensor]:
        """Row losses, ∂x and ∂w."""
        operands = (self.x, self.w, self.target)
        made = self.dense and self.w.dtype == torch.float32  # as in most calls
        reduction = "mean" if made else ""
        row_loss, _, _, _, row_grad_x, *saved, _, _, grad_w = sequence.forward(
            *operands, self.hp, True, True, self.dense, self.gpu.multiprocessors, self.int8, reduction
        )
        if not made:
            grad_w = sequence.grad_weight(*operands, self.upstream, self.hp, self.dense, saved)
        return [row_loss, row_grad_x, grad_w]

    def measure(self, overrides: Overrides) -> float | None:
        with mock.patch.dict(os.environ, SFACE_TILES=json.dumps(overrides)):
            try:
                if all(map(_agree, self.run(), self.expected)):
                    return triton.testing.do_bench(self.run, rep=MILLISECONDS, return_mode="median")
            except Exception as error:  # out of registers or shared memory, a compiler crash
                _log(f"  {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        return None


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    return bool(difference <= MOST_DIFFERENCE)  # False for NaN


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="1024,1000000,512", help="samples,classes,features")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the embeddings")
    parser.add_argument("--weight-dtype", choices=DTYPES, default="float32")
    parser.add_argument("--ways", default="lists,dense", help="of lists, dense")
    options = parser.parse_args()
    if not re.fullmatch("[1-9][0-9]*(,[1-9][0-9]*){2}", options.shape):
        parser.error(f"--shape: expected three positive whole numbers with commas, got {options.shape!r}")
    n, c, d = map(int, options.shape.split(","))
    ways = options.ways.split(",")
    if not set(ways) <= WAYS.keys():
        parser.error(f"--ways: expected some of {sorted(WAYS)}, got {options.ways!r}")
    if not torch.cuda.is_available():
        print(f"tune: tiles are timed on a GPU, and PyTorch {torch.__version__} finds none", file=sys.stderr)
        return 2
    chosen: Overrides = json.loads(os.environ.get("SFACE_TILES", "{}"))
    for way in ways:
        step = Step((n, c, d), DTYPES[options.dtype], DTYPES[options.weight_dtype], way == "dense")
        kind = kinds.kind_of(step.x, step.w, step.hp, step.dense, step.int8, step.gpu.multiprocessors)
        for kernel in WAYS[way]:
            chosen = search(kernel, kind.tile(kernel), chosen, step.measure, _log)
        del step
    print(f"SFACE_TILES='{json.dumps(chosen)}'")
    return 0


def _log(line: Any) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
