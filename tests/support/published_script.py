"""What the published training script does with a head, in words of our own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sface_kernels.compat.official import SFaceLoss

STEPS, ROWS, PIXELS, FEATURES, CLASSES = 50, 32, 24, 32, 53  # classes prime, so that no block divides them
RECIPE = {"s": 64.0, "k": 80.0, "a": 0.87, "b": 1.2}
CURVES = ("loss", "intra", "inter", "WyiX", "WjX")
UNIT = 2.0**-24  # one fp32 rounding


class PlainHead(nn.Module):
    """The same interface in plain autograd, N×C everywhere: what the curves are compared with."""

    def __init__(self, in_features, out_features, device_id, s=64.0, k=80.0, a=0.80, b=1.23):
        super().__init__()
        self.s, self.k, self.a, self.b = s, k, a, b
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        xavier_normal_fan_out(self.weight.data)

    def cosines(self, x, label):
        cos = F.normalize(x) @ F.normalize(self.weight).t()
        return cos, F.one_hot(label, cos.shape[1]).to(cos.dtype)

    def row_parts(self, cos, own):
        """Both parts of each row's loss, [N] each."""
        theta = cos.detach().acos()
        p = torch.sigmoid(self.k * (theta - self.a))
        q = torch.sigmoid(-self.k * (theta - self.b))
        return -(own * p * self.s * cos).sum(1), ((1 - own) * q * self.s * cos).sum(1)

    def forward(self, x, label):
        cos, own = self.cosines(x, label)
        intra, inter = self.row_parts(cos, own)
        cos_own, cos_other = (own * cos).sum(1), (1 - own) * cos
        loss = intra.mean() + inter.mean()
        return self.s * cos, loss, intra.mean(), inter.mean(), cos_own.mean(), cos_other.mean()


def xavier_normal_fan_out(tensor: Tensor) -> None:
    tensor.normal_(0, 2 * math.sqrt(2 / tensor.shape[0]))


def weight_init(module: nn.Module) -> None:
    """For `apply`: ones into normalisations and PReLU, everything else that has a weight is drawn again."""
    if isinstance(module, (nn.BatchNorm1d, nn.PReLU)):
        module.weight.data.fill_(1)
    elif getattr(module, "weight", None) is not None:
        xavier_normal_fan_out(module.weight.data)
    if getattr(module, "bias", None) is not None:
        module.bias.data.zero_()  # type: ignore[operator]


def split_parameters(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of batch normalisations, and the rest, told apart by words in the class of each layer."""
    of_norms: list[Tensor] = []
    others: list[Tensor] = []
    for layer in module.modules():
        name = str(layer.__class__)
        if "model" in name or "container" in name or "mobilefacenet" in name:
            continue
        (of_norms if "batchnorm" in name else others).extend(layer.parameters())
    return of_norms, others


def accuracy(output, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """For each k the percent of rows with their class among the first k, by the calls that the reference's own makes."""
    _, pred = output.topk(max(topk), 1, True, True)
    pred = pred.t()
    correct = pred.eq(target.view(1, -1).expand_as(pred))
    return [correct[:k].reshape(-1).float().sum(0).mul_(100.0 / target.size(0)) for k in topk]


def train_accuracy(output, target: Tensor, topk: tuple[int, ...] = (1,)) -> Tensor:
    return accuracy(output, target, topk)[0]


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(9)
    centres = torch.randn(CLASSES, PIXELS, generator=g)
    out = []
    for _ in range(STEPS):
        labels = torch.randint(0, CLASSES, (ROWS,), generator=g)
        out.append((centres[labels] + 0.8 * torch.randn(ROWS, PIXELS, generator=g), labels))
    return out


class Run(NamedTuple):
    curves: Tensor  # [STEPS, 5] fp64, the columns of CURVES
    prec1: list[float]
    prec5: list[float]
    logits: list[Tensor]  # [N, C] fp64 of each step, where they are tensors


def backbone() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(PIXELS, 48), nn.BatchNorm1d(48), nn.PReLU(), nn.Linear(48, FEATURES))


def assert_same_curve(
    ours: Tensor, plain: Tensor, truth: Tensor, unit: float = UNIT, screened: Tensor | float = 0.0
) -> None:
    """Beside the fp64 curve, ours strays like the plain one in its own dtype does; curves `[STEPS]` or `[STEPS, curves]`.

    Both start at the same numbers, add roundings of the same size in each step, and the same training
    amplifies them. So the largest error of the plain run so far measures what is due to rounding; four times
    that, as each run draws its own roundings, plus one rounding of the curve (`unit`), as the plain run may be lucky
    in its first steps. `screened` is what a curve may be off by as it is of a screen's unit rows.
    """
    noise = (plain - truth).abs().cummax(0).values
    rounding = unit * truth.abs().amax(0).clamp_min(1)  # cosines of single rows go up to 1
    excess = ((ours - truth).abs() / (4 * (noise + rounding) + screened)).amax(0)
    assert excess.max() <= 1, f"up to {excess.tolist()} of what rounding explains"


def train(head: nn.Module, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Run:
    net = backbone()
    for module in (net, head):
        module.apply(weight_init).to(device, dtype)  # drawn in fp32, so that every run starts at the same numbers
    norms, others = split_parameters(net)
    _, head_others = split_parameters(head)
    groups = [{"params": others + head_others, "weight_decay": 5e-4}, {"params": norms}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    curves, prec1, prec5, logits = [], [], [], []
    for inputs, labels in batches():
        inputs, labels = inputs.to(device, dtype), labels.to(device).long()
        features = net(inputs)
        outputs, loss, intra_loss, inter_loss, WyiX, WjX = head(features, labels)
        prec1.append(train_accuracy(outputs.data, labels, topk=(1,)).data.item())
        prec5.append(train_accuracy(outputs.data, labels, topk=(5,)).data.item())
        curves.append([v.data.item() for v in (loss, intra_loss, inter_loss, WyiX, WjX)])
        if isinstance(outputs, Tensor):
            logits.append(outputs.detach().double().cpu())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Run(torch.tensor(curves, dtype=torch.float64), prec1, prec5, logits)


def small(case=None, rows: int = 7, classes: int = 770, features: int = 24, **kwargs) -> tuple:
    """A head, embeddings and labels; half of the rows lie near their class centre."""
    torch.manual_seed(3)
    device = case.device if case else "cpu"
    head = SFaceLoss(features, classes, None, **kwargs, backend=case.backend if case else "auto").to(device)
    y = torch.randint(0, classes, (rows,), device=device)
    x = head.weight.detach()[y] * (torch.arange(rows, device=device) % 2).unsqueeze(1) + torch.randn(
        rows, features, device=device
    ).mul(0.02)
    return head, x.requires_grad_(), y
