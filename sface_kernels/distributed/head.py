"""`SFaceLoss` with its class centres spread over the processes of a group."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardedBy

from .. import cosines, validation
from ..dispatch import check_name
from ..growing import replace_parameter
from ..loss import initial_std
from ..ops import prepare_labels
from ..pages import in_huge_pages
from ..pending import PendingGradient, pending_of
from ..types import DEFAULTS, SFaceRowStats, SFaceStats
from .collectives import check_agreement, current_gpu, uses_nccl
from .evaluation import class_parallel_topk
from .layout import class_range, fill_normal, move_rows, shared_seed
from .parallel import Options, Shard, class_parallel_loss
from .sampling import Sampling, check_sample_rate


class ClassParallelSFaceLoss(nn.Module):
    """The SFace head with `weight` `[num_classes, in_features]` spread over a group: each process holds its classes'
    rows, their gradients and their optimizer state, and compares everyone's embeddings with them.

    `loss = head(embeddings, labels)` takes this process's rows with labels in [0, num_classes), and returns on every
    process the loss of all rows against all classes, equal to that of `SFaceLoss` on the concatenated batch. Every
    process must call it equally often; the backward exchanges nothing.

    The only parameter, `weight`, is a `DTensor` sharded by rows (`Shard(0)`: `torch.chunk`'s parts, the last ones
    smaller or empty). Optimizers, `torch.distributed.checkpoint` and `clip_grad_norm_` treat it as any DTensor. Leave
    the head out of DistributedDataParallel and `fully_shard`; docs/distributed.md shows whole training loops.

    Gradients: `weight.grad` is that of the global loss. The gradient of the embeddings is multiplied by the number of
    processes, because a backbone in DistributedDataParallel or FSDP2 over the same group divides by it.

    Args:
        in_features: D, size of an embedding.
        num_classes: C, of all processes together; may be smaller than their number.
        mesh: one-dimensional device mesh whose processes share the weight.
        process_group: the same as a group; the default group if neither is given.
        s, k, a, b, k_inter, ignore_index, filter_eps, backend: as in `sface_loss`.
        reduction: "mean" or "sum" over the rows of all processes.
        uneven_batches: processes may bring different numbers of rows, 0 among them, and one that meets an error tells
            the others. Costs one exchange of a few numbers a step, which waits for the device. False spares that: then
            the number of rows must be that of the first step, on every process.
        sample_rate: below 1, a training step compares with the classes of the batch and a random share of the others,
            whose terms are divided by that share: the expected loss and gradient stay those of all classes. Rows that
            were not drawn get zeros as gradient. `eval()` compares with all.
        init_std: of a new weight, as in `SFaceLoss`; 2·√(2/C) with the C of all processes if None.
        sample_seed: of the draws, with `sample_step`, the number of sampled steps. It is in the state dict, and a
            resumed run goes on with the draws of the one that stopped, on the same number of processes.
        device: of the weight; by default that of `mesh`, or the current GPU for a group on NCCL.
        dtype: of the weight; torch's default one if None.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this process is not in the group.
        TypeError, ValueError: an argument is off, or differs between processes; raised on all of them.
    """

    weight: nn.Parameter
    sample_step: Tensor  # 0-d int64, with a sample_rate below 1 only

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        mesh: DeviceMesh | None = None,
        process_group: dist.ProcessGroup | None = None,
        s: float = DEFAULTS.s,
        k: float = DEFAULTS.k,
        a: float = DEFAULTS.a,
        b: float = DEFAULTS.b,
        k_inter: float | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        filter_eps: float | None = None,
        backend: str = "auto",
        uneven_batches: bool = True,
        sample_rate: float = 1.0,
        sample_seed: int = 0,
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features = validation.integer("in_features", in_features, positive=True)
        self.num_classes = num_classes = validation.integer("num_classes", num_classes, positive=True)
        self.s, self.k, self.a, self.b, self.k_inter = s, k, a, b, k_inter
        self.reduction, self.ignore_index = reduction, ignore_index
        self.filter_eps, self.backend = filter_eps, backend
        self.uneven_batches = validation.boolean("uneven_batches", uneven_batches)
        self.sample_rate = sample_rate = check_sample_rate(sample_rate)
        self.sample_seed = validation.integer("sample_seed", sample_seed)
        self._options().check(in_features)
        check_name(backend)
        validation.check_dtype("dtype", dtype)
        mesh, device = _mesh_and_device(mesh, process_group, device)
        first, count = class_range(num_classes, mesh.size(), mesh.get_local_rank())
        local = in_huge_pages(torch.empty(count, in_features, device=device, dtype=dtype))
        shard = Shard(local, first, num_classes, mesh.get_group())
        self.init_std = validation.check_init_std(init_std)
        alike = {"uneven_batches": uneven_batches, "sample_rate": sample_rate, "init_std": self.init_std}
        check_agreement({**shard.settings(self._options()), **alike}, shard.group)
        self.weight = nn.Parameter(_sharded(local, mesh, num_classes))
        self._rows: int | None = None  # of every batch, once known, without uneven_batches
        self.reset_parameters()

    def _options(self) -> Options:
        return Options(*(getattr(self, name) for name in Options._fields))

    @property
    def _mesh(self) -> DeviceMesh:
        assert isinstance(self.weight, DTensor)
        return self.weight.device_mesh

    @property
    def class_range(self) -> tuple[int, int]:
        """(first, count) of the classes that this process holds."""
        return class_range(self.num_classes, self._mesh.size(), self._mesh.get_local_rank())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, init_std), or N(0, 2·√(2/C)) with the C of all processes. Every process must call it.

        The seed comes from rank 0's default generator, and the rows of a class depend on the seed and its number alone:
        the whole weight is the same whatever the number of processes.
        """
        if self._ensure_step_count():
            self.sample_step.zero_()
        assert isinstance(self.weight, DTensor)
        local = self.weight.to_local()
        if local.is_meta:
            return
        seed = shared_seed(self._mesh.get_group(), local.device)
        fill_normal(local, self.class_range[0], initial_std(self.num_classes, self.init_std), seed)

    @torch.no_grad()
    def add_classes(self, count: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Append `count` classes, as `SFaceLoss.add_classes`; every process must call it.

        The parts are cut anew, so rows and their optimizer state move between processes.
        """
        count = validation.integer("count", count, positive=True)
        check_agreement({"count": count}, self._mesh.get_group())
        old, mesh, total = self.weight, self._mesh, self.num_classes + count

        def grow(value: Tensor) -> Tensor:
            local = value.to_local() if isinstance(value, DTensor) else value
            return _sharded(move_rows(local, self.num_classes, total, mesh.get_group()), mesh, total)

        moved = grow(old.detach())
        assert isinstance(moved, DTensor)
        local = moved.to_local()
        first, _ = class_range(total, mesh.size(), mesh.get_local_rank())
        added = max(self.num_classes - first, 0)  # where this process's new classes begin
        seed = shared_seed(mesh.get_group(), local.device)
        fill_normal(local[added:], first + added, initial_std(total, self.init_std), seed)
        new = nn.Parameter(moved, requires_grad=old.requires_grad)
        if optimizer is not None:
            replace_parameter(optimizer, old, new, grow)
        self.weight, self.num_classes = new, total

    @_disable_dynamo  # torch.compiler.disable would import the compiler here
    def forward(
        self, embeddings: Tensor, labels: Tensor, *, return_stats: bool | str = False
    ) -> Tensor | tuple[Tensor, SFaceStats | SFaceRowStats]:
        """The global loss, 0-d, of this process's `embeddings` `[n, D]` with `labels` `[n]` or `[n, 1]` and everyone's.

        With `return_stats=True` (on every process or on none), (loss, SFaceStats) with the statistics of all rows; with
        "rows", (loss, SFaceRowStats) of this process's rows beside all classes.
        """
        sampling = self._next_sample()
        # the gradient of copied rows goes through the copy, and does not wait
        pending = None if sampling is not None or not self.weight.requires_grad else pending_of(self.weight)
        weight, group = self._local_weight(pending), self._mesh.get_group()
        shard = Shard(weight, self.class_range[0], self.num_classes, group, pending)
        return class_parallel_loss(
            embeddings,
            labels,
            shard,
            self._options(),
            exchange_sizes=self.uneven_batches or self._first_batch(embeddings, shard),
            return_stats=return_stats,
            sampling=sampling,
        )

    def _local_weight(self, pending: PendingGradient | None) -> Tensor:
        """This process's rows. What waits for an optimizer is no gradient that could go through `to_local`."""
        assert isinstance(self.weight, DTensor)
        if pending is None:
            return self.weight.to_local(grad_placements=[ShardedBy(0)])
        with torch.no_grad():  # an alias, with the version counter of the rows: autograd sees a step in between
            local = self.weight.to_local()
        return local.detach().requires_grad_()

    def _next_sample(self) -> Sampling | None:
        if not self.training or self.sample_rate == 1:
            return None
        self._ensure_step_count()
        self.sample_step += 1
        return Sampling(self.sample_rate, self.sample_seed, int(self.sample_step))

    def _ensure_step_count(self) -> bool:
        """Make `sample_step` where the head samples, which it then keeps: `sample_rate` may change after the head was
        made. Whether there is one."""
        if self.sample_rate < 1 and "sample_step" not in self._buffers:
            self.register_buffer("sample_step", torch.zeros((), dtype=torch.int64, device=self.weight.device))
        return "sample_step" in self._buffers

    def _first_batch(self, embeddings: Tensor, shard: Shard) -> bool:
        """Without `uneven_batches`: compare the processes' first batches, and hold every later one to that."""
        if self._rows is None:
            rows = len(embeddings)
            check_agreement({"rows of embeddings with uneven_batches=False": rows}, shard.group)
            self._rows = rows  # once they agree: where one alone refuses the next batch, the others wait for it
            return True
        if len(embeddings) != self._rows:
            raise ValueError(
                f"embeddings: expected {self._rows} rows as in the first batch (uneven_batches=False), "
                f"got {len(embeddings)}"
            )
        return False

    def topk(self, embeddings: Tensor, k: int) -> torch.return_types.topk:
        """As `SFaceLoss.topk`, of this process's `embeddings` `[n, D]` to the classes of all; every process must call
        it, with the same k."""
        assert isinstance(self.weight, DTensor)
        weight, group = self.weight.to_local().detach(), self._mesh.get_group()
        found = class_parallel_topk(embeddings, weight, self.class_range[0], self.num_classes, k, group)
        return torch.return_types.topk(found)

    @torch.no_grad()
    def topk_correct(self, embeddings: Tensor, labels: Tensor, topk: Sequence[int] = (1, 5)) -> Tensor:
        """As `SFaceLoss.topk_correct`, of this process's rows; every process must call it, with the same `topk`."""
        try:
            counts = cosines.check_counts(topk, self.num_classes)
        except (TypeError, ValueError):
            with contextlib.suppress(TypeError, ValueError):
                self.topk(embeddings, 0)  # which no process takes: the others learn of it and do not wait
            raise
        nearest, check = self.topk(embeddings, max(counts)).indices, validation.checks_labels(embeddings.device)
        # after what all processes take part in: labels that are wrong here must not let the others wait
        validation.check_classes(labels, embeddings, "labels", one_a_row=True)
        target = prepare_labels(labels, self.num_classes, self.ignore_index, check)
        return cosines.count_hits(nearest, target, counts)

    def logits(self, embeddings: Tensor) -> NoReturn:
        raise NotImplementedError(
            "logits: no process holds all classes; give full_weight() to SFaceLoss, or take topk, which needs no N×C"
        )

    def cosine(self, embeddings: Tensor, classes: Tensor) -> NoReturn:
        raise NotImplementedError(
            "cosine: no process holds all classes; give full_weight() to SFaceLoss. The cosines to the own and to the "
            "hardest other class come with return_stats='rows'"
        )

    @torch.no_grad()
    def full_weight(self) -> Tensor:
        """All classes' rows as a plain tensor `[C, D]`, which `SFaceLoss` loads, on every process; all must call it."""
        weight = self.weight.detach()
        assert isinstance(weight, DTensor)
        whole = weight.full_tensor()
        return whole.clone() if self._mesh.size() == 1 else whole

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the rows of this process where a plain `weight` `[C, D]` comes, as `SFaceLoss` and others save it.

        The count of sampled steps may be missing, or be of no use here.
        """
        step = prefix + "sample_step"
        if self._ensure_step_count():
            state_dict.setdefault(step, self.sample_step)
        else:
            state_dict.pop(step, None)
        whole = state_dict.get(prefix + "weight")
        if isinstance(whole, Tensor) and not isinstance(whole, DTensor) and whole.shape == self.weight.shape:
            first, count = self.class_range
            rows = whole[first : first + count].to(self.weight.device)
            state_dict[prefix + "weight"] = _sharded(rows, self._mesh, self.num_classes)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, processes={self._mesh.size()}, "
            f"s={self.s}, k={self.k}, a={self.a}, b={self.b}, filter_eps={self.filter_eps}, backend={self.backend!r}"
        )


def _sharded(local: Tensor, mesh: DeviceMesh, num_classes: int) -> DTensor:
    shape = torch.Size([num_classes, local.shape[1]])
    return DTensor.from_local(local, mesh, [ShardedBy(0)], run_check=False, shape=shape, stride=(local.shape[1], 1))


def _mesh_and_device(
    mesh: DeviceMesh | None, group: dist.ProcessGroup | None, device: torch.device | str | None
) -> tuple[DeviceMesh, torch.device]:
    if mesh is not None and group is not None:
        raise ValueError("mesh, process_group: expected one of them, got both")
    if not dist.is_initialized():
        raise RuntimeError(
            "process_group: expected torch.distributed to be initialised (torch.distributed.init_process_group under "
            "torchrun); for a single process use SFaceLoss"
        )
    if mesh is not None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a DeviceMesh, got {mesh!r}")
        if mesh.ndim != 1:
            raise ValueError(f"mesh: expected one dimension (name one of a larger mesh: mesh['dp']), got {mesh.ndim}")
        if device is None:
            device = current_gpu() if mesh.device_type == "cuda" else mesh.device_type
        return mesh, torch.device(device)
    group = dist.group.WORLD if group is None else group
    assert group is not None
    if group == dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
        raise RuntimeError("process_group: this process is not in it")
    if device is None:
        device = current_gpu() if uses_nccl(group) else torch.empty(0).device
    device = torch.device(device)
    mesh_type = torch.empty(0).device.type if device.type == "meta" else device.type
    return DeviceMesh.from_group(group, mesh_type), device
