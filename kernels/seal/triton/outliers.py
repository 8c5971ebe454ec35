"""Outlier tokens of a block: their choice, and their storing in the page (Triton)."""

from __future__ import annotations

import triton
import triton.language as tl

from spectral_paged.kernels.seal.triton.exact_tokens import tokens_of


@triton.jit
def worst(errors_ptr, item, SLOTS: tl.constexpr):
    """The tokens `[8]` with the largest quantization errors of K and V; unused places are -1."""
    token, slot = tl.arange(0, 512), tl.arange(0, 8)
    total = tl.zeros([512], tl.float32)
    for side in tl.static_range(2):
        error = tl.load(errors_ptr + (item * 2 + side).to(tl.int64) * 512 + token)
        total += error / tl.maximum(tl.sum(error) / 512, 1e-30)
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
