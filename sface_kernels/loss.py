"""The public loss, as a function and as a module: validate → autograd → reduce."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from . import validation
from .autograd import row_losses
from .dispatch import check_name, select
from .growing import replace_parameter
from .histograms import AngleCounter
from .ops import prepare_labels
from .types import DEFAULTS, IGNORED, Request, RowStats, SFaceStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """Those of `sface_loss` that do not change what it returns."""

    s: float
    k: float
    a: float
    b: float
    k_inter: float | None
    reduction: str
    ignore_index: int
    filter_eps: float | None
    backend: str
    angle_counter: AngleCounter | None


@overload
def sface_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def sface_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, return_stats: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, SFaceStats]: ...
@overload
def sface_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, return_stats: bool, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, SFaceStats]: ...
def sface_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    s: float = DEFAULTS.s,
    k: float = DEFAULTS.k,
    a: float = DEFAULTS.a,
    b: float = DEFAULTS.b,
    k_inter: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    filter_eps: float | None = None,
    backend: str = "auto",
    angle_counter: AngleCounter | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, SFaceStats]:
    """SFace, the sigmoid-constrained hypersphere loss, without any N×C tensor.

    With θ_ij = arccos(x̂_i · ŵ_j), p_i = s·sigmoid(k (θ_iy − a)) and q_ij = s·sigmoid(−k_inter (θ_ij − b)) taken as
    constants, row i costs `−p_i cos θ_iy + Σ_{j≠y} q_ij cos θ_ij`. Equivalent PyTorch, which builds N×C tensors::

        cos = F.normalize(embeddings) @ F.normalize(weight).t()
        theta = cos.clamp(-1, 1).acos().detach()
        p, q = s * torch.sigmoid(k * (theta - a)), s * torch.sigmoid(-k_inter * (theta - b))
        own = F.one_hot(labels, len(weight)).bool()
        loss = torch.where(own, -p * cos, q * cos).sum(1).mean()

    The loss starts near 0, turns negative as training goes well, and need not fall monotonically.

    Args:
        embeddings: `[N, D]`, float32, float16, bfloat16 or float64. Need not be normalised.
        weight: `[C, D]` class centres, float32 or the dtype of the embeddings. Need not be normalised.
        labels: `[N]` or `[N, 1]`, any integer dtype, in [0, C) or `ignore_index`.
        s: scale of both terms, > 0.
        k: slope of the intra-class sigmoid (and of the inter-class one unless `k_inter` is given), > 0.
        a: angle in radians around which the pull to the own class fades.
        b: angle in radians around which the push from other classes sets in.
        k_inter: slope of the inter-class sigmoid; `k` if None.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for the row losses `[N]`.
        ignore_index: rows with this label count neither in the loss nor in the mean.
        filter_eps: gradient entries with q_ij < filter_eps·s are dropped; the loss always counts every pair. 0 drops
            nothing, None entries that the dtype's arithmetic loses beside one of size s (2⁻²⁴ for float32). Where many
            of these share a direction, as in early epochs, they add up to more than rounding (docs/accuracy.md);
            `SFaceStats.dropped` bounds what is missing in every step. With an optimizer that divides by the gradient's
            size (Adam, AdamW, Adagrad, RMSprop) give 0: a class row whose every entry was dropped gets a gradient of
            exactly 0 and stands still where such an optimizer would move it. SGD is linear: the default is safe.
        backend: "auto", "native", "triton", "chunked" or "reference" (see `explain`); a name never falls back.
        angle_counter: counts the angles of this call (`sface_kernels.angles`).
        return_stats: also return `SFaceStats`.

    Returns:
        The loss, at least float32: 0-d, or `[N]` for reduction="none"; with `return_stats` the pair (loss, stats).
        With every row ignored, or N = 0, it is 0 and the gradients are zeros.

    Raises:
        TypeError, ValueError: an argument is off; the text names it, what was expected and what came. A label out of
            range raises on the CPU; on a GPU its row's loss is NaN unless the environment has SFACE_CHECK_LABELS=1.
        RuntimeError: the named backend cannot run here, or the loss is differentiated twice.

    Source: Zhong et al., "SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition", IEEE TIP 2021.
    """
    validation.check_tensors(embeddings, weight, labels)
    validation.check_reduction(reduction)
    ignore_index = validation.integer("ignore_index", ignore_index)
    hp = validation.make_hyperparameters(s, k, a, b, k_inter, filter_eps, embeddings.dtype, embeddings.shape[1])
    request = Request(embeddings.device, embeddings.dtype, weight.dtype, embeddings.shape[1])
    chosen = select(backend, request)

    check_labels = embeddings.device.type == "cpu" or os.environ.get("SFACE_CHECK_LABELS") == "1"
    target = prepare_labels(labels, weight.shape[0], ignore_index, check_labels)  # [N]
    row_loss, row_stats, counts = row_losses(embeddings, weight, target, chosen, hp)  # [N], [6, N], [2]
    if angle_counter is not None:
        if not isinstance(angle_counter, AngleCounter):
            raise TypeError(f"angle_counter: expected an AngleCounter, got {type(angle_counter).__name__}")
        angle_counter(embeddings, weight, target, RowStats(*row_stats.unbind(0)))
    counted = (target != IGNORED).sum().clamp_min(1)  # rows in the mean; 1 avoids 0/0 where all are ignored

    loss = row_loss
    if reduction != "none":
        loss = row_loss.sum()
        if reduction == "mean":
            loss = loss / counted
    if not return_stats:
        return loss
    return loss, _summarise(row_stats, counts, target, counted, weight.shape[0])


def _summarise(row_stats: Tensor, counts: Tensor, target: Tensor, counted: Tensor, classes: int) -> SFaceStats:
    rows = RowStats(*row_stats.unbind(0))
    active_pairs, dense_pairs = counts.unbind(0)
    correct = (rows.cos_target > rows.hardest) & (target != IGNORED)
    return SFaceStats(
        intra=rows.intra.sum() / counted,
        inter=rows.inter.sum() / counted,
        cos_target=rows.cos_target.sum() / counted,
        cos_other=rows.cos_other_sum.sum() / (counted * classes),
        accuracy=correct.to(row_stats.dtype).sum() / counted,
        active_pairs=active_pairs,
        dropped=rows.dropped.sum() / counted,
        dense_share=dense_pairs.to(row_stats.dtype) / (counted * classes),
    )


class SFaceLoss(nn.Module):
    """The SFace head: class centres `weight` `[out_features, in_features]` and the loss of `sface_loss` on them.

    The only parameter is `weight`, initialised N(0, 2·√(2/C)) as the reference module does.

    Args:
        in_features: D, size of an embedding.
        out_features: C, number of classes.
        device, dtype: of the weight; dtype float32 by default.
        s, k, a, b, k_inter, reduction, ignore_index, filter_eps, backend: as in `sface_loss`.
        angle_histogram: in training mode, count the angles of one batch in four (`head.angle_counter.every`);
            `head.angle_counter.histograms()` gives them, and `sface_kernels.angles` reads a and b from them.

    Example::

        head = SFaceLoss(512, 85_742)
        loss = head(embeddings, labels)
        loss, stats = head(embeddings, labels, return_stats=True)
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        s: float = DEFAULTS.s,
        k: float = DEFAULTS.k,
        a: float = DEFAULTS.a,
        b: float = DEFAULTS.b,
        k_inter: float | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        filter_eps: float | None = None,
        backend: str = "auto",
        angle_histogram: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = validation.integer("in_features", in_features, positive=True)
        out_features = validation.integer("out_features", out_features, positive=True)
        ignore_index = validation.integer("ignore_index", ignore_index)
        validation.check_reduction(reduction)
        check_name(backend)
        validation.make_hyperparameters(s, k, a, b, k_inter, filter_eps, torch.float32, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.s, self.k, self.a, self.b, self.k_inter = s, k, a, b, k_inter
        self.reduction, self.ignore_index = reduction, ignore_index
        self.filter_eps, self.backend = filter_eps, backend
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.angle_counter = AngleCounter(device=device) if angle_histogram else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 2·√(2/C)): xavier normal with gain 2 over the fan-out, the reference module's."""
        nn.init.normal_(self.weight, std=2 * math.sqrt(2 / self.out_features))
        if self.angle_counter is not None:
            self.angle_counter.reset_parameters()

    @torch.no_grad()
    def add_classes(self, count: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Append `count` classes with rows N(0, 2·√(2/C)), C with them. The old rows stay as they are.

        `weight` becomes another Parameter, without a gradient. Give the `optimizer` that holds it: it goes on with the
        new one, and with its state for the old rows, zeros for the others.

        Raises:
            TypeError, ValueError: `count` is no int > 0, or the optimizer does not hold the weight.
        """
        count = validation.integer("count", count, positive=True)
        old, total = self.weight, self.out_features + count
        rows = nn.init.normal_(old.new_empty(count, self.in_features), std=2 * math.sqrt(2 / total))
        new = nn.Parameter(torch.cat([old, rows]), requires_grad=old.requires_grad)
        if optimizer is not None:
            replace_parameter(optimizer, old, new, lambda t: torch.cat([t, t.new_zeros(count, *t.shape[1:])]))
        self.weight, self.out_features = new, total
        if self.angle_counter is not None:
            self.angle_counter.reset()  # its counts are shares of another number of classes

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, SFaceStats]:
        """The loss of `embeddings` `[N, D]` with `labels` `[N]`; with `return_stats`, (loss, SFaceStats)."""
        return sface_loss(
            embeddings,
            self.weight,
            labels,
            s=self.s,
            k=self.k,
            a=self.a,
            b=self.b,
            k_inter=self.k_inter,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            filter_eps=self.filter_eps,
            backend=self.backend,
            angle_counter=self.angle_counter if self.training else None,
            return_stats=return_stats,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, s={self.s}, k={self.k}, "
            f"a={self.a}, b={self.b}, filter_eps={self.filter_eps}, backend={self.backend!r}"
        )
