"""SFace in the place of insightface's Partial FC: the same call, the same per-rank checkpoint, without its limits.

In arcface_torch's `train_v2.py`, `PartialFC_V2(margin_loss, embedding_size, num_classes, sample_rate, fp16)` becomes
`PartialFCSFace(embedding_size, num_classes, sample_rate, fp16)`; nothing else changes. A batch may differ in size from
rank to rank and from step to step, and a single process needs no process group. Files of another number of ranks are
converted by `python -m sface_kernels.distributed.convert`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import validation
from ..dispatch import check_name
from ..distributed.collectives import check_agreement, current_gpu, group_rank, group_size, uses_nccl
from ..distributed.layout import fill_normal, partial_fc_range, shared_seed
from ..distributed.parallel import Options, Shard, class_parallel_loss
from ..distributed.sampling import Sampling, check_sample_rate
from ..loss import initial_std
from ..pages import in_huge_pages
from ..types import DEFAULTS


class PartialFCSFace(nn.Module):
    """The SFace head with insightface's interface: `loss = head(local_embeddings, local_labels)`.

    Holds C // W rows of the weight, and one more on the first C % W of W ranks, as a plain parameter. The loss is the
    mean over all ranks' rows, the same on every rank; the gradient of the embeddings is that mean's times W, as
    DistributedDataParallel divides by W.

    Args:
        embedding_size: D.
        num_classes: C, of all ranks together.
        sample_rate: below 1, training steps compare with the classes of the batch and this share of the others, whose
            terms are divided by it. The draws follow from the attribute `sample_step`, the number of steps so far. The
            state dict has `weight` alone, as insightface's does: set the attribute to `global_step` when resuming.
        fp16: gather and multiply float32 embeddings as float16; sums, loss and gradients of the weight stay float32.
        s, k, a, b, k_inter, filter_eps, backend: as in `sface_loss`.
        init_std: as in `SFaceLoss`.
        process_group: the default group if None, and this process alone if there is none.

    Raises:
        TypeError, ValueError, RuntimeError: as `ClassParallelSFaceLoss`.

    Source: the interface of deepinsight/insightface, recognition/arcface_torch, partial_fc_v2.py.
    """

    weight: nn.Parameter  # [num_local, D]

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        s: float = DEFAULTS.s,
        k: float = DEFAULTS.k,
        a: float = DEFAULTS.a,
        b: float = DEFAULTS.b,
        k_inter: float | None = None,
        filter_eps: float | None = None,
        backend: str = "auto",
        init_std: float | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        sample_rate = check_sample_rate(sample_rate)
        if process_group is None and dist.is_initialized():
            process_group = dist.group.WORLD
        if process_group is not None and group_rank(process_group) < 0:
            raise RuntimeError("process_group: this process is not in it")
        self.embedding_size = embedding_size = validation.integer("embedding_size", embedding_size, positive=True)
        self.num_classes = num_classes = validation.integer("num_classes", num_classes, positive=True)
        self.sample_rate, self.fp16 = sample_rate, validation.boolean("fp16", fp16)
        self.sample_seed, self.sample_step = 0, 0
        self.process_group = process_group
        self.init_std = validation.check_init_std(init_std)
        self.options = Options(s, k, a, b, k_inter, "mean", -100, filter_eps, backend)
        self.options.check(embedding_size)
        check_name(backend)
        self.class_start, self.num_local = partial_fc_range(
            num_classes, group_size(process_group), group_rank(process_group)
        )
        self.weight = nn.Parameter(in_huge_pages(torch.empty(self.num_local, embedding_size)))
        alike = {
            **self._shard().settings(self.options),
            "sample_rate": sample_rate,
            "fp16": fp16,
            "init_std": self.init_std,
        }
        check_agreement(alike, process_group)
        self.reset_parameters()

    def _shard(self) -> Shard:
        return Shard(self.weight, self.class_start, self.num_classes, self.process_group)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, init_std), or N(0, 2·√(2/C)) with the C of all ranks, from a seed of rank 0. Every rank must call it."""
        device = current_gpu() if uses_nccl(self.process_group) else self.weight.device
        std = initial_std(self.num_classes, self.init_std)
        fill_normal(self.weight, self.class_start, std, shared_seed(self.process_group, device))

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """The global mean loss, 0-d, of this rank's `[n, D]` with class numbers `[n]` or `[n, 1]`, and the others'."""
        if self.fp16 and isinstance(local_embeddings, Tensor) and local_embeddings.dtype == torch.float32:
            local_embeddings = local_embeddings.half()
        sampling = None
        if self.training and self.sample_rate < 1:
            self.sample_step += 1
            sampling = Sampling(self.sample_rate, self.sample_seed, self.sample_step)
        loss = class_parallel_loss(
            local_embeddings,
            local_labels,
            self._shard(),
            self.options,
            exchange_sizes=True,
            return_stats=False,
            sampling=sampling,
        )
        assert isinstance(loss, Tensor)
        return loss

    def extra_repr(self) -> str:
        o = self.options
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}, num_local={self.num_local}, "
            f"sample_rate={self.sample_rate}, fp16={self.fp16}, s={o.s}, k={o.k}, a={o.a}, b={o.b}"
        )
