"""Cosines of embeddings to class centres, for evaluation and logging: exact, apart from the loss and its backends.

`topk` streams blocks of classes and never makes an N×C tensor; `logits` is that tensor. Products are full float32 (or
float64) whatever autocast and the process-wide switches say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import validation
from .ops import compute_dtype
from .precision import full_precision
from .tracing import traced

BLOCK_ELEMENTS = 1 << 20  # of N·block and D·block: 4 MiB each of fp32 cosines and of unit rows at a time

multiply, dot = full_precision(torch.mm), full_precision(torch.linalg.vecdot)


def block_cosines(embeddings: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of classes and their cosines `[N, block]` (1), not clamped, without a gradient."""
    dtype, (rows, features), classes = compute_dtype(embeddings, weight), embeddings.shape, weight.shape[0]
    size = max(256, BLOCK_ELEMENTS // max(rows, features))
    x_unit, weight = F.normalize(embeddings.detach().to(dtype)), weight.detach()  # [N, D]
    for start in range(0, classes, size):
        block = slice(start, min(start + size, classes))
        yield block, multiply(x_unit, F.normalize(weight[block].to(dtype)).t())


@torch.no_grad()
def topk(embeddings: Tensor, weight: Tensor, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) cosines of each row in order, not clamped, and their classes, both `[N, k]`."""
    dtype, rows = compute_dtype(embeddings, weight), embeddings.shape[0]
    values = torch.empty(rows, 0, dtype=dtype, device=embeddings.device)
    classes = torch.empty(rows, 0, dtype=torch.int64, device=embeddings.device)
    for block, cosines in block_cosines(embeddings, weight):
        found, place = cosines.topk(min(k, cosines.shape[1]), 1, largest)  # [N, ≤ k]
        values, classes = torch.cat([values, found], 1), torch.cat([classes, place + block.start], 1)
        values, order = values.topk(min(k, values.shape[1]), 1, largest)
        classes = classes.gather(1, order)
    return values, classes


def checked_topk(embeddings: Tensor, weight: Tensor, k: int) -> torch.return_types.topk:
    """`SFaceLoss.topk`."""
    validation.check_pair(embeddings, weight)
    k = check_k(k, weight.shape[0])
    values, classes = topk(embeddings, weight, k)
    return torch.return_types.topk((values.clamp_(-1, 1), classes))


def check_k(k: int, classes: int, name: str = "k") -> int:
    k = validation.integer(name, k, positive=True)
    if k > classes:
        raise ValueError(f"{name}: expected at most {classes} (the number of classes), got {k}")
    return k


def check_counts(topk: Sequence[int], classes: int) -> list[int]:
    if not isinstance(topk, Iterable):
        raise TypeError(f"topk: expected a sequence of ints, got {topk!r}")
    counts = [check_k(k, classes, "topk") for k in topk]
    if not counts:
        raise ValueError("topk: expected at least one number, got none")
    return counts


def count_hits(nearest: Tensor, target: Tensor, counts: Sequence[int]) -> Tensor:
    """For each k of `counts`, how many rows have their class `target` `[N]` among the first k of `nearest` `[N, K]`."""
    hits = (nearest == target.unsqueeze(1)).cumsum(1)  # [N, K], 0 or 1
    return torch.stack([hits[:, k - 1].sum() for k in counts])


def logits(embeddings: Tensor, weight: Tensor, scale: float) -> Tensor:
    """scale·cosine `[N, C]`, differentiable in both. Without a gradient nothing else of that size or of C×D is made."""
    validation.check_pair(embeddings, weight)
    dtype = compute_dtype(embeddings, weight)
    wanted = torch.is_grad_enabled() and (embeddings.requires_grad or weight.requires_grad)
    if wanted or traced():  # a graph of blocks would fix N
        return multiply(F.normalize(embeddings.to(dtype)), F.normalize(weight.to(dtype)).t()).clamp(-1, 1) * scale
    result = torch.empty(embeddings.shape[0], weight.shape[0], dtype=dtype, device=embeddings.device)
    for block, cosines in block_cosines(embeddings, weight):
        result[:, block] = cosines.clamp_(-1, 1).mul_(scale)
    return result


def cosine(embeddings: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """Cosines of each row to the centres of its own `classes` `[N]` or `[N, M]`, of that shape; differentiable in both.

    Holds N·M rows of the weight.
    """
    validation.check_pair(embeddings, weight)
    count, dtype = weight.shape[0], compute_dtype(embeddings, weight)
    validation.check_classes(classes, embeddings)
    classes = classes.long()  # a uint8 would be compared with `count` modulo 256
    valid = (classes >= 0) & (classes < count)
    if validation.checks_labels(embeddings.device) and not bool(valid.all()):
        wrong = int(classes[~valid][0])
        raise ValueError(f"classes: expected values in [0, {count}), got {wrong}")
    centres = weight[torch.where(valid, classes, 0)].to(dtype)  # [N, D] or [N, M, D]
    x_unit = F.normalize(embeddings.to(dtype))
    x_unit = x_unit if classes.dim() == 1 else x_unit.unsqueeze(1)
    return torch.where(valid, dot(x_unit, F.normalize(centres, dim=-1)).clamp(-1, 1), torch.nan)
