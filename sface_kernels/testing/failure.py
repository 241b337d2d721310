"""What went wrong, in one line of a report."""

from __future__ import annotations

import torch


def failure_text(error: BaseException) -> str:
    """One line for a report."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200] if lines else ''}".rstrip(": ")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device; the CPU allocator raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
