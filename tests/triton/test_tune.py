"""The search of the offline tuner, on times that are made up; the timing itself needs a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sface_kernels.backends.triton import tiles
from tests.support.cases import ROOT

pytest.importorskip("triton")
from sface_kernels.backends.triton.tools import tune

START = tiles.Tile(128, 64, 64, 8, 3)


def tile_of(overrides: tune.Overrides, kernel: str = "screen") -> tiles.Tile:
    return START._replace(**overrides.get(kernel, {}))


def find(measure, chosen: tune.Overrides | None = None) -> tune.Overrides:
    return tune.search("screen", START, chosen or {}, measure, lambda line: None)


def test_walks_to_the_fastest_tile():
    """Two steps away, each of them faster."""
    assert find(lambda o: 100 / tile_of(o).block_c + tile_of(o).stages) == {"screen": {"block_c": 128, "stages": 1}}


def test_noise_changes_nothing():
    assert find(lambda o: 1.0 - 0.001 * tile_of(o).stages) == {}


def test_a_wrong_or_failing_tile_is_passed_over():
    assert find(lambda o: None if tile_of(o) != START else 1.0) == {}
    with pytest.raises(RuntimeError, match="its own tile"):
        find(lambda o: None)


def test_keeps_what_was_chosen_before():
    """Other kernels' tiles, and the fields of this one that do not change."""
    before = {"screen": {"warps": 4}, "row_gradient": {"stages": 2}}
    found = find(lambda o: 100 / tile_of(o).block_c, before)
    assert found == {"screen": {"warps": 4, "block_c": 128}, "row_gradient": {"stages": 2}}


def test_neighbours_fit_the_buffers():
    seen, todo = {START}, [START]
    while todo:
        for tile in tune.neighbours(todo.pop()):
            if tile not in seen:
                seen.add(tile)
                todo.append(tile)
    assert len(seen) > 50
    for tile in seen:
        assert 128 % tile.block_n == 0 and 128 % tile.block_c == 0 and 128 % tile.block_k == 0, tile


def test_overrides_are_what_the_table_takes(monkeypatch):
    monkeypatch.setenv("SFACE_TILES", '{"screen": {"block_c": 32}}')
    assert tiles.tile("screen", "sm_90", "half").block_c == 32
    assert all(kernel in tiles.TABLES for kernels in tune.WAYS.values() for kernel in kernels)


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    command = [sys.executable, "-m", "sface_kernels.backends.triton.tools.tune"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "timed on a GPU" in done.stderr
