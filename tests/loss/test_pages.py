"""Large tensors of the package's own are asked to be in huge pages, which changes no number."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sface_kernels import SFaceLoss, pages
from sface_kernels.optim import HeadAdamW, HeadSGD
from tests.support.cases import Case, f32
from tests.support.checks import Judge, run
from tests.support.problems import GEOMETRIES

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")


def is_asked_for(t: Tensor) -> bool:
    """Whether the middle of its memory has the flag of the advice, which the system keeps whether it follows or not."""
    at, flags = t.data_ptr() + t.nbytes // 2, ""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= at < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    return " hg" in flags


def test_a_head_and_the_state_of_its_optimizers():
    """Of 40 MiB. Memory that the test has from the system itself is not asked for."""
    own = torch.frombuffer(mmap.mmap(-1, 40 << 20), dtype=torch.float32)
    assert not is_asked_for(own)
    head = SFaceLoss(512, 20_480)
    assert is_asked_for(head.weight)
    x, labels = torch.randn(4, 512), torch.arange(4)
    for make in (lambda: HeadSGD(head, momentum=0.9), lambda: HeadAdamW(head)):
        optimizer = make()
        head(x, labels).backward()
        optimizer.step()
        state = [t for t in optimizer.state[head.weight].values() if t.dim() == 2]
        assert state and all(is_asked_for(t) for t in state)
    before = head.weight.detach().clone()
    head.add_classes(3)
    assert is_asked_for(head.weight) and torch.equal(head.weight[:-3], before)


def test_small_ones_and_those_without_memory_stay_as_they_are(monkeypatch):
    small = torch.empty(9)
    assert pages.in_huge_pages(small) is small
    monkeypatch.setattr(pages, "HUGE_BYTES", 1)
    with FakeTensorMode():
        assert SFaceLoss(8, 70).weight.shape == (70, 8)
    assert SFaceLoss(8, 70, device="meta").weight.is_meta
    assert isinstance(pages.in_huge_pages(nn.Parameter(torch.empty(9))), nn.Parameter)


@pytest.mark.parametrize("size", [1, 4096, 3 * 4096])
def test_nothing_changes(monkeypatch, size):
    """Whatever part of a page a tensor begins and ends in."""
    problem = GEOMETRIES["trained"](9, 331, 96)
    case = Case("chunked", "cpu", f32, f32)
    expected = run(case, problem, filter_eps=2.0**-12)
    monkeypatch.setattr(pages, "HUGE_BYTES", size)
    result = run(case, problem, filter_eps=2.0**-12)
    assert torch.equal(result.grad_w, expected.grad_w)
    Judge(problem, filter_eps=2.0**-12).check(result, "chunked")
