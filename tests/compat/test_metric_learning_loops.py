"""`sface_kernels.compat.metric_learning` in the loops of pytorch-metric-learning: by hand, its trainer, several processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sface_kernels.loss import initial_std
from tests.support.published_script import CLASSES, FEATURES, RECIPE, PlainHead, assert_same_curve, backbone, batches

pytest.importorskip("pytorch_metric_learning", reason="needs pytorch-metric-learning (requirements-dev.txt)")

from pytorch_metric_learning import distances, losses, miners, testers, trainers
from pytorch_metric_learning.utils import accuracy_calculator, inference
from pytorch_metric_learning.utils import distributed as pml_dist
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from sface_kernels.compat.metric_learning import SFaceLoss
from tests.compat.test_metric_learning import new_loss, problem


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
        start = torch.empty(CLASSES, FEATURES).normal_(std=initial_std(CLASSES))
        with torch.no_grad():
            (loss_func.W.t() if kind is SFaceLoss else loss_func.head.weight).copy_(start)
        return library_loop(loss_func, dtype)

    ours, plain, truth = run(SFaceLoss, torch.float32), run(PlainLoss, torch.float32), run(PlainLoss, torch.float64)
    assert_same_curve(ours, plain, truth)
    assert truth[0] > 0 > truth[-1]


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
