"""The Triton backend's operators, and every buffer that they return: schemas, fakes, sizes, one `allocate`.

Torch only: the operators can be traced where there is no Triton and no GPU. What implements them is registered by the
package itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...types import Forward
from .device import empty
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
    granted = LIST_BYTES + 8 * classes + 4 * rows * features - padded(rows) * (SLOT_BYTES + 4 * stripes)
    capacity = granted // SLOT_BYTES // (max(GRANULE, padded(rows)) * stripes)
    return stripes, max(1, min(capacity, cdiv(tiles, stripes) * GRANULE, MOST_CAPACITY))


def allocate(
    x: Tensor,
    w: Tensor,
    need_grad_x: bool,
    need_grad_w: bool,
    dense: bool,
    stripes: int,
    capacity: int,
    reduction: str,
) -> tuple[Tensor, ...]:
    """Everything that the forward returns, without contents, in the operator's order."""
    (n, d), c, device = x.shape, w.shape[0], x.device
    rows = padded(n)
    slots = rows * stripes * capacity + n
    f32, i32, i64 = torch.float32, torch.int32, torch.int64

    def listed(size: int, dtype: torch.dtype, unused: bool = dense) -> Tensor:
        if unused and n > 0:
            return torch.empty_strided((size,), (0,), dtype=dtype, device=device)
        return empty((size,), dtype, device)

    saved = Saved(
        norm=empty((rows,), f32, device),
        inv_norm=empty((c,), f32, device),
        flags=empty((2,), i32, device),
        overflowed=empty((n,), i32, device),
        head=listed(c, i32, unused=dense or not need_grad_w),
        links=listed(slots, i32),
        list_sample=listed(slots, i32),
        list_cos=listed(slots, f32),
    )
    return (
        empty((n,), f32, device),
        empty((6, n), f32, device),
        empty((n,), i64, device),
        empty((2,), i64, device),
        empty((n if need_grad_x else 0, d), f32, device),
        *saved,
        empty((), i64, device),
        empty((n,), i64, device),
        empty((c if reduction else 0, d), f32, device),
    )


def went_dense(saved: tuple[Tensor, ...]) -> bool:
    """Whether a forward went by dense products. False where its lists have been copied, which is right too but slow."""
    return Saved(*saved).links.stride() == (0,)


@ops.fake("triton_forward")
def _(x, w, labels, ignore_index, no_target, hyper, need_x, need_w, dense, multiprocessors, int8=False, reduction=""):  # type: ignore[no-untyped-def]
    (n, d), c = x.shape, w.shape[0]
    return allocate(x, w, need_x, need_w, dense, *lists(n, c, d, multiprocessors), reduction)


@ops.fake("triton_grad_weight")
def _(x, w, target, grad_row, hyper, dense, saved):  # type: ignore[no-untyped-def]
    return torch.empty(w.shape, dtype=w.dtype, device=w.device)


@ops.fake("triton_scale")
def _(grad_w, factor):  # type: ignore[no-untyped-def]
    pass
