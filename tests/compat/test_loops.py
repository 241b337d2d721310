"""Training loops written as other projects write theirs, with the head swapped: the same losses as the original arithmetic.

Each loop runs three times from the same numbers: with the published arithmetic in fp64 and in fp32, and with this package.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from sface_kernels import SFaceLoss
from sface_kernels.compat import official
from tests.support.published_script import (
    CLASSES,
    FEATURES,
    PIXELS,
    RECIPE,
    ROWS,
    PlainHead,
    accuracy,
    assert_same_curve,
    backbone,
    batches,
    split_parameters,
)

EPOCH = 10  # steps


class PlainLoss(PlainHead):
    """The published arithmetic where a loop wants the loss alone; rows with the label −100 are left out."""

    def forward(self, x, label):
        return super().forward(x[label != -100], label[label != -100])[1]


def epochs() -> list[list[tuple[Tensor, Tensor]]]:
    steps = batches()
    return [steps[first : first + EPOCH] for first in range(0, len(steps), EPOCH)]


class FaceModel(nn.Module):
    """FaceX-Zoo's, of a backbone and a head."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, data, label):
        feat = self.backbone.forward(data)
        return self.head.forward(feat, label)


def facex_zoo(head: nn.Module, dtype: torch.dtype) -> Tensor:
    """`criterion(model.forward(images, labels), labels)`: the head's output is the loss, the criterion hands it on."""
    criterion = lambda outputs, labels: outputs.mean()  # noqa: E731  the line to change in their train()
    model = FaceModel(backbone(), head).to(dtype)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.1)
    model.train()
    losses = []
    for epoch in epochs():
        for images, labels in epoch:
            labels = labels.unsqueeze(1).squeeze()  # their data set has [N, 1]
            outputs = model.forward(images.to(dtype), labels)
            loss = criterion(outputs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
    return torch.tensor(losses, dtype=torch.float64)


def face_evolve(HEAD: nn.Module, dtype: torch.dtype) -> Tensor:
    """Six values instead of logits for a loss; a warm-up by steps, stages, top 1 and top 5 from one call."""
    BACKBONE, LR = backbone().to(dtype), 0.05
    HEAD.to(dtype)
    only_bn, wo_bn = split_parameters(BACKBONE)
    _, head_wo_bn = split_parameters(HEAD)
    groups = [{"params": wo_bn + head_wo_bn, "weight_decay": 5e-4}, {"params": only_bn}]
    OPTIMIZER = torch.optim.SGD(groups, lr=LR, momentum=0.9)
    curve, batch = [], 0
    for epoch, loader in enumerate(epochs()):
        if epoch in (3, 4):
            for group in OPTIMIZER.param_groups:
                group["lr"] /= 10
        BACKBONE.train()
        HEAD.train()
        for inputs, labels in loader:
            if batch < EPOCH:
                for group in OPTIMIZER.param_groups:
                    group["lr"] = (batch + 1) * LR / EPOCH
            labels = labels.long()
            features = BACKBONE(inputs.to(dtype))
            outputs, loss, *_ = HEAD(features, labels)  # were: outputs = HEAD(...); loss = LOSS(outputs, labels)
            prec1, prec5 = accuracy(outputs.data, labels, topk=(1, 5))
            OPTIMIZER.zero_grad()
            loss.backward()
            OPTIMIZER.step()
            curve.append([loss.data.item(), prec1.data.item(), prec5.data.item()])
            batch += 1
    return torch.tensor(curve, dtype=torch.float64)


def cross_entropy(criterion: nn.Module, dtype: torch.dtype) -> Tensor:
    """`criterion(net(inputs), labels)` with nn.CrossEntropyLoss's words: ignored labels, an average over the others."""
    net = backbone().to(dtype)
    optimizer = torch.optim.SGD([*net.parameters(), *criterion.to(dtype).parameters()], lr=0.05, momentum=0.9)
    losses = []
    for step, (inputs, labels) in enumerate(batches()):
        labels = labels.masked_fill(torch.arange(ROWS) < step % 4, -100)
        optimizer.zero_grad()
        loss = criterion(net(inputs.to(dtype)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


class ViT_face(nn.Module):
    """Face-Transformer's shape: the head is a part of the network, which returns its output and the embedding."""

    def __init__(self, head, patch=4):
        super().__init__()
        torch.manual_seed(11)
        self.patch = patch
        self.pos_embedding = nn.Parameter(torch.randn(1, PIXELS // patch + 1, FEATURES))
        self.patch_to_embedding = nn.Linear(patch, FEATURES)
        self.cls_token = nn.Parameter(torch.randn(1, 1, FEATURES))
        self.transformer = nn.TransformerEncoderLayer(
            FEATURES, 2, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.mlp_head = nn.Sequential(nn.LayerNorm(FEATURES))
        self.loss = head

    def forward(self, img, label=None):
        x = self.patch_to_embedding(img.view(len(img), -1, self.patch))
        x = torch.cat((self.cls_token.expand(len(img), -1, -1), x), dim=1) + self.pos_embedding
        emb = self.mlp_head(self.transformer(x)[:, 0])
        if label is not None:
            return self.loss(emb, label), emb
        return emb


def face_transformer(head: nn.Module, dtype: torch.dtype) -> Tensor:
    """AdamW with a warm-up and a cosine, no decay of vectors; the scale of the steps is Face-Transformer's times ten."""
    BACKBONE = ViT_face(head).to(dtype)
    decayed = [p for p in BACKBONE.parameters() if p.dim() > 1]
    others = [p for p in BACKBONE.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    OPTIMIZER = torch.optim.AdamW(groups, lr=5e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(OPTIMIZER, 0.01, total_iters=EPOCH)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(OPTIMIZER, 4 * EPOCH)
    schedule = torch.optim.lr_scheduler.SequentialLR(OPTIMIZER, [warm_up, cosine], [EPOCH])
    BACKBONE.train()
    curve = []
    for inputs, labels in batches():
        (outputs, loss, *_), emb = BACKBONE(inputs.to(dtype), labels)
        assert emb.shape == (ROWS, FEATURES)
        (prec1,) = accuracy(outputs.data, labels)
        OPTIMIZER.zero_grad()
        loss.backward()
        OPTIMIZER.step()
        schedule.step()
        curve.append([loss.item(), prec1.item()])
    BACKBONE.eval()
    assert BACKBONE(inputs.to(dtype)).shape == (ROWS, FEATURES)
    return torch.tensor(curve, dtype=torch.float64)


LOOPS = {
    facex_zoo: (PlainLoss, lambda backend: SFaceLoss(FEATURES, CLASSES, **RECIPE, backend=backend)),
    face_evolve: (PlainHead, lambda backend: official.SFaceLoss(FEATURES, CLASSES, [0], **RECIPE, backend=backend)),
    cross_entropy: (PlainLoss, lambda backend: SFaceLoss(FEATURES, CLASSES, **RECIPE, backend=backend)),
    face_transformer: (
        PlainHead,
        lambda backend: official.SFaceLoss(FEATURES, CLASSES, [0], **RECIPE, filter_eps=0, backend=backend),
    ),
}


@functools.cache
def original(loop, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(5)
    return loop(LOOPS[loop][0](FEATURES, CLASSES, None, **RECIPE), dtype)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_same_losses(case32, loop):
    if case32.device != "cpu":
        pytest.skip("the loops put everything on the CPU")
    torch.manual_seed(5)
    ours = loop(LOOPS[loop][1](case32.backend), torch.float32)
    truth = original(loop, torch.float64)
    assert_same_curve(ours, original(loop, torch.float32), truth)
    losses = truth if truth.dim() == 1 else truth[:, 0]
    assert losses.min() < 0 < losses[0]  # the run did something
