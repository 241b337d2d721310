"""Kernels around single functions of the backend's, for tests that look at these alone."""

from __future__ import annotations

import triton
import triton.language as tl

from sface_kernels.backends.triton.kernels.screen import nearest_column, tag_margin


@triton.jit
def tag(values_ptr, nearest_ptr, margin_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest of each row of `[ROWS, COLUMNS]` with its column in the low bits, and what that may cost."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    values = tl.load(values_ptr + row[:, None] * COLUMNS + column[None, :])
    tl.store(nearest_ptr + row, nearest_column(values, column, COLUMNS))
    tl.store(margin_ptr, tag_margin(COLUMNS))
