"""Kernels around single functions of the backend's, for tests that look at these alone."""

from __future__ import annotations

import triton
import triton.language as tl

from sface_kernels.backends.triton.kernels.screen import lane_columns, nearest_column, tag_margin


@triton.jit
def tag(values_ptr, nearest_ptr, column_ptr, margin_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """The largest of each lane of rows `[ROWS, COLUMNS]`, its column from its low bits, and what these may cost."""
    row, column, lane = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, 4)
    values = tl.load(values_ptr + row[:, None] * COLUMNS + column[None, :])
    lane_column, first_column = lane_columns(COLUMNS, RUN)
    nearest = nearest_column(values.reshape(ROWS, COLUMNS // (4 * RUN), 4, RUN), lane_column, COLUMNS)  # [ROWS, 4]
    place = row[:, None] * 4 + lane[None, :]
    tl.store(nearest_ptr + place, nearest)
    tl.store(column_ptr + place, (nearest.to(tl.int32, bitcast=True) & (COLUMNS - 1)) + first_column)
    tl.store(margin_ptr, tag_margin(COLUMNS))
