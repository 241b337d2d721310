"""`sface_kernels.compat.metric_learning` with the installed pytorch-metric-learning: its weight, miners, reducers, regularizers."""

from __future__ import annotations

import copy
import importlib
import io
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sface_kernels
from sface_kernels import dispatch
from tests.support.problems import trained_problem
from tests.support.published_script import UNIT

pytest.importorskip("pytorch_metric_learning", reason="needs pytorch-metric-learning (requirements-dev.txt)")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.common_functions import TorchInitWrapper

from sface_kernels.compat.metric_learning import SFaceLoss


def problem(rows: int = 12, classes: int = 9, features: int = 8) -> tuple[Tensor, Tensor]:
    """Random rows: their losses have both signs."""
    x, y = torch.randn(rows, features), torch.randint(0, classes, (rows,))
    return x.requires_grad_(), y


def new_loss(classes: int = 9, features: int = 8, **options) -> SFaceLoss:
    return SFaceLoss(classes, features, a=0.87, b=1.2, **options)


def row_losses(loss_func: SFaceLoss, x: Tensor, y: Tensor) -> Tensor:
    return sface_kernels.sface_loss(x, loss_func.W.t(), y, a=0.87, b=1.2, reduction="none")


def test_weight_in_the_librarys_shape_and_the_kernels_layout():
    torch.manual_seed(7)
    loss_func = SFaceLoss(9, 8)
    torch.manual_seed(7)
    assert torch.equal(loss_func.W.t(), sface_kernels.SFaceLoss(8, 9).weight)
    assert loss_func.W.shape == (8, 9) and list(loss_func.state_dict()) == ["W"]
    x, y = problem()
    loss_func(x, y).backward()
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    theirs = losses.ArcFaceLoss(9, 8)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    loss_func.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loss_func.W, theirs.W)
    momentum = optimizer.state[loss_func.W]["momentum_buffer"]
    for weight in (
        loss_func.W,
        loss_func.W.grad,
        momentum,
        copy.deepcopy(loss_func).W,
        copy.deepcopy(loss_func).half().W,
    ):
        assert weight.t().is_contiguous()
    theirs.load_state_dict(loss_func.state_dict())


def test_gradient_is_not_copied():
    """∂w `[C, D]` as the kernel returns it becomes W.grad itself."""
    loss_func = new_loss()
    seen = []
    loss_func.W.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    x, y = problem()
    loss_func(x, y).backward()
    assert seen == [loss_func.W.grad.data_ptr()]


def test_other_initialisations():
    loss_func = SFaceLoss(900, 64, weight_init_func=TorchInitWrapper(nn.init.normal_, std=64**-0.5))
    assert loss_func.W.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("mined", [False, True], ids=["all", "mined"])
def test_miners_weigh_rows(mined):
    x, y = problem()
    loss_func = new_loss()
    indices_tuple = miners.MultiSimilarityMiner()(x, y) if mined else None
    weights = lmu.convert_to_weights(indices_tuple, y, dtype=torch.float32)
    assert mined == (len(weights.unique()) > 1), "choose another seed"
    expected = (row_losses(loss_func, x, y) * weights).mean()
    loss = loss_func(x, y, indices_tuple)
    assert torch.equal(loss, expected)
    ours, wanted = (torch.autograd.grad(value, (x, loss_func.W)) for value in (loss, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


SOUND = {
    "default": (None, lambda rows, y: rows.mean()),
    "mean": (reducers.MeanReducer(), lambda rows, y: rows.mean()),
    "sum": (reducers.SumReducer(), lambda rows, y: rows.sum()),
    "class": (reducers.ClassWeightedReducer(torch.arange(9.0)), lambda rows, y: (rows * y).mean()),
    "anchor": (reducers.PerAnchorReducer(), lambda rows, y: rows.mean()),
    "multiple": (reducers.MultipleReducers({"loss": reducers.SumReducer()}), lambda rows, y: rows.sum()),
}


@pytest.mark.parametrize("reducer, formula", SOUND.values(), ids=SOUND)
def test_sound_reducers(reducer, formula):
    x, y = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_func = new_loss(reducer=reducer)
    rows = row_losses(loss_func, x, y)
    assert rows.min() < 0 < rows.max()
    torch.testing.assert_close(loss_func(x, y), formula(rows, y))


def test_rows_as_they_are():
    x, y = problem()
    loss_func = new_loss(reducer=reducers.DoNothingReducer())
    assert torch.equal(loss_func(x, y)["loss"]["losses"], row_losses(loss_func, x, y))


@pytest.mark.parametrize(
    "reducer", [reducers.AvgNonZeroReducer(), reducers.ThresholdReducer(low=0)], ids=["avg", "low"]
)
def test_reducers_that_drop_rows_are_warned_of(reducer):
    x, y = problem()
    with pytest.warns(UserWarning, match=r"reducer: \w+ drops rows whose loss is below 0\. .* take MeanReducer"):
        loss_func = new_loss(reducer=reducer)
    rows = row_losses(loss_func, x, y)
    torch.testing.assert_close(loss_func(x, y), rows[rows > 0].mean())
    with pytest.warns(UserWarning) as said:
        SFaceLoss(9, 8, reducer=reducer)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="drops rows"):
        new_loss(reducer=reducers.PerAnchorReducer(reducer=reducer))


def test_a_threshold_from_above_is_not_warned_of(recwarn):
    new_loss(reducer=reducers.ThresholdReducer(high=100))
    assert not recwarn


def test_regularizers_add_up():
    x, y = problem()
    loss_func = new_loss(
        weight_regularizer=regularizers.RegularFaceRegularizer(),
        weight_reg_weight=0.5,
        embedding_regularizer=regularizers.LpRegularizer(),
        embedding_reg_weight=0.1,
    )
    w = F.normalize(loss_func.W.t())
    nearest = (w @ w.t()).fill_diagonal_(-1).amax(1).mean()
    expected = row_losses(loss_func, x, y).mean() + 0.5 * nearest + 0.1 * x.norm(dim=1).mean()
    torch.testing.assert_close(loss_func(x, y), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_embeddings_leave_the_master_weight_alone(dtype):
    x, y = problem()
    loss_func, half = new_loss(filter_eps=0.0), x.detach().to(dtype).requires_grad_()
    before = loss_func.W.detach().clone()
    loss = loss_func(half, y)
    loss.backward()
    assert loss_func.W.dtype == loss_func.W.grad.dtype == torch.float32 and torch.equal(loss_func.W, before)
    assert loss.dtype == torch.float32 and half.grad.dtype == dtype
    torch.testing.assert_close(loss, loss_func(half.float(), y), rtol=1e-3, atol=1e-3)


def test_autocast_changes_nothing_for_float32():
    x, y = problem()
    loss_func = new_loss()
    with torch.autocast("cpu", torch.bfloat16):
        inside, logits = loss_func(x, y), loss_func.get_logits(x)
    assert torch.equal(inside, loss_func(x, y)) and torch.equal(logits, loss_func.get_logits(x))


def test_logits():
    x, _ = problem()
    loss_func = SFaceLoss(9, 8, s=30.0)
    expected = 30 * F.normalize(x.double()) @ F.normalize(loss_func.W.t().double()).t()
    logits = loss_func.get_logits(x)
    torch.testing.assert_close(
        logits, expected.float(), rtol=0, atol=30 * 2 * (8 + 4) * UNIT
    )  # of two orders of summation
    assert loss_func.get_logits(x.half()).dtype == torch.float32
    upstream = torch.randn_like(logits)
    ours, wanted = (torch.autograd.grad((value * upstream).sum(), (x, loss_func.W)) for value in (logits, expected))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_statistics_are_recorded_on_request():
    x, y = problem()
    loss_func = new_loss(collect_stats=True)
    loss = loss_func(x, y)
    own = F.cosine_similarity(x, loss_func.W.t()[y])
    assert loss_func.intra + loss_func.inter == pytest.approx(loss.item(), rel=1e-5)
    assert loss_func.cos_target == pytest.approx(own.mean().item(), rel=1e-5)
    assert not hasattr(new_loss(), "intra")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device beside the CPU")
def test_the_weight_follows_the_embeddings():
    x, y = problem()
    loss_func = new_loss()
    optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.1)
    loss = loss_func(x.detach().cuda(), y)
    assert loss.device.type == loss_func.W.device.type == "cuda" and loss_func.W.t().is_contiguous()
    assert optimizer.param_groups[0]["params"][0] is loss_func.W


def test_bad_input():
    x, y = problem()
    loss_func = new_loss()
    for call, text in (
        (lambda: loss_func(x), "labels are required"),
        (lambda: loss_func(x, y, ref_emb=x.detach(), ref_labels=y), "ref_emb is not supported"),
        (lambda: loss_func(x, y + 9), r"labels: expected"),
        (lambda: loss_func(x[:, :5], y), r"weight: expected \[C, 5\]"),
        (lambda: SFaceLoss(0, 8), "num_classes: expected an int > 0"),
        (lambda: SFaceLoss(9, 8, s=-1), "s: expected a number > 0"),
        (lambda: SFaceLoss(9, 8, backend="cuda"), "backend: expected one of"),
        (lambda: SFaceLoss(9, 8, distance=distances.LpDistance()), r"distance: expected CosineSimilarity\(\)"),
        (lambda: SFaceLoss(9, 8, distance=distances.CosineSimilarity(power=2)), "distance: expected"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    monkeypatch.delitem(sys.modules, "sface_kernels.compat.metric_learning")
    with pytest.raises(ImportError, match="pip install 'pytorch-metric-learning>=2,<3'"):
        importlib.import_module("sface_kernels.compat.metric_learning")


OTHER = [("s", 32.0), ("k", 20.0), ("k_inter", 30.0), ("a", 1.4), ("b", 0.9), ("filter_eps", 0.2)]


@pytest.mark.parametrize("option, value", OTHER)
def test_every_option_reaches_the_loss(option, value):
    x, w, labels, _ = trained_problem(9, 40, 16)
    head = SFaceLoss(40, 16, backend="chunked", **{option: value})
    head.W.data.t().copy_(w)
    head(x, labels).backward()
    w.requires_grad_()
    (ours,) = torch.autograd.grad(sface_kernels.sface_loss(x, w, labels, backend="chunked", **{option: value}), w)
    (default,) = torch.autograd.grad(sface_kernels.sface_loss(x, w, labels, backend="chunked"), w)
    torch.testing.assert_close(head.W.grad.t(), ours)
    assert not torch.allclose(ours, default)


def test_the_backend_is_the_one_asked_for(monkeypatch):
    entry = dispatch.BACKENDS["reference"]
    forward = mock.Mock(wraps=entry.forward)
    monkeypatch.setitem(dispatch.BACKENDS, "reference", entry._replace(forward=forward))
    SFaceLoss(40, 16, backend="reference")(torch.randn(9, 16), torch.arange(9))
    forward.assert_called_once()
