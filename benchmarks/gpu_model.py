"""Predicted times of the Triton kernels, from docs/compile-tables.md and what the GPUs' makers say: nothing is measured.

    python -m benchmarks.gpu_model

For each GPU and shape a line of milliseconds a kernel, by lists and by dense products, to lay the first measurement
beside. A kernel takes as long as the longest of its DRAM bytes, its L2 bytes, its tensor-core operations and the
instructions it issues; where registers leave room for one program a multiprocessor, what a program does one after the
other adds up. Left out: latencies, uneven ends, clocks that fall under load, and the host.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).resolve().parent.parent / "docs" / "compile-tables.md"
VARIANT = "bf16×fp32 D=512"
# (samples, classes): launches by lists and by dense products, as docs/kernels.md counts them
SHAPES = {(128, 10_575): (4, 7), (512, 85_742): (6, 40), (1024, 1_000_000): (34, 571)}
D = 512
E_X, E_W, UNIT = 2, 4, 2  # bytes of an entry of x, of w, of a unit row
ACTIVE_SHARE = 1e-5  # of the pairs, listed: about random initialisation at 2⁻¹⁶
LAUNCH_MS = 0.003  # from the end of a kernel to the start of the next in one stream, assumed


class Gpu(NamedTuple):
    """Vendor's figures for dense fp16 products, boost clock and memory; L2 as 30 bytes a cycle and multiprocessor."""

    target: str
    multiprocessors: int
    ghz: float
    tflops: float
    dram_tb: float

    @property
    def l2_tb(self) -> float:
        return 0.03 * self.multiprocessors * self.ghz

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
    """Of each kernel's first variant with `VARIANT`: registers, instructions, epilogue. The forward's coefficients."""
    section = text.partition(f"### {target},")[2].partition("###")[0]
    rows: dict[str, Row] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 10 and re.match(re.escape(VARIANT), cells[1]) and "dense" not in cells[1]:
            found = {"registers": float(cells[2]), "instructions": float(cells[7]), "epilogue": float(cells[8] or 0)}
            found["int8"] = float("int8" in cells[1])
            rows.setdefault(cells[0], found)
    return rows


def tiled(gpu: Gpu, row: Row, n: int, c: int, block_c: int, dram: float) -> float:
    """A product of N × C pairs over D with an epilogue, 256 threads a program and tiles of 128 × `block_c`.

    Rows of int8 are half the bytes of fp16, and multiplied at twice the rate.
    """
    narrow = 1 + row["int8"]
    pairs = -(-n // 128) * 128 * c
    tensor = 2 * pairs * D / (narrow * gpu.tflops * 1e9)
    l2 = pairs / (128 * block_c) * (128 + block_c) * D * UNIT / narrow / (gpu.l2_tb * 1e9)
    epilogue = gpu.issue_ms(pairs * row["epilogue"] / 32)
    product = max(tensor, l2)
    several = 65_536 // (256 * row["registers"]) >= 2
    return max(product, epilogue, dram) if several else max(product + epilogue, dram)


def predict(gpu: Gpu, rows: dict[str, Row], n: int, c: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each kernel over a forward and backward, by way of a call."""

    def dram(size: float) -> float:
        return size / (gpu.dram_tb * 1e9)

    def l2(size: float) -> float:
        return size / (gpu.l2_tb * 1e9)

    block_c = 64 if gpu.target == "sm_80" else 128  # of the screen; that of coefficients is 64
    pass_over_w, links = dram(c * D * E_W), ACTIVE_SHARE * n * c + n
    issued = gpu.issue_ms(4 * rows["prepare"]["instructions"] * (n + c) * D / 8192)
    prepare = max(pass_over_w, l2(c * D * UNIT), issued)
    product = tiled(gpu, {"registers": 255, "epilogue": 0, "int8": 0}, n, c, 128, 0)
    lists = {
        "prepare": prepare,
        "screen": tiled(gpu, rows["screen"], n, c, block_c, 0),
        "finish_samples": dram((links + 2 * n) * D * E_W),
        "scatter_classes": pass_over_w + dram(links * D * (E_X + E_W)),
    }
    dense = {
        "prepare, twice": 2 * prepare,
        "coefficients, twice": 2 * tiled(gpu, rows["coefficients"], n, c, 64, 0),
        "row_gradient": product,
        "class_gradient": max(product, 2 * pass_over_w),
    }
    by_lists, by_products = (count * LAUNCH_MS for count in SHAPES[n, c])
    return {"lists": {**lists, "launches": by_lists}, "dense": {**dense, "launches": by_products}}


def main() -> None:
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
