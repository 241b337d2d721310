"""`sface_kernels.compat.metric_learning` with the installed pytorch-metric-learning: its loop, reducers, miners, wrappers."""

from __future__ import annotations

import copy
import importlib
import io
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import sface_kernels
from tests.support.published_script import (
    CLASSES,
    FEATURES,
    RECIPE,
    UNIT,
    PlainHead,
    assert_same_curve,
    backbone,
    batches,
)

pytest.importorskip("pytorch_metric_learning", reason="needs pytorch-metric-learning (requirements-dev.txt)")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, testers, trainers
from pytorch_metric_learning.utils import accuracy_calculator, inference
from pytorch_metric_learning.utils import distributed as pml_dist
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.common_functions import TorchInitWrapper

from sface_kernels.compat.metric_learning import SFaceLoss


class PlainLoss(losses.ArcFaceLoss):
    """The published arithmetic in that library's own classification loss: its weight, its miner weights, its reducers."""

    def __init__(self, num_classes, embedding_size, a, b, **kwargs):
        super().__init__(num_classes, embedding_size, **kwargs)
        self.head = PlainHead(embedding_size, num_classes, None, a=a, b=b)

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        intra, inter = self.head.row_parts(*self.head.cosines(embeddings, labels))
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=intra.dtype)
        record = {
            "losses": (intra + inter) * weights,
            "indices": torch.arange(len(labels)),
            "reduction_type": "element",
        }
        return {"loss": record}


def problem(rows: int = 12, classes: int = 9, features: int = 8) -> tuple[Tensor, Tensor]:
    """Some rows near their class, with losses of both signs."""
    x, y = torch.randn(rows, features), torch.randint(0, classes, (rows,))
    return x.requires_grad_(), y


def new_loss(classes: int = 9, features: int = 8, **options) -> SFaceLoss:
    return SFaceLoss(classes, features, a=0.87, b=1.2, **options)


def row_losses(loss_func: SFaceLoss, x: Tensor, y: Tensor) -> Tensor:
    return sface_kernels.sface_loss(x, loss_func.W.t(), y, a=0.87, b=1.2, reduction="none")


def library_loop(loss_func: nn.Module, dtype: torch.dtype) -> Tensor:
    """As in the library's documentation: a model, a miner, a loss with an optimizer of its own."""
    model = backbone().to(dtype)
    loss_func.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_optimizer = torch.optim.SGD(loss_func.parameters(), lr=0.05)
    curve = []
    for data, labels in batches():
        optimizer.zero_grad()
        loss_optimizer.zero_grad()
        embeddings = model(data.to(dtype))
        # every triplet: what a miner would pick from embeddings could differ by a rounding
        indices_tuple = lmu.get_all_triplets_indices(labels)
        loss = loss_func(embeddings, labels, indices_tuple)
        loss.backward()
        optimizer.step()
        loss_optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve, dtype=torch.float64)


def test_same_losses_in_the_librarys_loop():
    def run(kind, dtype):
        torch.manual_seed(5)
        loss_func = kind(CLASSES, FEATURES, a=RECIPE["a"], b=RECIPE["b"])
        torch.manual_seed(6)
        start = torch.empty(CLASSES, FEATURES).normal_(std=sface_kernels.loss.initial_std(CLASSES))
        with torch.no_grad():
            (loss_func.W.t() if kind is SFaceLoss else loss_func.head.weight).copy_(start)
        return library_loop(loss_func, dtype)

    ours, plain, truth = run(SFaceLoss, torch.float32), run(PlainLoss, torch.float32), run(PlainLoss, torch.float64)
    assert_same_curve(ours, plain, truth)
    assert truth[0] > 0 > truth[-1]


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


def gathered() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(8)
    x, y = problem()
    mine = slice(0, 5) if dist.get_rank() == 0 else slice(5, 10)
    torch.manual_seed(9)
    loss_func = pml_dist.DistributedLossWrapper(new_loss())
    rows = x.detach()[mine].requires_grad_()
    loss = loss_func(rows, y[mine])
    loss.backward()
    return loss.detach(), rows.grad, loss_func.loss.W.grad


def test_distributed_wrapper(pool):
    """The library multiplies the loss of all rows by the number of processes, for backbones whose gradients are averaged."""
    torch.manual_seed(8)
    x, y = problem()
    torch.manual_seed(9)
    loss_func = new_loss()
    loss = loss_func(x[:10], y[:10])
    loss.backward()
    results = pool.run(2, gathered)
    for theirs, _, grad_w in results:
        torch.testing.assert_close(theirs, 2 * loss.detach())
        torch.testing.assert_close(grad_w, 2 * loss_func.W.grad)
    torch.testing.assert_close(torch.cat([rows for _, rows, _ in results]), 2 * x.grad[:10])


def test_trainer_and_tester():
    """Two epochs in the library's trainer: by its tester, more rows have a row of their class as their nearest."""
    images, labels = (torch.cat(part) for part in zip(*batches(), strict=True))
    data = TensorDataset(images, labels)
    model = backbone()
    torch.manual_seed(5)
    loss_func = SFaceLoss(CLASSES, FEATURES, a=RECIPE["a"], b=RECIPE["b"])
    tester = testers.GlobalEmbeddingSpaceTester(
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        accuracy_calculator=accuracy_calculator.AccuracyCalculator(
            include=("precision_at_1",),
            k=1,
            device=torch.device("cpu"),
            knn_func=inference.CustomKNN(distances.CosineSimilarity()),
        ),
    )

    def precision() -> float:
        return tester.test({"val": data}, 0, model)["val"]["precision_at_1_level0"]

    before = precision()
    trainer = trainers.MetricLossOnly(
        models={"trunk": model},
        optimizers={
            "trunk_optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            "metric_loss_optimizer": torch.optim.SGD(loss_func.parameters(), lr=0.05, momentum=0.9),
        },
        batch_size=32,
        loss_funcs={"metric_loss": loss_func},
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
        dataset=data,
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
    )
    trainer.train(num_epochs=2)
    after = precision()
    assert after > before + 0.1, (before, after)
