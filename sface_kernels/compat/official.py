"""The interface of the reference project's PyTorch head, so that its training script changes one import.

    from sface_kernels.compat.official import SFaceLoss

Six values come back in its order. The first, s·cos `[N, C]`, is there to read the accuracy from: by default
it is a `LazyLogits`, which answers `topk`, `max` and `argmax` from blocks of classes and never holds N×C.
What differs:

- Gradients flow from the loss and from its two parts, in any combination. The mean cosines are statistics, as are the
  logits without `logits=True`.
- The defaults a = 0.80 and b = 1.23 are the published module's. Copies of it in other projects default to others
  (0.80 and 1.22, 0.90 and 1.2): give yours when you swap the import.
- A sample equal to a class centre costs a finite loss (the reference's arccos makes it NaN).
- The weight lives where the module is moved. The reference keeps it on the host whatever `device_id` says;
  left there with embeddings on a GPU it works here too, copied each step, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cosines
from .. import loss as _loss
from ..ops import compute_dtype
from ..types import DEFAULTS, SFaceStats

WATCHED_ROWS = 16  # of the weight, compared to find out that it changed
ADVICE = (
    "the logits are not in memory; shape, size(), dim(), dtype, device, data, detach(), topk, max and argmax "
    "over the classes, dense() and stats work. For the [N, C] tensor construct SFaceLoss(..., logits=True)"
)


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version  # inference tensors count no versions


class LazyLogits:
    """s·cos `[N, C]` of one forward, detached, computed in blocks of classes when it is asked for.

    Equivalent to `s * F.linear(F.normalize(input), F.normalize(weight))`, cosines not clamped. Each question
    costs one product `[N, D] × [D, C]` and about 8 MiB of scratch memory.

    The tensors of the forward are kept, not copied, so ask before the optimizer changes the weight. The
    widest `topk` is remembered: it, a smaller one, `max` and `argmax` can be asked again later; any other
    question then raises. A change shows in PyTorch's version counters or, as fused optimizers and writes
    through `.data` do not count, in a few rows of the weight, those of the batch's first classes.

    Attributes:
        shape: torch.Size([N, C]).
        dtype: what the cosines are computed in, at least float32.
        device: that of the input.
        stats: SFaceStats of the forward. `100 * stats.accuracy` is Prec@1 (but for ties) and costs nothing.
    """

    def __init__(self, embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float, stats: SFaceStats) -> None:
        self._embeddings, self._weight, self._scale = embeddings.detach(), weight.detach(), scale
        self._versions = _version(embeddings), _version(weight)
        self._watched = labels.reshape(-1)[:WATCHED_ROWS].long().clamp(0, weight.shape[0] - 1)
        self._watched_rows = self._weight[self._watched]  # [≤ WATCHED_ROWS, D], a copy
        self._widest: tuple[Tensor, Tensor] | None = None  # values and classes [N, k] of a topk, the widest
        self.stats = stats
        self.shape = torch.Size((embeddings.shape[0], weight.shape[0]))
        self.dtype = compute_dtype(embeddings, weight)
        self.device = embeddings.device

    @property
    def data(self) -> LazyLogits:
        return self

    def detach(self) -> LazyLogits:
        return self

    @property
    def ndim(self) -> int:
        return 2

    def dim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def topk(self, k: int, dim: int | None = -1, largest: bool = True, sorted: bool = True) -> torch.return_types.topk:
        """The k largest (or smallest) logits of each row, as `torch.topk`; in order whatever `sorted` says.

        Returns:
            values: `[N, k]`, in the dtype of the logits.
            indices: `[N, k]`, int64 classes.

        Raises:
            ValueError: `dim` is not that of the classes, or there are fewer than k of them.
            RuntimeError: the weight or the input was modified since the forward.
        """
        self._check_dim(dim)
        if not 0 <= k <= self.shape[1]:
            raise ValueError(f"k: expected 0 to {self.shape[1]} (the number of classes), got {k}")
        if not largest:
            return torch.return_types.topk(self._stream_topk(k, largest=False))
        if self._widest is None or self._widest[0].shape[1] < k:
            self._widest = self._stream_topk(k, largest=True)
        # copies, so that the caller may write to them
        values, classes = (t[:, :k].clone() for t in self._widest)
        return torch.return_types.topk((values, classes))

    def max(self, dim: int | None = None, keepdim: bool = False) -> torch.return_types.max:
        """The largest logit of each row and its class, `[N]` (`[N, 1]` with `keepdim`), as `torch.max`.

        Raises:
            ValueError: `dim` is not that of the classes; without one `torch.max` is over all rows.
        """
        values, classes = self.topk(1, dim)
        if not keepdim:
            values, classes = values.squeeze(1), classes.squeeze(1)
        return torch.return_types.max((values, classes))

    def argmax(self, dim: int | None = None, keepdim: bool = False) -> Tensor:
        """The nearest class of each row, int64 `[N]` (`[N, 1]` with `keepdim`), as `torch.argmax`; `dim` as in max."""
        return self.max(dim, keepdim)[1]

    def dense(self) -> Tensor:
        """The tensor itself, `[N, C]`, detached: here N·C elements are allocated."""
        self._check_unmodified()
        logits = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for classes, block in cosines.block_cosines(self._embeddings, self._weight):
            logits[:, classes] = block.mul_(self._scale)
        return logits

    def _check_dim(self, dim: int | None) -> None:
        if dim not in (1, -1):
            raise ValueError(f"dim: expected 1 or -1 (the classes), got {dim!r}: {ADVICE}")

    def _modified(self) -> bool:
        if self._versions != (_version(self._embeddings), _version(self._weight)):
            return True
        now, then = self._weight[self._watched], self._watched_rows
        return not torch.equal(now.view(torch.uint8), then.view(torch.uint8))  # as bytes, NaN equals itself

    def _check_unmodified(self) -> None:
        if self._modified():
            raise RuntimeError(
                "outputs: the weight or the input was modified since the forward (by optimizer.step()?), so "
                "its logits are lost. Ask before that: a topk asked once can be repeated. Or construct "
                "SFaceLoss(..., logits=True)"
            )

    def _stream_topk(self, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        self._check_unmodified()
        values, classes = cosines.topk(self._embeddings, self._weight, k, largest)
        return values.mul_(self._scale), classes

    def __repr__(self) -> str:
        return f"LazyLogits(shape={list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"outputs.{name}: {ADVICE}")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = dict(kwargs or {})
        outputs, *others = args or (options.pop("input", None),)
        if func in (torch.topk, torch.max, torch.argmax) and isinstance(outputs, cls):
            return getattr(outputs, func.__name__)(*others, **options)
        raise TypeError(f"torch.{getattr(func, '__name__', func)} of outputs: {ADVICE}")


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"outputs.{name}: {ADVICE}")

    return refuse


# Python looks these up on the class, past __getattr__. Without them some would quietly answer something wrong
# (==, bool) and the others raise an error that does not help.
for _name in (
    *("getitem", "setitem", "iter", "contains", "array", "bool", "int", "float"),
    *("abs", "neg", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "rpow"),
    *("matmul", "rmatmul", "eq", "ne", "lt", "le", "gt", "ge"),
):
    setattr(LazyLogits, f"__{_name}__", _refuse(f"__{_name}__"))


class SFaceLoss(_loss.SFaceLoss):
    """The reference project's `SFaceLoss` on the fused kernels: same arguments, results and checkpoints.

    The state dict has one key, `weight` `[out_features, in_features]` float32, initialised N(0, 2·√(2/C))
    with the random numbers that the reference draws from the same seed.

    Args:
        in_features: D, size of an embedding.
        out_features: C, number of classes.
        device_id: the GPUs of the reference's model parallelism: None, or a list of ids, empty or not. An
            attribute and nothing else here: one device computes the loss, the one that holds the input. Move
            the module there (`head.to(device)`) before building the optimizer.
        s, k, a, b, filter_eps, backend: as in `sface_kernels.sface_loss`.
        logits: return s·cos as a differentiable tensor `[N, C]`, at its cost in memory and time.

    Example, in the reference's own order of calls::

        outputs, loss, intra_loss, inter_loss, WyiX, WjX = HEAD(features, labels)
        prec1 = train_accuracy(outputs.data, labels, topk=(1,))
        OPTIMIZER.zero_grad()
        loss.backward()
        OPTIMIZER.step()

    `100 * outputs.stats.accuracy` is the same Prec@1, but for ties, without a second pass over the weight.

    Source: the interface of zhongyy/SFace, `SFace_torch/head/metrics.py`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device_id: Sequence[int] | None,
        s: float = DEFAULTS.s,
        k: float = DEFAULTS.k,
        a: float = DEFAULTS.a,
        b: float = DEFAULTS.b,
        *,
        filter_eps: float | None = None,
        backend: str = "auto",
        logits: bool = False,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            s=s,
            k=k,
            a=a,
            b=b,
            filter_eps=filter_eps,
            backend=backend,
            dtype=torch.float32,
        )
        self.device_id, self.with_logits = device_id, logits

    def forward(  # type: ignore[override]
        self, input: Tensor, label: Tensor
    ) -> tuple[LazyLogits | Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The results of a step, in the reference's order.

        Args:
            input: embeddings `[N, D]`, any float dtype. Need not be normalised.
            label: classes `[N]` or `[N, 1]`, any integer dtype.

        Returns:
            Six values, all but the first 0-d:
            s·cos `[N, C]`, a `LazyLogits`, or a differentiable tensor with `logits=True`;
            the loss, the sum of the next two, differentiable;
            the mean over rows of −p_i cos θ_iy, differentiable;
            the mean over rows of Σ q_ij cos θ_ij over the other classes, differentiable;
            the mean cosine to the own class centre, detached;
            the mean cosine to the others, divided by N·C with the own class counted as 0, detached.

        Raises:
            TypeError, ValueError: as `sface_kernels.sface_loss`.
        """
        weight = self._weight_beside(input)
        loss, stats = _loss.sface_loss(
            input,
            weight,
            label,
            s=self.s,
            k=self.k,
            a=self.a,
            b=self.b,
            filter_eps=self.filter_eps,
            backend=self.backend,
            return_stats=True,
        )
        outputs: LazyLogits | Tensor
        if self.with_logits:
            outputs = self._dense_logits(input, weight)
        else:
            outputs = LazyLogits(input, weight, label, self.s, stats)
        intra = self._own_class_part(input, weight, label)
        inter = loss - intra
        # the statistics' values with the gradients of these
        intra, inter = stats.intra + (intra - intra.detach()), stats.inter + (inter - inter.detach())
        return outputs, loss, intra, inter, stats.cos_target, stats.cos_other

    def _own_class_part(self, input: Tensor, weight: Tensor, label: Tensor) -> Tensor:
        """The mean of −p_i cos θ_iy by N rows of the weight, p_i a constant. Costs a C×D gradient where it is used."""
        dtype, label = compute_dtype(input, weight), label.reshape(-1).long()
        counted = label != self.ignore_index  # [N]; to index by it would wait for a GPU
        # others have raised on a CPU, and have a loss of NaN on a GPU
        known = counted & (label >= 0) & (label < len(weight))
        rows = (input, weight[label.where(known, 0)])  # [N, D] each
        with torch.autocast(input.device.type, enabled=False):
            # what is left out is 1 from here on: 0 · NaN would be NaN
            x_unit, w_unit = (F.normalize(t.to(dtype).masked_fill(~known.unsqueeze(1), 1)) for t in rows)
            cos = torch.linalg.vecdot(x_unit, w_unit).clamp(-1, 1)  # [N]
            p = self.s * torch.sigmoid(self.k * (cos.detach().acos() - self.a))  # (3)
            return -(p * cos).where(known, 0).sum() / counted.sum().clamp_min(1)

    def _dense_logits(self, input: Tensor, weight: Tensor) -> Tensor:
        dtype = compute_dtype(input, weight)
        with torch.autocast(input.device.type, enabled=False):
            cos = F.linear(F.normalize(input.to(dtype)), F.normalize(weight.to(dtype)))  # [N, C]
            return self.s * cos

    def _weight_beside(self, input: Tensor) -> Tensor:
        if self.weight.device.type != "cpu" or input.device.type == "cpu":
            return self.weight
        warnings.warn(
            f"SFaceLoss: the weight is on the CPU and the input on {input.device}: every step copies the "
            "weight there and its gradient back, as the reference project does. To avoid it, call "
            "head.to(device) before building the optimizer.",
            stacklevel=5,  # the line that called the module
        )
        return self.weight.to(input.device)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, device_id={self.device_id}, logits={self.with_logits}"
