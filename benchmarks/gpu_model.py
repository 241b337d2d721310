"""Predicted times of the Triton kernels, from docs/compile-tables.md, what the GPUs' makers say, and one H200.

    python -m benchmarks.gpu_model
    python -m benchmarks.gpu_model benchmarks/results/cuda-large.json benchmarks/results/cuda-small.json   # beside them

For each GPU and shape a line of milliseconds a kernel, by lists and by dense products. A kernel that multiplies takes
its tensor-core operations and the instructions it issues one after the other, times what it waits, or as long as its
L2 or DRAM bytes if that is longer. What an H200 showed is in the constants; A100 and H100 are computed with the same.
Left out: clocks that fall under load, and the host.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

from sface_kernels.backends.triton import tiles
from sface_kernels.bench import report
from sface_kernels.bench.table import plain_table

TABLES = Path(__file__).resolve().parent.parent / "docs" / "compile-tables.md"
VARIANT = "bf16×fp32 D=512"
# (samples, classes): launches by lists and by dense products, as docs/kernels.md counts them
SHAPES = {(128, 10_575): (5, 6), (512, 85_742): (8, 22), (1024, 1_000_000): (36, 330)}
D = 512
E_X, E_W, UNIT = 2, 4, 2  # bytes of an entry of x, of w, of a unit row
ACTIVE_SHARE = 1e-5  # of the pairs, listed: about random initialisation at 2⁻¹⁶
LAUNCH_MS = 0.003  # from the end of a kernel to the start of the next in one stream, assumed
# Seen on an H200. Products and epilogues of two or three programs a multiprocessor overlap less than they wait: for
# loads at the start of each tile, for each other's warps.
WAITS = 1.6
DRAM_SHARE = 0.88  # of the maker's figure: 4.2 TB/s of 4.8
SHORTEST_MS = 0.009  # a kernel with little to do
# finish_samples is a chain of loads: so long a sample, and so long for every 8 candidates; three programs run at once.
# rescore takes as long for every 4 in one of up to 8 parts, and 12 of its programs run at once.
SAMPLE_MS, CANDIDATES_MS, CANDIDATE_SHARE = 0.011, 0.0022, 3.5e-5


class Gpu(NamedTuple):
    """Vendor's figures for dense fp16 products, boost clock and memory; L2 as 29 bytes a cycle and multiprocessor, at
    which an H200 runs every kernel of a dense call."""

    target: str
    multiprocessors: int
    ghz: float
    tflops: float
    dram_tb: float

    @property
    def l2_tb(self) -> float:
        return 0.029 * self.multiprocessors * self.ghz

    def issue_ms(self, instructions: float) -> float:
        """Of so many instructions of a warp, four a cycle on each multiprocessor."""
        return instructions / (4 * self.multiprocessors * self.ghz * 1e6)


GPUS = {
    "A100": Gpu("sm_80", 108, 1.41, 312, 2.04),
    "H100": Gpu("sm_90", 132, 1.83, 989, 3.35),
    "H200": Gpu("sm_90", 132, 1.83, 989, 4.8),
}
Row = dict[str, float]


def compiled(target: str, text: str) -> dict[str, Row]:
    """Of each kernel's first variant with `VARIANT`: instructions, epilogue. The coefficients of ∂x and ∂w together."""
    section = text.partition(f"### {target},")[2].partition("###")[0]
    rows: dict[str, Row] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 10 and re.match(re.escape(VARIANT), cells[1]) and "dense" not in cells[1]:
            found = {"instructions": float(cells[7]), "epilogue": float(cells[8] or 0)}
            found["int8"] = float("int8" in cells[1])
            rows.setdefault(cells[0], found)
            if "need_grad, need_grad_w" in cells[1] and "filtered" not in cells[1]:
                rows[cells[0]] = found
    return rows


def operands(gpu: Gpu, kernel: str, outputs: int, depth: int, size: float) -> float:
    """Bytes that the tiles of a product with so many outputs and summands read, of `size` an entry."""
    tile = tiles.tile(kernel, gpu.target, "half")
    return outputs / (tile.block_n * tile.block_c) * (tile.block_n + tile.block_c) * depth * size


def tiled(gpu: Gpu, kernel: str, row: Row, n: int, c: int, stored: float = 0.0) -> float:
    """A product of N × C pairs over D with an epilogue, that stores so many bytes a pair.

    Rows of int8 are half the bytes of fp16, and multiplied at twice the rate.
    """
    narrow = 1 + row["int8"]
    pairs = -(-n // 128) * 128 * c
    tensor = 2 * pairs * D / (narrow * gpu.tflops * 1e9)
    l2 = (operands(gpu, kernel, pairs, D, UNIT / narrow) + stored * pairs) / (gpu.l2_tb * 1e9)
    epilogue = gpu.issue_ms(pairs * row["epilogue"] / 32)
    return max(WAITS * (tensor + epilogue), l2)


def predict(gpu: Gpu, rows: dict[str, Row], n: int, c: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each kernel over a forward and backward, by way of a call."""

    def dram(size: float) -> float:
        return size / (DRAM_SHARE * gpu.dram_tb * 1e9)

    def l2(size: float) -> float:
        return size / (gpu.l2_tb * 1e9)

    pass_over_w, links = dram(c * D * E_W), ACTIVE_SHARE * n * c + n
    issued = gpu.issue_ms(4 * rows["prepare"]["instructions"] * (n + c) * D / tiles.ROW_ELEMENTS)
    prepare = max(pass_over_w, l2(c * D * UNIT), issued)
    tensor = WAITS * 2 * -(-n // 128) * 128 * c * D / (gpu.tflops * 1e9)
    row_l2, class_l2 = (
        l2(operands(gpu, kernel, outputs * D, depth, UNIT))
        for kernel, outputs, depth in (("row_gradient", n, c), ("class_gradient", c, n))
    )
    finish = -(-n // (3 * gpu.multiprocessors)) * (SAMPLE_MS + CANDIDATES_MS * (CANDIDATE_SHARE * c // 8))
    in_parts = {}
    if c >= tiles.CLASSES_OF_PARTS:
        turns = max(1.0, CANDIDATE_SHARE * c / 4)
        parts = min(8.0, turns)
        waves = -(-n * parts // (12 * gpu.multiprocessors))
        finish, in_parts = SHORTEST_MS, {"rescore": SHORTEST_MS + CANDIDATES_MS * waves * turns / parts}
    by_lists, by_products = (count * LAUNCH_MS for count in SHAPES[n, c])
    lists = {
        "prepare": prepare,
        "screen": tiled(gpu, "screen", rows["screen"], n, c),
        "regroup": SHORTEST_MS,
        **in_parts,
        "finish_samples": finish,
        "scatter_classes": pass_over_w + dram(links * D * (E_X + E_W)),
    }
    dense = {
        "prepare": prepare,
        "coefficients": tiled(gpu, "coefficients", rows["coefficients"], n, c, stored=2 * UNIT),
        "row_gradient": max(tensor, row_l2),
        "class_gradient": max(tensor, class_l2) + pass_over_w,  # ∂w is written after its product
        "finish_samples": SHORTEST_MS,
    }
    return {
        way: {**{kernel: max(SHORTEST_MS, ms) for kernel, ms in kernels.items()}, "launches": launches}
        for way, kernels, launches in (("lists", lists, by_lists), ("dense", dense, by_products))
    }


def beside(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Of the rows of a results file measured on an H200, each kernel's time beside its prediction."""
    gpu, found = GPUS["H200"], []
    predicted = compiled(gpu.target, TABLES.read_text())
    for row in rows:
        shape, way = (row["n"], row["c"]), {"triton": "lists", "triton@0": "dense"}.get(row["provider"])
        if row["mode"] != "both" or not row["kernels"] or way is None or shape not in SHAPES or row["d"] != D:
            continue
        for kernel, ms in predict(gpu, predicted, *shape)[way].items():
            if kernel in row["kernels"]:
                took = row["kernels"][kernel]
                about = {"samples; classes": f"{shape[0]}; {shape[1]:,}", "way": way, "kernel": kernel}
                found.append(
                    {**about, "measured, ms": f"{took:.3f}", "model": f"{ms:.3f}", "ratio": f"{took / ms:.2f}"}
                )
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_model", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="results of bench --kernels on an H200, to stand beside the model"
    )
    if files := parser.parse_args(arguments).files:
        try:
            results = [report.load(file) for file in files]
        except report.ReportError as error:
            parser.error(str(error))
        compared = beside([row for result in results if result["kind"] == "bench" for row in result["rows"]])
        if not compared:
            parser.error("expected times of Triton's kernels in mode both, at a size that the model knows, found none")
        print(plain_table(compared).markdown())
        return
    text = TABLES.read_text()
    for name, gpu in GPUS.items():
        rows = compiled(gpu.target, text)
        for n, c in SHAPES:
            bare = 2 * n * c * D / (gpu.tflops * 1e9)
            for way, parts in predict(gpu, rows, n, c).items():
                shown = ", ".join(f"{kernel} {ms:.3f}" for kernel, ms in parts.items())
                print(f"{name} ({n}; {c:,}; {D}) {way}: {sum(parts.values()):.3f} ms, {bare:.3f} a product: {shown}")


if __name__ == "__main__":
    main()
