"""The Triton backend's operators, and every buffer that they return: schemas, fakes, sizes.

Torch only: the operators can be traced where there is no Triton and no GPU. What implements them is registered by the
package itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...types import Forward
from .device import Buffer, empty
from .tiles import GRANULE

# Sizes follow from the shapes and the GPU's number of multiprocessors, an argument, so that fakes know them.
LIST_BYTES = 26 << 20  # of lists and where they begin, plus what the memory bound grants for C and N·D
SLOT_BYTES = 12  # link, sample and cosine
MOST_CAPACITY = 1 << 17  # a tag has room for the rank in a list of GRANULE times as many (`kernels.regroup`)
MOST_PARTS = 256  # that finish_samples looks through at once without more registers
PARTIAL_BYTES = 8 << 20  # of partial sums of ∂x
CHUNK_BYTES = 32 << 20  # of unit rows of a chunk of classes: it stays in the L2 cache
# Of unit rows and coefficients in a dense call, which has no lists, at most: on an H200 fewer launches gain more than
# what leaves the L2 cache costs.
DENSE_CHUNK_BYTES = 96 << 20
BOUND_BYTES = 63 << 20  # of the 64 MiB + 16·C + 16·N·D that a call may take, less what is small


class Saved(NamedTuple):
    """What the forward leaves for the backward.

    In a call by dense products the lists are empty, but of the same shapes, in one element of memory (stride 0):
    activation checkpointing compares shapes, and its recomputation may go the other way than the first forward.
    """

    norm: Tensor  # [padded N]
    inv_norm: Tensor  # [C]
    flags: Tensor  # [2] int32, 1 where [0] a sample has no list, in a dense call too; [1] a sample is not finite
    overflowed: Tensor  # [N] int32, 1 where the sample has no list; in a dense call for all that count
    head: Tensor  # [C] int32: each class's first link, −1 without one
    links: Tensor  # [slots + N] int32: the link that follows, −1 at the end; the last N are own classes'
    list_sample: Tensor  # [slots + N] int32
    list_cos: Tensor  # [slots + N]


_LINKS = Saved._fields.index("links")
_OUTPUTS = (*Forward._fields[:5], *Saved._fields, "counted", "target", "grad_w")  # of the forward, in order
OUTPUTS, SAVED = (tuple(f"{name}_ptr" for name in names) for names in (_OUTPUTS, Saved._fields))  # to kernels

ops.define(
    "triton_forward(Tensor x, Tensor w, Tensor labels, int ignore_index, int no_target, float[] hyper,"
    " bool need_grad_x, bool need_grad_w, bool dense, int multiprocessors, bool int8=False, str reduction='')"
    f" -> ({', '.join(f'Tensor {name}' for name in _OUTPUTS)})"
)
ops.define(
    "triton_grad_weight(Tensor x, Tensor w, Tensor target, Tensor grad_row, float[] hyper, bool dense, Tensor[] saved)"
    " -> Tensor"
)
ops.define("triton_scale(Tensor(a!) grad_w, Tensor factor) -> ()")


def cdiv(a: int, b: int) -> int:
    """Triton's takes microseconds."""
    return -(-a // b)


def padded(rows: int) -> int:
    return cdiv(rows, GRANULE) * GRANULE


def shares(blocks: int, most: int, multiprocessors: int) -> int:
    """Into how many shares, at most `most`, to cut the work of each of `blocks` so that a GPU is busy to the end.

    `multiprocessors` is how many programs run at once, one each unless the caller says otherwise: so many programs, or,
    where that could leave more than a tenth of a GPU idle, four times as many.
    """
    waves = 1 if 10 * blocks <= multiprocessors else 4
    return max(1, min(waves * multiprocessors // max(1, blocks), most))


def lists(rows: int, classes: int, features: int, multiprocessors: int) -> tuple[int, int]:
    """(stripes, capacity): a block of samples has that many lists, with room for so many candidates of each sample."""
    tiles = cdiv(classes, GRANULE)
    # a chunk holds a tile of every stripe
    in_chunk = max(1, CHUNK_BYTES // (2 * GRANULE * (features + GRANULE - 1)))
    blocks, most = padded(rows) // GRANULE, min(tiles, in_chunk)
    # a multiprocessor runs two programs of the screen at the same time (`tiles.PROGRAMS`) or one after the other
    enough = 2 * multiprocessors <= blocks * min(most, MOST_PARTS)
    programs = 2 * multiprocessors if enough else multiprocessors
    stripes = shares(blocks, most, programs)
    if tiles >= 2 * stripes > 2:
        stripes -= stripes % 2  # a screen with specialised warps takes two at a time
    granted = LIST_BYTES + 8 * classes + 4 * rows * features - padded(rows) * (SLOT_BYTES + 4 * stripes)
    capacity = granted // SLOT_BYTES // (max(GRANULE, padded(rows)) * stripes)
    return stripes, max(1, min(capacity, cdiv(tiles, stripes) * GRANULE, MOST_CAPACITY))


def whole(*shape: int, dtype: torch.dtype = torch.float32) -> Buffer:
    """A contiguous one."""
    return shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype


def outputs(
    n: int, c: int, d: int, need_x: bool, need_w: bool, dense: bool, stripes: int, capacity: int, makes_grad_w: bool
) -> tuple[Buffer, ...]:
    """What the forward returns, in the operator's order."""
    rows, i32, i64 = padded(n), torch.int32, torch.int64
    slots = rows * stripes * capacity + n
    dense = dense and n > 0

    def listed(size: int, dtype: torch.dtype, unused: bool = dense) -> Buffer:
        return ((size,), (0,), dtype) if unused else whole(size, dtype=dtype)

    return (
        whole(n),  # row_loss
        whole(6, n),  # row_stats
        whole(n, dtype=i64),  # hardest_class
        whole(2, dtype=i64),  # counts
        whole(n if need_x else 0, d),  # row_grad_x
        whole(rows),  # what is Saved: norm
        whole(c),  # inv_norm
        whole(2, dtype=i32),  # flags
        whole(n, dtype=i32),  # overflowed
        listed(c, i32, unused=dense or (n > 0 and not need_w)),  # head
        listed(slots, i32),  # links
        listed(slots, i32),  # list_sample
        listed(slots, torch.float32),  # list_cos
        whole(dtype=i64),  # counted
        whole(n, dtype=i64),  # target
        whole(c if makes_grad_w else 0, d),  # grad_w
    )


def went_dense(saved: tuple[Tensor, ...]) -> bool:
    """Whether a forward went by dense products. False where its lists have been copied, which is right too but slow."""
    return saved[_LINKS].stride() == (0,)


@ops.fake("triton_forward")
def _(x, w, labels, ignore_index, no_target, hyper, need_x, need_w, dense, multiprocessors, int8=False, reduction=""):  # type: ignore[no-untyped-def]
    (n, d), c = x.shape, w.shape[0]
    of_lists = lists(n, c, d, multiprocessors)
    return tuple(empty(outputs(n, c, d, need_x, need_w, dense, *of_lists, reduction != ""), x.device))


@ops.fake("triton_grad_weight")
def _(x, w, target, grad_row, hyper, dense, saved):  # type: ignore[no-untyped-def]
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


@ops.fake("triton_scale")
def _(grad_w, factor):  # type: ignore[no-untyped-def]
    pass
