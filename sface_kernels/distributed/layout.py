"""Which process holds which classes, and what the rows of a new weight are."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Group, group_rank, group_size

ROWS_PER_SEED = 4096  # rows of a new weight that one seeded generator draws


def class_range(num_classes: int, processes: int, rank: int) -> tuple[int, int]:
    """(first, count) of a rank's classes under DTensor's `Shard(0)`: `torch.chunk`'s, the last ones may be empty."""
    size = -(-num_classes // processes)
    first = min(rank * size, num_classes)
    return first, min(size, num_classes - first)


def partial_fc_range(num_classes: int, processes: int, rank: int) -> tuple[int, int]:
    """(first, count) of a rank's classes in Partial FC: C // W, and one more on the first C % W ranks."""
    size, rest = divmod(num_classes, processes)
    return rank * size + min(rank, rest), size + (rank < rest)


def derived_seed(*numbers: int) -> int:
    """A generator's seed that any other numbers change, in 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def shared_seed(group: Group, device: torch.device) -> int:
    """A number drawn from rank 0's default generator, the same on every process of the group."""
    seed = torch.randint(1 << 62, (1,), device="cpu").to(device)
    if group is not None:
        dist.broadcast(seed, group=group, group_src=0)
    return int(seed)


@torch.no_grad()
def fill_normal(rows: Tensor, first: int, std: float, seed: int) -> None:
    """Draw N(0, std) for the classes [first, first + len(rows)), each the same whichever process holds it.

    Every stretch of ROWS_PER_SEED classes has a generator of its own, so a process draws its own rows and at most the
    rest of two stretches.
    """
    if rows.is_meta or len(rows) == 0:
        return
    generator = torch.Generator(rows.device)
    last = first + len(rows)
    for stretch in range(first // ROWS_PER_SEED, -(-last // ROWS_PER_SEED)):
        start = stretch * ROWS_PER_SEED
        generator.manual_seed(derived_seed(seed, stretch))
        drawn = torch.empty(ROWS_PER_SEED, rows.shape[1], dtype=torch.float32, device=rows.device)
        drawn.normal_(std=std, generator=generator)
        low, high = max(first, start), min(last, start + ROWS_PER_SEED)
        rows[low - first : high - first] = drawn[low - start : high - start].to(rows.dtype)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> int:
    """How many classes two (first, count) share."""
    return max(0, min(a[0] + a[1], b[0] + b[1]) - max(a[0], b[0]))


@torch.no_grad()
def move_rows(rows: Tensor, num_classes: int, grown: int, group: Group) -> Tensor:
    """This process's rows of a weight, or of an optimizer's state for it, once it has `grown` classes.

    Rows go straight to the process that holds them then: nobody sees more than it held and will hold. New classes,
    which come last, get zeros.
    """
    processes, rank = group_size(group), group_rank(group)
    before = [class_range(num_classes, processes, other) for other in range(processes)]
    after = [class_range(grown, processes, other) for other in range(processes)]
    result = rows.new_zeros(after[rank][1], *rows.shape[1:])
    sent = [_overlap(before[rank], there) for there in after]
    received = [_overlap(there, after[rank]) for there in before]
    kept = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(kept, rows.contiguous(), received, sent, group=group)
    result[: len(kept)] = kept
    return result
