"""The bound on extra memory, 64 MiB + 16·C B + 16·N·D B, held by what the Triton launch code allocates for many sizes."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest

from tests.support.cases import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

N = (1, 129, 512, 1024, 20_000)
C = (1, 10_575, 85_742, 4_000_000)
D = (3, 128, 512, 1031, 4096)


def bound(n: int, c: int, d: int) -> int:
    return (64 << 20) + 16 * c + 16 * n * d


def extra(dtype: str) -> list[dict]:
    """A row for each problem, of calls by lists and of dense ones, that make ∂w in the forward too, from one process: starting it takes seconds."""
    problems = [f"{n},{c},{d},{way},{dtype}" for n, c, d, way in itertools.product(N, C, D, ("lists", "dense", "made"))]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tests/support/launch_memory.py", *problems],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["problem"] for row in rows] == problems
    return rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_extra_memory_stays_within_the_bound(dtype):
    found, past = extra(dtype), []
    for row in found:
        n, c, d = map(int, row["problem"].split(",")[:3])
        needed = max(row["forward"], row["backward"])
        if needed > bound(n, c, d):
            over = (needed - bound(n, c, d)) / (1 << 20)
            past.append(f"{row['problem']}: {over:.1f} MiB over; {row['in_forward']}; {row['in_backward']}")
    assert not past, f"{len(past)} of {len(found)}:\n" + "\n".join(past)
