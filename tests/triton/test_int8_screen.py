"""The screen in int8 misses no active pair, and takes odd rows for what they are. As `test_triton.py`, which runs the
others of its tests with it too, on a GPU, in Triton's interpreter or as compiled PTX."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sface_kernels import sface_loss
from sface_kernels.backends.triton import tiles
from tests.support.checks import Judge, run
from tests.support.oracle import threshold_angle, truth
from tests.support.problems import GEOMETRIES
from tests.triton.conftest import forget_kinds
from tests.triton.test_triton import CASE, FAST, pytestmark  # noqa: F401


@pytest.mark.parametrize("in_parts", [False, True])
def test_ignored_rows_where_the_threshold_falls_to_0(int8, poisoned, lists, monkeypatch, in_parts):
    """An uneven sample and an uneven class move so far that every cosine of their tile is a candidate, an ignored row's 0
    among them: neither its lists, which may have no room, nor its share of a sample's candidates may be read."""
    problem = GEOMETRIES["random"](8, 200, 1024)
    x, w, labels = problem.x.clone(), problem.w.clone(), problem.labels.clone()
    for row, large in ((x[2], 5), (w[7], 9)):
        row.copy_(row.sign() / 258)
        row[large] = 1
    labels[4] = -100
    t = truth(x, w, labels, torch.full((8,), 1 / 7), filter_eps=FAST)
    if in_parts:
        monkeypatch.setattr(tiles, "CLASSES_OF_PARTS", 1)
    for stripes, capacity in ((1, 256), (2, 1)):
        lists(stripes, capacity)
        leaves = [rows.to(CASE.device).requires_grad_() for rows in (x.clone(), w.clone())]
        sface_loss(leaves[0], leaves[1], labels.to(CASE.device), filter_eps=FAST, backend="triton").backward()
        for leaf, expected in zip(leaves, (t.grad_x, t.grad_w), strict=True):
            assert (leaf.grad.cpu() - expected).norm() <= 1e-4 * expected.norm()


def near_misses(features: int, samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples and 24 classes for each whose rounding to int8 takes as much from their cosine as it can.

    Every entry is a whole number of steps and nearly half a step, which rounding takes away, on the side of the other
    row's sign. Cosines are around the filter's; in every third row one entry is far larger than the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    x, w = [], []
    for row in range(samples):
        whole = torch.randint(-60, 61, (features,), generator=generator).double()
        whole[0] = 127
        other = torch.randint(-60, 61, (24, features), generator=generator).double()
        other += torch.linspace(0.15, 0.3, 24, dtype=torch.float64)[:, None] * whole
        other = (other * 126 / other.abs().amax(1, keepdim=True)).round()
        other[:, 1] = 127 if row % 3 else 600
        other *= 127 / other[:, 1:2]
        other = other.round()
        x.append(whole + 0.499 * (other.sum(0)).sign())
        w.append(other + 0.499 * whole.sign())
        x[-1][0] = w[-1][:, 1] = 127
    return torch.stack(x).float(), torch.cat(w).float()


@pytest.mark.parametrize("features, seed", [(384, 0), (512, 1), (200, 2)])
def test_an_int8_screen_misses_no_active_pair(int8, poisoned, features, seed):
    """The count of active pairs is the truth's, where int8 cosines against the filter's own would miss many."""
    x, w = near_misses(features, 6, seed)
    problem = GEOMETRIES["random"](6, len(w), features)._replace(x=x, w=w)
    t = truth(*problem, filter_eps=FAST)
    unit = [F.normalize(rows.double()) for rows in (x, w)]
    steps = [rows.abs().amax(1, keepdim=True) / 127 for rows in unit]
    screened = (unit[0] / steps[0]).round() @ (unit[1] / steps[1]).round().t() * steps[0] * steps[1].t()
    assert int((t.active & (screened < math.cos(threshold_angle(80.0, 1.23, FAST)) - 2e-3)).sum()) > 5
    result = run(CASE, problem, filter_eps=FAST)
    assert abs(int(result.stats.active_pairs) - int(t.active.sum())) <= int(t.borderline.sum())
    assert int(t.borderline.sum()) <= 1 and float(result.stats.dense_share) == 0
    Judge(problem, filter_eps=FAST).check(result, "triton")


def test_odd_rows_of_an_int8_screen(int8, poisoned, monkeypatch):
    """Zeros, tiny, huge and no numbers are to it what they are to fp16; so is a single entry, which rounding keeps."""
    problem = GEOMETRIES["trained"](14, 150, 48)
    x, w = problem.x, problem.w
    x[1], w[5] = 0, 0
    x[2] *= 1e30
    x[3] *= 1e-30
    w[6] *= 1e28
    w[7] *= 1e-25
    x[4], w[8] = torch.eye(48)[3], torch.eye(48)[3] * 5
    x[5, 3], x[6, 2] = torch.nan, torch.inf
    ours = run(CASE, problem, filter_eps=FAST)
    with monkeypatch.context() as inside:
        inside.setattr(tiles, "INT8_SCREEN", ())
        forget_kinds()
        theirs = run(CASE, problem, filter_eps=FAST)
    forget_kinds()
    assert torch.equal(ours.row_loss.isnan().cpu(), (torch.arange(14) == 5) | (torch.arange(14) == 6))
    assert ours.stats.active_pairs == theirs.stats.active_pairs
    for name, rtol in (("row_loss", 1e-3), ("grad_x", 1e-5), ("grad_w", 1e-5)):  # far pairs have other cosines
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=rtol, atol=1e-5, equal_nan=True)
    w[9, 1] = torch.inf
    assert run(CASE, problem, filter_eps=FAST).row_loss.isnan().all()
