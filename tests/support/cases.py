"""The backends under test, and the (backend, device, dtype) cases that the fixtures of `conftest` give."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sface_kernels.dispatch import BACKENDS
from sface_kernels.types import Request

ROOT = Path(__file__).resolve().parents[2]
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# (embeddings, weight): the same dtype, and master weights. What a backend cannot take is in test_bad_input, not here.
HALF = [(bf16, f32), (f16, f32), (bf16, bf16), (f16, f16)]
DTYPES = {
    "native": [(f32, f32), *HALF],
    "chunked": [(f32, f32), (f64, f64), (f64, f32), *HALF],
    "reference": [(f32, f32), (f64, f64), (f64, f32), *HALF],
    "triton": [(f32, f32), *HALF],
}


class Case(NamedTuple):
    backend: str
    device: str
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def __str__(self) -> str:
        short = [str(t).removeprefix("torch.") for t in (self.dtype, self.weight_dtype)]
        return "-".join([self.backend, self.device, *dict.fromkeys(short)])

    @property
    def emulated(self) -> bool:
        """Triton's kernels on a CPU, where a large size takes minutes: such tests take a smaller one there."""
        return (self.backend, self.device) == ("triton", "cpu")

    def reason_to_skip(self) -> str | None:
        return BACKENDS[self.backend].unavailable(Request(torch.device(self.device), self.dtype, self.weight_dtype))


# Triton's kernels run on the CPU too, slowly: in its interpreter, or compiled in an emulator (tests/triton/compiled.py)
INTERPRETED = BACKENDS["triton"].unavailable(Request(torch.device("cpu"), f32, f32)) is None
CASES = [
    Case(name, device, *dtypes)
    for name in BACKENDS
    for device in DEVICES
    for dtypes in DTYPES[name]
    if not (device == "cuda" and name == "native") and not (device == "cpu" and name == "triton" and not INTERPRETED)
]
CASES32 = [case for case in CASES if case.dtype == case.weight_dtype == f32]
