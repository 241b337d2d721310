"""Memory of a whole step beyond the weight and the optimizer's state: no C×D temporary."""

from __future__ import annotations

import pytest

from tests.loss.test_memory import D, extra, pytestmark  # noqa: F401

# ∂w would take 167 MB here, the bound is 65 MiB
N, C = 128, 85_742


@pytest.mark.parametrize(
    "provider", ["native+head-sgd", "native@0+head-sgd", "native@0+head-adamw", "chunked+head-sgd"]
)
def test_peak_of_a_step(provider):
    allowed = (64 << 20) + 16 * C + 16 * N * D
    size = extra(provider, N, C)
    assert size <= allowed, f"{size / 2**20:.1f} MiB beyond weight and state, {allowed / 2**20:.1f} allowed"
