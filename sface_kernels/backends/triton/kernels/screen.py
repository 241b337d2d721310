"""The screened pass over a chunk of classes: the loss of every pair, and the list of those that may be active.

Per tile one fp16 tensor-core product of unit rows. Its epilogue sums, per row, the loss (5) and the dropped mass of
every pair below the threshold, and the cosines, keeps the nearest class, and lists the rest: the row's candidates. To
the sums each candidate adds what a pair at the threshold does, which `finish_samples` takes off again.
Reads the chunk's unit rows once per block of samples (from the L2 cache); cosines exist in registers only.

A program owns a block of samples and every `stripes`-th tile of classes, chunk after chunk: its sums and its part of
each list have one writer, so there are no atomics and the result does not depend on scheduling.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .math import IGNORED, NO_COSINE, inter_weight_below, sums_with_one_trip


@triton.jit
def count_bits(word):
    """Set bits of each uint32."""
    v = word - ((word >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    v += v >> 8
    return ((v + (v >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def append_candidates(found, list_ptr, count, first_class, capacity, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Appends the set columns of `found` `[BLOCK_N, BLOCK_C]` to each row's part of its list, in order of the class.

    `list_ptr` `[BLOCK_N]` points to each row's part, `count` is how many it has had. Returns the new counts, which go
    on past `capacity`. A column is a bit of a word of 32, and a pass takes one bit of every word.
    """
    bit = tl.arange(0, BLOCK_C) % 32
    WORDS: tl.constexpr = BLOCK_C // 32
    bits = tl.where(found, tl.full([1, BLOCK_C], 1, tl.uint32) << bit[None, :].to(tl.uint32), 0).to(tl.uint32)
    words = tl.sum(bits.reshape(BLOCK_N, WORDS, 32), 2).to(tl.uint32)  # [BLOCK_N, WORDS]
    in_word = count_bits(words)
    place = count[:, None] + tl.cumsum(in_word, 1) - in_word  # [BLOCK_N, WORDS] of the word's first
    word_class = (first_class + tl.arange(0, WORDS) * 32)[None, :]
    while tl.max(sums_with_one_trip(tl.max((words != 0).to(tl.int32), 1)), 0) > 0:
        lowest = words & (words ^ (words - 1))
        position = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(list_ptr[:, None] + place, word_class + position, mask=(words != 0) & (place < capacity))
        place += (words != 0).to(tl.int32)
        words = words & (words - 1)
    return count + tl.sum(in_word, 1)


@triton.jit
def tag_margin(BLOCK_C: tl.constexpr):
    """The most that a tag of a column takes from a cosine: its low bits are worth at most 2⁻²³ each."""
    return BLOCK_C * 1.1920928955078125e-07


@triton.jit
def nearest_column(cos, column, BLOCK_C: tl.constexpr):
    """The largest of each row of `cos` `[N, BLOCK_C]`, its column in place of its low bits."""
    tagged = (cos.to(tl.int32, bitcast=True) & ~(BLOCK_C - 1)) | column[None, :]
    return sums_with_one_trip(tl.max(tagged.to(tl.float32, bitcast=True), 1))


@triton.jit(do_not_specialize=["n", "row_blocks", "tiles", "stripes", "capacity", "slots", "begun"])
def screen(
    # pointers
    unit_x_ptr,  # [padded N, PADDED_D] fp16
    unit_w_ptr,  # [padded chunk, PADDED_D] fp16
    target_ptr,  # [N] int64
    sums_ptr,  # [4, stripes, padded N]: Σ weight·cosine, Σ weight, Σ cosine, the largest cosine with its column
    best_class_ptr,  # [stripes, padded N] int32
    count_ptr,  # [stripes, padded N] int32 candidates, also of those for which the list is too small
    list_ptr,  # [padded N, slots] int32 classes: a part of `capacity` for each stripe, and the own class's slot
    # sizes, floats
    n,
    c,
    padded_n,
    row_blocks,
    first_class,
    tiles,
    stripes,
    capacity,
    begun,  # samples whose sums an earlier chunk began: 0, or padded N
    slots,
    threshold,  # of the screened cosine, above 0
    k_inter,
    b,
    # compile time
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED_D: tl.constexpr,
    UPCAST: tl.constexpr,  # multiply in fp32 what is stored in fp16: the interpreter
):
    pid = tl.program_id(0)
    stripe = (pid // row_blocks).to(tl.int64)
    i = (pid % row_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, BLOCK_C)
    feature = tl.arange(0, BLOCK_K)
    target = tl.load(target_ptr + i, mask=i < n, other=IGNORED)

    at = stripe * padded_n + i  # [BLOCK_N], the program's slot in the sums
    plane = padded_n.to(tl.int64) * stripes
    later = i < begun
    inter = tl.load(sums_ptr + at, mask=later, other=0.0)
    dropped = tl.load(sums_ptr + plane + at, mask=later, other=0.0)
    cos_sum = tl.load(sums_ptr + 2 * plane + at, mask=later, other=0.0)
    best = tl.load(sums_ptr + 3 * plane + at, mask=later, other=NO_COSINE)
    best_class = tl.load(best_class_ptr + at, mask=later, other=-1)
    count = tl.load(count_ptr + at, mask=later, other=0)
    list_part = list_ptr + i * slots + stripe * capacity

    x_tile = unit_x_ptr + i[:, None] * PADDED_D + feature[None, :]
    for tile in range(stripe, tiles, stripes):
        first = tile * BLOCK_C  # of the chunk
        w_tile = unit_w_ptr + (first + column)[None, :] * PADDED_D + feature[:, None]
        cos = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for k in range(0, PADDED_D, BLOCK_K):
            x = tl.load(x_tile + k)
            w = tl.load(w_tile + k)
            if UPCAST:
                cos += tl.dot(x.to(tl.float32), w.to(tl.float32), input_precision="ieee")
            else:
                cos = tl.dot(x, w, cos)
        cos_sum += tl.sum(cos, 1)

        first += first_class
        own = target - first  # [BLOCK_N], the own class as a column
        owned = tl.max(((own >= 0) & (own < BLOCK_C)).to(tl.int32), 0)
        if (owned > 0) | (first + BLOCK_C > c):
            other = (column[None, :] != own[:, None]) & (first + column < c)[None, :]
            cos = tl.where(other, cos, NO_COSINE)

        nearest = nearest_column(cos, column, BLOCK_C)  # [BLOCK_N]
        tag = nearest.to(tl.int32, bitcast=True) & (BLOCK_C - 1)
        best_class = tl.where(nearest > best, first.to(tl.int32) + tag, best_class)
        best = tl.maximum(nearest, best)

        below = tl.minimum(cos, threshold)
        weight = inter_weight_below(below, k_inter, b)
        inter += tl.sum(weight * below, 1)
        dropped += tl.sum(weight, 1)

        if tl.max(nearest, 0) >= threshold - tag_margin(BLOCK_C):
            # neither NaN nor the zeros of ignored rows are candidates
            found = cos >= threshold
            count = append_candidates(found, list_part, count, first.to(tl.int32), capacity, BLOCK_N, BLOCK_C)

    tl.store(sums_ptr + at, inter)
    tl.store(sums_ptr + plane + at, dropped)
    tl.store(sums_ptr + 2 * plane + at, cos_sum)
    tl.store(sums_ptr + 3 * plane + at, best)
    tl.store(best_class_ptr + at, best_class)
    tl.store(count_ptr + at, count)
