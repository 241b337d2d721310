"""What the Triton backend knows before it launches: whether it can, on which GPU, with which tiles and how many programs.

What only a GPU has is stood in for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch

from sface_kernels.backends import triton as backend
from sface_kernels.backends.triton import buffers, device, tiles
from sface_kernels.types import Request
from tests.support.cases import BACKENDS, f32

CUDA = Request(torch.device("cuda"), f32, f32)
needs_triton = pytest.mark.skipif(backend.TRITON_VERSION is None, reason="Triton is not installed")


class TestTiles:
    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"scren": {}}', '{"screen": {"block": 1}}', '{"screen": {"warps": "8"}}', '{"screen": {"warps": 0}}', '{"screen": {"block_c": 256}}']
    )  # fmt: skip
    def test_a_wrong_override_says_what_was_expected(self, monkeypatch, text):
        monkeypatch.setenv("SFACE_TILES", text)
        with pytest.raises(ValueError, match="SFACE_TILES: expected a JSON object"):
            tiles.tile("screen", "sm_90", "half")

    def test_an_override_reaches_the_tile(self, monkeypatch):
        monkeypatch.setenv("SFACE_TILES", '{"screen": {"warps": 4}}')
        assert tiles.tile("screen", "sm_90", "half") == tiles.SCREEN["sm_90"]._replace(warps=4)

    @pytest.mark.parametrize("family", tiles.FAMILIES)
    @pytest.mark.parametrize("kernel", tiles.TABLES)
    @pytest.mark.parametrize("operands", ["half", "split"])
    def test_every_block_divides_what_buffers_are_padded_to(self, kernel, family, operands):
        t = tiles.tile(kernel, family, operands)
        assert all(tiles.GRANULE % block == 0 and block >= 16 for block in t[:3]), t


class TestAvailability:
    def test_a_gpu_that_cannot_takes_chunked_and_says_so_once(self, monkeypatch, recwarn):
        from sface_kernels import dispatch

        entry = BACKENDS["triton"]._replace(unavailable=lambda *_: "it is made of cheese")
        monkeypatch.setitem(dispatch.BACKENDS, "triton", entry)
        for _ in range(2):
            assert dispatch.select("auto", CUDA) == "chunked"
        said = [str(w.message) for w in recwarn if "cheese" in str(w.message)]
        assert len(said) == 1 and "'chunked' runs on cuda, as 'triton' cannot" in said[0]

    @pytest.mark.parametrize(
        "version, capability, reason",
        [((3, 3), (9, 0), "needs Triton ≥ 3.4, found 3.3"), ((3, 6), (7, 5), "compute capability ≥ 8.0"), (None, (9, 0), "not installed")],
    )  # fmt: skip
    def test_too_old(self, monkeypatch, version, capability, reason):
        monkeypatch.setattr(device, "_pretence", None)
        monkeypatch.setattr(backend, "TRITON_VERSION", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert reason in backend.unavailable(CUDA)

    @needs_triton
    def test_a_call_does_not_look_the_version_up(self, monkeypatch):
        """It takes a third of a millisecond."""
        looked: list[str] = []
        monkeypatch.setattr(importlib.metadata, "version", looked.append)
        backend.unavailable(Request(torch.device("cpu"), f32, f32))
        with device.pretend((9, 0)):
            assert backend.unavailable(CUDA) is None
        assert not looked

    @needs_triton
    def test_pretending(self):
        """On a CPU, tensors pass for those of a GPU inside the block only; blocks nest."""
        cpu = Request(torch.device("cpu"), f32, f32)
        outside = backend.unavailable(cpu), device.gpu_of(cpu.device)
        with device.pretend((8, 0), multiprocessors=108):
            assert backend.unavailable(cpu) is None and device.gpu_of(cpu.device) == ("sm_80", 108)
            with device.pretend(None, hip="6.4"):
                assert device.gpu_of(cpu.device).family == "gfx942"
            assert device.gpu_of(cpu.device).family == "sm_80"
        assert (backend.unavailable(cpu), device.gpu_of(cpu.device)) == outside

    def test_a_real_gpu_is_asked(self, monkeypatch):
        monkeypatch.setattr(device, "_pretence", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        properties = dataclasses.make_dataclass("Properties", ["multi_processor_count"])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties(108))
        assert device.gpu_of(torch.device("cuda")) == ("sm_80", 108)


@pytest.mark.parametrize("multiprocessors", [108, 132, 148, 188])
@pytest.mark.parametrize("samples", [1, 128, 512, 1024, 2048, 20_480, 100_000])
def test_a_gpu_is_busy_to_the_end(samples, multiprocessors):
    """Programs that run at the same time, one a multiprocessor, in whole rounds: at most a fifth of them is idle."""
    blocks = -(-samples // tiles.GRANULE)
    stripes, _ = buffers.lists(samples, 1_000_000, 512, multiprocessors)
    programs = blocks * stripes
    rounds = -(-programs // multiprocessors)
    assert programs / (rounds * multiprocessors) > 0.8, (blocks, stripes)
