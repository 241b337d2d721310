"""The public loss, as a function and as a module: validate → autograd → reduce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor, nn

from . import cosines, validation
from .autograd import Labels, reduced_loss
from .dispatch import check_name, select
from .growing import replace_parameter
from .histograms import AngleCounter
from .ops import prepare_labels
from .pages import in_huge_pages
from .summary import describe_rows, row_weights, summarise
from .types import DEFAULTS, Request, RowStats, SFaceRowStats, SFaceStats

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
    sample_weight: Tensor | None
    filter_eps: float | None
    sparse_grad: bool
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
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, return_stats: Literal["rows"], **options: Unpack[_Options]
) -> tuple[Tensor, SFaceRowStats]: ...
@overload
def sface_loss(
    embeddings: Tensor, weight: Tensor, labels: Tensor, *, return_stats: bool | str, **options: Unpack[_Options]
) -> Tensor | tuple[Tensor, SFaceStats | SFaceRowStats]: ...
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
    sample_weight: Tensor | None = None,
    filter_eps: float | None = None,
    sparse_grad: bool = False,
    backend: str = "auto",
    angle_counter: AngleCounter | None = None,
    return_stats: bool | str = False,
) -> Tensor | tuple[Tensor, SFaceStats | SFaceRowStats]:
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
        labels: `[N]`, `[N, 1]`, or 0-d for N = 1; int64, int32, int16, int8 or uint8, in [0, C) or `ignore_index`.
        s: scale of both terms, > 0.
        k: slope of the intra-class sigmoid (and of the inter-class one unless `k_inter` is given), > 0.
        a: angle in radians around which the pull to the own class fades.
        b: angle in radians around which the push from other classes sets in.
        k_inter: slope of the inter-class sigmoid; `k` if None.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for the row losses `[N]`.
        ignore_index: rows with this label count neither in the loss nor in the mean.
        sample_weight: `[N]` of a float dtype: row i counts v_i times. "none" gives v_i l_i, "sum" Σ v_i l_i and "mean"
            Σ v_i l_i / Σ v_i, as `F.cross_entropy` with its weight of classes (0 where Σ v_i is 0). Differentiable. The
            statistics count every row alike.
        filter_eps: gradient entries with q_ij < filter_eps·s are dropped; the loss always counts every pair. 0 drops
            nothing, None entries that the dtype's arithmetic loses beside one of size s (2⁻²⁴ for float32). Where many
            of these share a direction, as in early epochs, they add up to more than rounding (docs/accuracy.md);
            `SFaceStats.dropped` bounds what is missing in every step. With an optimizer that divides by the gradient's
            size (Adam, AdamW, Adagrad, RMSprop) give 0: a class row whose every entry was dropped gets a gradient of
            exactly 0 and stands still where such an optimizer would move it. SGD is linear: the default is safe.
        sparse_grad: the gradient of the weight is a COO tensor of the rows that have one, as of
            `nn.Embedding(sparse=True)`, for `torch.optim.SGD` and `SparseAdam`. Rows without one then stay as they are:
            momentum and weight decay do not reach them. Waits for the device; DistributedDataParallel takes such
            gradients from `nn.Embedding` alone. To save the dense gradient's memory with an optimizer that moves every
            row take `sface_kernels.optim`.
        backend: "auto", "native", "triton", "chunked" or "reference" (see `explain`); a name never falls back.
        angle_counter: counts the angles of this call (`sface_kernels.angles`).
        return_stats: True returns `SFaceStats` too, means and counts of the batch; "rows" `SFaceRowStats`, a number for
            each row. On the device, detached, whatever the reduction.

    Returns:
        The loss, at least float32: 0-d, or `[N]` for reduction="none"; with `return_stats` the pair (loss, stats).
        With every row ignored, or N = 0, it is 0 and the gradients are zeros.

    Raises:
        TypeError, ValueError: an argument is off; the text names it, what was expected and what came. A label out of
            range raises on the CPU; on a GPU its row's loss is NaN unless the environment has SFACE_CHECK_LABELS=1.
        RuntimeError: the named backend cannot run here, the loss is differentiated twice, or torch.compile with
            `fullgraph=True` meets it inside a transform of torch.func.

    Source: Zhong et al., "SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition", IEEE TIP 2021.
    """
    validation.check_tensors(embeddings, weight, labels, sample_weight)
    validation.check_reduction(reduction)
    validation.check_return_stats(return_stats)
    sparse_grad = validation.boolean("sparse_grad", sparse_grad)
    if angle_counter is not None and not isinstance(angle_counter, AngleCounter):
        raise TypeError(f"angle_counter: expected an AngleCounter, got {type(angle_counter).__name__}")
    ignore_index = validation.integer("ignore_index", ignore_index)
    hp = validation.make_hyperparameters(s, k, a, b, k_inter, filter_eps, embeddings.dtype, embeddings.shape[1])
    request = Request(embeddings.device, embeddings.dtype, weight.dtype, embeddings.shape[1])
    chosen = select(backend, request)

    # weighted row losses are reduced here
    within = "none" if sample_weight is not None else reduction
    how = Labels(ignore_index, validation.checks_labels(embeddings.device))
    loss, counted, target, row_stats, hardest_class, counts = reduced_loss(
        embeddings, weight, labels, how, chosen, hp, within, backend != "auto", sparse_grad
    )
    if angle_counter is not None:
        angle_counter(embeddings, weight, target, RowStats(*row_stats.unbind(0)))
    if sample_weight is not None:
        weights = row_weights(sample_weight, target, loss.dtype)  # [N]
        loss = loss * weights
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            total = weights.sum()
            loss = loss / torch.where(total == 0, torch.inf, total)
    if return_stats == "rows":
        return loss, describe_rows(RowStats(*row_stats.unbind(0)), hardest_class, target)
    if return_stats:
        return loss, summarise(row_stats, counts, target, counted, weight.shape[0])
    return loss


def initial_std(classes: int, asked: float | None = None) -> float:
    """Standard deviation of a new weight: `asked`, or 2·√(2/C), xavier normal with gain 2 over the fan-out."""
    return 2 * math.sqrt(2 / classes) if asked is None else asked


class SFaceLoss(nn.Module):
    """The SFace head: class centres `weight` `[out_features, in_features]` and the loss of `sface_loss` on them.

    The only parameter is `weight`, initialised N(0, 2·√(2/C)) as the reference module does, or N(0, init_std).

    Args:
        in_features: D, size of an embedding; `embedding_size` by its other name.
        out_features: C, number of classes; `num_classes` by its other name.
        device, dtype: of the weight; torch's default ones if None.
        s, k, a, b, k_inter, reduction, ignore_index, filter_eps, sparse_grad, backend: as in `sface_loss`.
        init_std: standard deviation of the initial weight, > 0; 2·√(2/C) if None. An SGD step turns a row by an angle
            that goes with 1/‖row‖², so the default makes the first steps larger the more classes there are;
            D**-0.5 makes rows of length about 1 whatever C is (docs/training.md).
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
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        embedding_size: int | None = None,
        num_classes: int | None = None,
        s: float = DEFAULTS.s,
        k: float = DEFAULTS.k,
        a: float = DEFAULTS.a,
        b: float = DEFAULTS.b,
        k_inter: float | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        filter_eps: float | None = None,
        sparse_grad: bool = False,
        backend: str = "auto",
        init_std: float | None = None,
        angle_histogram: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = validation.size(in_features=in_features, embedding_size=embedding_size)
        out_features = validation.size(out_features=out_features, num_classes=num_classes)
        ignore_index = validation.integer("ignore_index", ignore_index)
        validation.check_reduction(reduction)
        check_name(backend)
        validation.check_dtype("dtype", dtype)
        hp = validation.make_hyperparameters(s, k, a, b, k_inter, filter_eps, dtype or torch.float32, in_features)
        self.in_features, self.out_features = in_features, out_features
        # Python's own numbers, as torch.compile takes numpy's for arrays
        self.s, self.k, self.a, self.b = hp.s, hp.k_intra, hp.a, hp.b
        self.k_inter = None if k_inter is None else hp.k_inter
        self.reduction, self.ignore_index = reduction, ignore_index
        self.filter_eps = None if filter_eps is None else hp.filter_eps
        self.sparse_grad, self.backend = validation.boolean("sparse_grad", sparse_grad), backend
        self.init_std = validation.check_init_std(init_std)
        angle_histogram = validation.boolean("angle_histogram", angle_histogram)
        self.weight = nn.Parameter(in_huge_pages(torch.empty(out_features, in_features, device=device, dtype=dtype)))
        self.angle_counter = AngleCounter(device=device) if angle_histogram else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, init_std), or N(0, 2·√(2/C)) where that is None."""
        nn.init.normal_(self.weight, std=initial_std(self.out_features, self.init_std))
        if self.angle_counter is not None:
            self.angle_counter.reset_parameters()

    @torch.no_grad()
    def add_classes(self, count: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Append `count` classes with rows N(0, init_std), or N(0, 2·√(2/C)), C with them. The old rows stay.

        `weight` becomes another Parameter, without a gradient. Give the `optimizer` that holds it: it goes on with the
        new one, and with its state for the old rows, zeros for the others, where that has the weight's shape or is
        `[C, 1]`.

        Raises:
            TypeError, ValueError: `count` is no int > 0, the weight is no plain Parameter (parametrized, or spread over
                processes), or the optimizer does not hold it.
        """
        count = validation.integer("count", count, positive=True)
        validation.check_parameter(self.weight)
        old, total = self.weight, self.out_features + count
        rows = nn.init.normal_(old.new_empty(count, self.in_features), std=initial_std(total, self.init_std))
        both = in_huge_pages(old.new_empty(total, self.in_features))
        new = nn.Parameter(torch.cat([old, rows], out=both), requires_grad=old.requires_grad)
        if optimizer is not None:
            replace_parameter(optimizer, old, new, lambda t: torch.cat([t, t.new_zeros(count, *t.shape[1:])]))
        self.weight, self.out_features = new, total
        if self.angle_counter is not None:
            self.angle_counter.reset()  # its counts are shares of another number of classes

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        return_stats: bool | str = False,
    ) -> Tensor | tuple[Tensor, SFaceStats | SFaceRowStats]:
        """The loss of `embeddings` `[N, D]` with `labels` `[N]`; with `return_stats`, (loss, statistics)."""
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
            sample_weight=sample_weight,
            filter_eps=self.filter_eps,
            sparse_grad=self.sparse_grad,
            backend=self.backend,
            angle_counter=self.angle_counter if self.training else None,
            return_stats=return_stats,
        )

    def topk(self, embeddings: Tensor, k: int) -> torch.return_types.topk:
        """The k largest cosines of each row and their classes, (values, indices) `[N, k]`, as `torch.topk` of
        `F.normalize(embeddings) @ F.normalize(weight).t()` in blocks of classes: 8 MiB instead of N×C, more past
        4096 rows or features. No gradient.

        Raises:
            TypeError, ValueError: an argument is off, or k > C.
        """
        return cosines.checked_topk(embeddings, self.weight, k)

    @torch.no_grad()
    def topk_correct(self, embeddings: Tensor, labels: Tensor, topk: Sequence[int] = (1, 5)) -> Tensor:
        """How many rows have their own class among the k nearest, for each k of `topk`: int64 `[len(topk)]`, on the
        device. Rows with `ignore_index` are no hits. `SFaceStats.accuracy` is the share for k = 1 up to the rounding of
        a screen, and costs nothing.

        Raises:
            TypeError, ValueError: an argument is off, or a k > C.
        """
        validation.check_tensors(embeddings, self.weight, labels)
        counts, check = cosines.check_counts(topk, self.weight.shape[0]), validation.checks_labels(embeddings.device)
        target = prepare_labels(labels, self.weight.shape[0], self.ignore_index, check)
        return cosines.count_hits(self.topk(embeddings, max(counts)).indices, target, counts)

    def logits(self, embeddings: Tensor) -> Tensor:
        """s·cosine to every class, `[N, C]`, at least float32, differentiable: cut N into parts where that is too much.

        Under `torch.no_grad()` nothing else of that size is made; with a gradient the normalised weight `[C, D]` is.
        """
        return cosines.logits(embeddings, self.weight, self.s)

    def cosine(self, embeddings: Tensor, classes: Tensor) -> Tensor:
        """Cosines of row i to the centres of `classes[i]`, where `classes` is `[N]` or `[N, M]`, in that shape.

        Differentiable, and at least float32; `.acos()` gives the angles. Makes N·M rows of D features.

        Raises:
            TypeError, ValueError: an argument is off. A class outside [0, C) raises where labels do, else gives NaN.
        """
        return cosines.cosine(embeddings, self.weight, classes)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, s={self.s}, k={self.k}, "
            f"a={self.a}, b={self.b}, filter_eps={self.filter_eps}, backend={self.backend!r}"
        )
