"""Decode attention to exact pages in Triton, for format `exact`, and for landmarks and tails."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.decode.parts import LOG2_E, Partials, ScoreOptions
from spectral_paged.kernels.decode.plan import DecodePlan
from spectral_paged.kernels.decode.triton.finish import merge_items
from spectral_paged.kernels.launch.card import Card, halved, limits_of
from spectral_paged.kernels.launch.configs import dependent_launch
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from spectral_paged.kernels.page.triton import after_previous, capped, padded

PROGRAMS = 2112  # about what keeps a GPU of 132 multiprocessors busy: 16 programs each
GRAIN = 4  # pages that a program should have, so that it loads one while it computes another
WARPS, STAGES = 4, 3


@cache
def _tile(dim: int, itemsize: int, card: Card) -> tuple[int, int]:
    """Tokens of a page that are taken at once, and stages in which they are loaded and computed.

    K and V of the tokens lie in shared memory, and those of every further stage but one; a quarter
    of it is for the queries and the weights.
    """
    room, token = card.shared_bytes * 3 // 4, 2 * dim * max(itemsize, card.operand_bytes)
    [tokens] = halved(EXACT_PAGE_TOKENS, fits=lambda tokens: tokens * token <= room)
    return tokens, max(1, min(STAGES, 1 + room // (tokens * token)))


@triton.jit(do_not_specialize=["num_seqs"])
def _exact_kernel(
    q_ptr,
    plane_ptr,
    table_ptr,
    num_tokens_ptr,
    item_seq_ptr,
    item_start_ptr,
    item_end_ptr,
    visible_ptr,
    out_ptr,
    sums_ptr,
    num_seqs,
    table_width,
    scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
):
    after_previous(PDL)
    item, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(item_seq_ptr + item)
    if seq < num_seqs:
        tokens = tl.load(num_tokens_ptr + seq)
        start = tl.load(item_start_ptr + item)
        end = tl.load(item_end_ptr + item)
        group, dim = tl.arange(0, ROWS), tl.arange(0, DIM_PAD)
        dim_ok = dim < DIM
        q_at = ((seq * HEADS + head) * GROUP + group)[:, None] * DIM + dim[None, :]
        q = tl.load(q_ptr + q_at, mask=(group < GROUP)[:, None] & dim_ok[None, :], other=0.0)
        q = q.to(plane_ptr.dtype.element_ty)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, DIM_PAD], tl.float32)
        row = table_ptr + seq * table_width
        PARTS: tl.constexpr = 64 // TOKENS
        for step in range(start * PARTS, end * PARTS):
            entry = step // PARTS
            token = step % PARTS * TOKENS + tl.arange(0, TOKENS)
            position = tl.load(row + entry).to(tl.int64)
            k_at = plane_ptr + position * UNIT + head * (128 * DIM)
            seen = entry * 64 + token < tokens
            k_mask = seen[None, :] & dim_ok[:, None]
            k = tl.load(k_at + token[None, :] * DIM + dim[:, None], mask=k_mask, other=0.0)
            v_mask = seen[:, None] & dim_ok[None, :]
            v = tl.load(
                k_at + 64 * DIM + token[:, None] * DIM + dim[None, :], mask=v_mask, other=0.0
            )
            scores = tl.dot(q, k, input_precision="ieee") * scale
            if CAPPED:
                scores = capped(scores, cap)
            if WINDOW:
                seen = seen & (entry * 64 + token >= tl.load(visible_ptr + seq))
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top) if WINDOW else new_top
            shrink = tl.exp2(top - safe)
            weights = tl.exp2(scores - safe[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            acc = acc * shrink[:, None]
            acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top
        at = (item.to(tl.int64) * HEADS + head) * P
        ok = (group < P)[:, None] & dim_ok[None, :]
        tl.store(out_ptr + (at + group)[:, None] * DIM + dim[None, :], acc, mask=ok)
        tl.store(sums_ptr + at * 2 + group, top, mask=group < P)
        tl.store(sums_ptr + at * 2 + P + group, total, mask=group < P)


def plan_exact(num_tokens: Tensor, max_entries: int, num_kv_heads: int) -> DecodePlan:
    """The DecodePlan of a step over exact pages of 64 tokens."""
    counts = (num_tokens.to(torch.int32) + EXACT_PAGE_TOKENS - 1) // EXACT_PAGE_TOKENS
    target = max(1, PROGRAMS // num_kv_heads)
    return DecodePlan.of(counts, max_entries=max_entries, target_items=target, grain=GRAIN)


def attend_exact(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    num_tokens: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    dtype: torch.dtype,
    plan: DecodePlan,
    options: ScoreOptions,
) -> Partials:
    """Partial results of the items of `plan`: vectors fp32 `[items, H, P, D]`, and their sums."""
    num_seqs, num_q_heads, dim = q.shape
    group = num_q_heads // num_kv_heads
    width = padded(group, 1)
    tokens, stages = _tile(padded(dim), dtype.itemsize, limits_of(q.device))
    parts, sums = (
        torch.empty(plan.num_items, num_kv_heads, *shape, dtype=torch.float32, device=q.device)
        for shape in ((width, dim), (2, width))
    )
    _exact_kernel[(plan.num_items, num_kv_heads)](
        q.contiguous(),
        plane.view(dtype),
        table,
        num_tokens,
        plan.item_seq,
        plan.item_start,
        plan.item_end,
        options.visible(num_tokens),
        parts,
        sums,
        num_seqs,
        table.stride(0),
        scale * LOG2_E,
        options.cap,
        HEADS=num_kv_heads,
        GROUP=group,
        P=width,
        DIM=dim,
        DIM_PAD=padded(dim),
        ROWS=padded(width),
        UNIT=128 // dtype.itemsize,
        TOKENS=tokens,
        CAPPED=options.capped,
        WINDOW=options.window,
        num_warps=WARPS,
        num_stages=stages,
        **dependent_launch(q.device),
    )
    return Partials(parts, sums)


def exact_decode(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    num_tokens: Tensor,
    *,
    num_kv_heads: int,
    scale: float,
    dtype: torch.dtype,
    softcap: float | None = None,
    first_visible: Tensor | None = None,
    plan: DecodePlan | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode.reference.exact_decode` in Triton: the same arguments and results.

    Args:
        plan: `plan_exact` of this step, the same for all layers; made here where it is missing.
    """
    if plan is None:
        plan = plan_exact(num_tokens, table.shape[0] * table.shape[1], num_kv_heads)
    partials = attend_exact(
        q,
        plane,
        table,
        num_tokens,
        num_kv_heads=num_kv_heads,
        scale=scale,
        dtype=dtype,
        plan=plan,
        options=ScoreOptions(0, softcap, first_visible),
    )
    return merge_items(q, partials, plan.first_item)
