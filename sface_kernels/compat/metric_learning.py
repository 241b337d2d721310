"""SFace as a loss of pytorch-metric-learning 2.x, for its reducers, miners, regularizers, wrappers and trainers.

    from sface_kernels.compat.metric_learning import SFaceLoss

    loss_func = SFaceLoss(num_classes, embedding_size)
    loss = loss_func(embeddings, labels, miner(embeddings, labels))

The extra `metric-learning` installs that library. Where it differs from that library's own classification losses:

- No N×C tensor, except in `get_logits`.
- `W` `[D, C]` keeps its dtype: with float16 or bfloat16 embeddings it stays the float32 master weight.
- Losses are at least float32 whatever the embeddings are. (With a regularizer the library adds them up in the dtype of
  the embeddings: use float32 ones then.)
- Row losses turn negative as training goes well, so what a reducer does with negative numbers matters. Sound:
  MeanReducer (the default), SumReducer, ClassWeightedReducer, DoNothingReducer; PerAnchorReducer and MultipleReducers
  with sound ones inside. Not sound, and warned of: AvgNonZeroReducer and ThresholdReducer(low=...), which drop rows
  that are on their way to their class. ThresholdReducer(high=...) drops the hardest rows, as with any loss, and
  DivisorReducer wants a divisor that none of the library's classification losses gives.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

try:
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
    from pytorch_metric_learning.reducers import ThresholdReducer
    from pytorch_metric_learning.utils import common_functions, loss_and_miner_utils
except ImportError as error:
    raise ImportError(
        "sface_kernels.compat.metric_learning: expected pytorch-metric-learning 2.x to be installed "
        f"(pip install 'pytorch-metric-learning>=2,<3'), got: {error}"
    ) from error

from .. import validation
from ..dispatch import check_name
from ..loss import initial_std, sface_loss
from ..ops import compute_dtype
from ..pages import in_huge_pages
from ..types import DEFAULTS


def published_initialisation(weight: Tensor) -> None:
    """N(0, 2·√(2/C)) into `weight` `[D, C]`, with the numbers that `sface_kernels.SFaceLoss` draws from the seed."""
    nn.init.normal_(weight.t(), std=initial_std(weight.shape[1]))


class SFaceLoss(WeightRegularizerMixin, BaseMetricLossFunction):
    """`sface_kernels.sface_loss` with the interface of pytorch-metric-learning: `loss(embeddings, labels, ...)`.

    Called with embeddings `[N, D]`, labels `[N]` and, if wanted, a miner's `indices_tuple`, whose weight of each row
    multiplies that row's loss, as in the library's other classification losses. `ref_emb` is refused, as there.

    The only parameter is `W` `[D, C]`, the library's shape. In memory it lies class by class, so that the kernels read
    `W.t()` without a copy.

    Args:
        num_classes: C.
        embedding_size: D.
        s, k, a, b, k_inter, filter_eps, backend: as in `sface_kernels.sface_loss`.
        kwargs: the library's own: `reducer`, `weight_init_func` (called with `W`; `published_initialisation` if None),
            `weight_regularizer`, `weight_reg_weight`, `embedding_regularizer`, `embedding_reg_weight`, `distance`
            (a plain CosineSimilarity if given) and `collect_stats`, which records `intra`, `inter` and `cos_target`
            of each batch, and waits for the device to do so.

    Raises:
        TypeError, ValueError: an argument is off; or in a call, as `sface_kernels.sface_loss`.
    """

    W: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        s: float = DEFAULTS.s,
        k: float = DEFAULTS.k,
        a: float = DEFAULTS.a,
        b: float = DEFAULTS.b,
        *,
        k_inter: float | None = None,
        filter_eps: float | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        distance = self.distance
        if not isinstance(distance, CosineSimilarity) or (distance.p, distance.power) != (2, 1):
            raise ValueError(f"distance: expected CosineSimilarity() with p=2 and power=1, got {distance!r}")
        self.num_classes = validation.integer("num_classes", num_classes, positive=True)
        self.embedding_size = validation.integer("embedding_size", embedding_size, positive=True)
        validation.make_hyperparameters(s, k, a, b, k_inter, filter_eps, torch.float32, self.embedding_size)
        check_name(backend)
        self.s, self.k, self.a, self.b, self.k_inter = s, k, a, b, k_inter
        self.filter_eps, self.backend = filter_eps, backend
        self.add_to_recordable_attributes(list_of_names=["num_classes", "s", "k", "a", "b"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["intra", "inter", "cos_target"], is_stat=True)
        self.W = nn.Parameter(in_huge_pages(torch.empty(self.num_classes, self.embedding_size)).t())
        self.weight_init_func(self.W)

    def get_default_distance(self) -> CosineSimilarity:
        return CosineSimilarity()

    def get_default_weight_init_func(self) -> Any:
        return published_initialisation

    def set_reducer(self, reducer: Any) -> None:
        super().set_reducer(reducer)
        for part in self.reducer.modules():
            if isinstance(part, ThresholdReducer) and part.low is not None:
                warnings.warn(
                    f"reducer: {type(part).__name__} drops rows whose loss is below {part.low}. Row losses of SFace "
                    "turn negative as rows come near their class, and still have to be pulled: take MeanReducer.",
                    stacklevel=8,  # past the library's constructors, the line that makes the loss
                )

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Any,
        indices_tuple: Any,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The library's record of row losses `[N]`, each times the miner's weight of its row."""
        common_functions.labels_required(labels)
        common_functions.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        if self.W.device != embeddings.device:  # the library's losses follow the embeddings, too
            self.W.data = self.W.data.to(embeddings.device)
        result = sface_loss(
            embeddings,
            self.W.t(),
            labels,
            s=self.s,
            k=self.k,
            a=self.a,
            b=self.b,
            k_inter=self.k_inter,
            reduction="none",
            filter_eps=self.filter_eps,
            backend=self.backend,
            return_stats=bool(self.collect_stats),
        )
        if isinstance(result, Tensor):
            row_loss = result  # [N]
        else:
            row_loss, stats = result
            self.intra, self.inter, self.cos_target = (
                float(value.mean()) for value in (stats.intra, stats.inter, stats.cos_target)
            )
        row_weight = loss_and_miner_utils.convert_to_weights(indices_tuple, labels, dtype=row_loss.dtype)  # [N]
        losses: dict[str, dict[str, Any]] = {
            "loss": {
                "losses": row_loss * row_weight,
                "indices": common_functions.torch_arange_from_size(embeddings),
                "reduction_type": "element",
            }
        }
        self.add_weight_regularization_to_loss_dict(losses, self.W.t())
        return losses

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """s·cos `[N, C]`, at least float32, differentiable: N·C elements are allocated here."""
        dtype = compute_dtype(embeddings, self.W)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.s * self.distance(embeddings.to(dtype), self.W.t().to(dtype))
