"""Outlier tokens of a block: a mean without them, their choice, their storing in the page (Triton).

`spectral_paged.pages.page_mean` and `spectral_paged.pages.codec` do the same for a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_paged.kernels.seal.triton.exact_tokens import tokens_of


@triton.jit
def ordinary_mean(
    mean,
    inverse,
    steps_ptr,
    pages_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    first,
    TURN: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean of the tokens that are not loud about `mean`, and 1 where some are, else 0.

    `steps_ptr` takes 512 floats. They are log2 of the tokens' squared distances; the threshold is
    `page_mean.LOUD_STEPS` above their mean.
    """
    place, dim = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
    total, most = 0.0, -1000.0
    centre = mean * inverse
    for start in range(0, 512, ROWS):
        token = start + place
        x = tokens_of(
            pages_ptr, values_ptr, cos_ptr, sin_ptr, first, token, dim, TURN, DIM, HALF, UNIT
        )
        off = x * inverse - centre[None, :]
        steps = tl.log2(tl.maximum(tl.sum(off * off, axis=1), 1e-30))
        tl.store(steps_ptr + token, steps)
        total += tl.sum(steps)
        most = tl.maximum(most, tl.max(steps))
    tl.debug_barrier()
    threshold = total / 512 + 6.0
    loud = tl.where(most >= threshold, 1, 0)
    if loud > 0:
        count = 0
        for start in range(0, 512, ROWS):
            count += tl.sum((tl.load(steps_ptr + start + place) < threshold).to(tl.int32))
        share = 1.0 / count
        mean = tl.zeros([DIM_PAD], tl.float32)
        for start in range(0, 512, ROWS):
            token = start + place
            x = tokens_of(
                pages_ptr, values_ptr, cos_ptr, sin_ptr, first, token, dim, TURN, DIM, HALF, UNIT
            )
            kept = tl.load(steps_ptr + token) < threshold
            mean += tl.sum(tl.where(kept[:, None], x * share, 0.0), axis=0)
        tl.debug_barrier()
    return mean, loud


@triton.jit
def worst(errors_ptr, item, SLOTS: tl.constexpr):
    """The tokens `[8]` with the largest quantization errors of K and V; unused places are -1."""
    token, slot = tl.arange(0, 512), tl.arange(0, 8)
    total = tl.zeros([512], tl.float32)
    for side in tl.static_range(2):
        error = tl.load(errors_ptr + (item * 2 + side).to(tl.int64) * 512 + token)
        total += error / tl.maximum(tl.sum(error) / 512, 1e-30)
    total = tl.where(total == total, total, 0.0)  # of NaN no token is the largest
    outliers = tl.zeros([8], tl.int32) - 1
    for j in tl.static_range(SLOTS):
        found = tl.argmax(total, axis=0).to(tl.int32)
        outliers = tl.where(slot == j, found, outliers)
        total = tl.where(token == found, -1.0, total)
    return outliers


@triton.jit
def write_slots(
    record,
    pages_ptr,
    values_ptr,
    cos_ptr,
    sin_ptr,
    first,
    outliers,
    SIDE: tl.constexpr,
    TURN: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    UNIT: tl.constexpr,
    SLOT_AT: tl.constexpr,
    INDEX_AT: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Store the outlier tokens of a side in ascending order, and with K also their indices."""
    dim = tl.arange(0, DIM_PAD)
    x = tokens_of(
        pages_ptr,
        values_ptr,
        cos_ptr,
        sin_ptr,
        first,
        tl.maximum(outliers, 0),
        dim,
        TURN,
        DIM,
        HALF,
        UNIT,
    )
    x = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    other = tl.reshape(outliers, (1, 8))
    before = (other < tl.reshape(outliers, (8, 1))) & (other >= 0)
    rank = tl.sum(before.to(tl.int32), axis=1)
    used = outliers >= 0
    to = (record + SLOT_AT).to(tl.pointer_type(tl.float16)) + rank[:, None] * DIM + dim[None, :]
    tl.store(to, x, mask=used[:, None] & (dim < DIM)[None, :])
    if SIDE == 0:
        index = (record + INDEX_AT).to(tl.pointer_type(tl.int16)) + rank
        tl.store(index, outliers.to(tl.int16), mask=used)
