"""Items of decode from pages put together, in Triton; see `decode_parts`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_paged.kernels.decode_parts import Partials, group_sizes
from spectral_paged.kernels.decode_plan import DecodePlan
from spectral_paged.kernels.layout import PageLayout
from spectral_paged.kernels.triton_page import (
    band_tuples,
    level_table,
    load_rows,
    padded,
)


@triton.jit
def _reduce_kernel(
    first_item_ptr, part_ptr, sums_ptr, out_ptr, lse_ptr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr,
    STRIDE: tl.constexpr, DIM_PAD: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """The items of one query of one sequence, many at once; vectors of `DIM` of `STRIDE`."""
    seq, query = tl.program_id(0), tl.program_id(1)
    head, group = query // GROUP, query % GROUP
    first = tl.load(first_item_ptr + seq)
    num_items = tl.load(first_item_ptr + seq + 1) - first
    dim = tl.arange(0, DIM_PAD)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([DIM_PAD], tl.float32)
    for begin in range(0, num_items, ITEMS):
        item = begin + tl.arange(0, ITEMS)
        ok = item < num_items
        at = ((first + item).to(tl.int64) * HEADS + head) * P
        peak = tl.load(sums_ptr + at * 2 + group, mask=ok, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(peak, axis=0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weight = tl.exp2(top - safe), tl.exp2(peak - safe)
        part = tl.load(sums_ptr + at * 2 + P + group, mask=ok, other=0.0)
        total = total * shrink + tl.sum(weight * part, axis=0)
        both = ok[:, None] & (dim < DIM)[None, :]
        at = (at + group)[:, None] * STRIDE + dim[None, :]
        part = tl.load(part_ptr + at, mask=both, other=0.0)
        acc = acc * shrink + tl.sum(part * weight[:, None], axis=0)
        top = new_top
    whole = tl.where(total == 0, 1.0, total)
    out = seq * (HEADS * GROUP) + query
    tl.store(out_ptr + out * DIM + dim, acc / whole, mask=dim < DIM)
    one = tl.arange(0, 1)
    tl.store(lse_ptr + out + one, (top + tl.log2(whole)) * 0.6931471805599453)


@triton.jit
def _apply_kernel(
    mixed_ptr, basis_ptr, out_ptr, num_seqs,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, RANK: tl.constexpr,
    RANK_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Vectors in rank space times V's shared basis, and what lies beside them; one KV head."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < num_seqs * GROUP
    query = (row // GROUP * HEADS + head) * GROUP + row % GROUP
    dim, comp = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, RANK_PAD)
    ok = real[:, None] & (comp < RANK)[None, :]
    vector = mixed_ptr + query[:, None] * (RANK + DIM)
    mixed = tl.load(vector + comp[None, :], mask=ok, other=0.0)
    ok = (comp < RANK)[:, None] & (dim < DIM)[None, :]
    basis = tl.load(
        basis_ptr + (head * RANK + comp)[:, None] * DIM + dim[None, :], mask=ok, other=0.0
    )
    basis = basis.to(tl.float16)
    first = mixed.to(tl.float16)
    rest = (mixed - first.to(tl.float32)).to(tl.float16)  # the basis is fp16: two parts are enough
    found = tl.dot(rest, basis, tl.dot(first, basis))
    ok = real[:, None] & (dim < DIM)[None, :]
    found += tl.load(vector + RANK + dim[None, :], mask=ok, other=0.0)
    tl.store(out_ptr + query[:, None] * DIM + dim[None, :], found, mask=ok)


@triton.jit
def _apply_pages_kernel(
    plane_ptr, table_ptr, item_seq_ptr, item_start_ptr, levels_ptr, vectors_ptr,
    num_seqs, table_width,
    HEADS: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr, RANK: tl.constexpr,
    BANDS: tl.constexpr, HEAD_BYTES: tl.constexpr, DIM_PAD: tl.constexpr, RANK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """An item's vector in rank space times the basis of the page that it is, added to the rest."""
    item, head = tl.program_id(0), tl.program_id(1)
    seq = tl.load(item_seq_ptr + item)
    if seq < num_seqs:
        position = tl.load(table_ptr + seq * table_width + tl.load(item_start_ptr + item))
        if position >= 0:
            group = tl.arange(0, ROWS)
            dim, comp = tl.arange(0, DIM_PAD), tl.arange(0, RANK_PAD)
            record = plane_ptr + position.to(tl.int64) * 128 + head * HEAD_BYTES
            rows = load_rows(record, levels_ptr, comp[:, None], dim[None, :], BANDS, RANK, DIM)
            at = ((item * HEADS + head).to(tl.int64) * P + group)[:, None]
            vector = vectors_ptr + at * (RANK + DIM)
            ok = (group < P)[:, None] & (comp < RANK)[None, :]
            part = tl.load(vector + comp[None, :], mask=ok, other=0.0)
            peak = tl.maximum(tl.max(tl.abs(part), axis=1), 1e-30)
            unit = part / peak[:, None]
            whole = unit.to(tl.float16)
            rest = (unit - whole.to(tl.float32)).to(tl.float16)
            rows = rows.to(tl.float16)  # integers: two parts of the other side are enough
            found = tl.dot(rest, rows, tl.dot(whole, rows)) * peak[:, None]
            to = vector + RANK + dim[None, :]
            ok = (group < P)[:, None] & (dim < DIM)[None, :]
            tl.store(to, tl.load(to, mask=ok, other=0.0) + found, mask=ok)


def reduce_items(
    first_item: Tensor, parts: Tensor, sums: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Merge `parts` fp32 `[items, H, P, n]` (a view of wider rows, maybe) by `sums`
    `[items, H, 2, P]` (largest score in bits, sum of weights) into `out` `[N, Hq, n]`, `lse`."""
    num_seqs, num_q_heads, size = out.shape
    heads = parts.shape[1]
    _reduce_kernel[(num_seqs, num_q_heads)](
        first_item, parts, sums, out, lse,
        HEADS=heads, GROUP=num_q_heads // heads, P=parts.shape[2], DIM=size,
        STRIDE=parts.stride(2), DIM_PAD=padded(size), ITEMS=16, num_warps=2,
    )  # fmt: skip


def finish(
    q: Tensor,
    plane: Tensor,
    table: Tensor,
    partials: Partials,
    *,
    layout: PageLayout,
    basis: Tensor | None,
    plan: DecodePlan,
) -> tuple[Tensor, Tensor]:
    """Items merged by sequence, times V's basis: out fp32 `[N, Hq, D]`, lse fp32 `[N, Hq]`."""
    group, width = group_sizes(q, layout)
    heads, dim, side = layout.num_kv_heads, layout.head_dim, layout.v
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    sizes = {"HEADS": heads, "DIM": dim, "RANK": side.rank, "RANK_PAD": padded(side.rank),
             "num_warps": 4, "num_stages": 1}  # fmt: skip
    if not side.shared_basis:
        _apply_pages_kernel[(plan.num_items, heads)](
            plane, table, plan.item_seq, plan.item_start, level_table("gaussian", q.device),
            partials.vectors, q.shape[0], table.stride(0),
            P=width, BANDS=band_tuples(side), HEAD_BYTES=layout.head_bytes, DIM_PAD=padded(dim),
            ROWS=padded(width), **sizes,
        )  # fmt: skip
        values = partials.vectors[..., side.rank :]
        reduce_items(plan.first_item, values, partials.sums, out, lse)
        return out, lse
    mixed = torch.empty(*q.shape[:2], side.rank + dim, dtype=torch.float32, device=q.device)
    reduce_items(plan.first_item, partials.vectors, partials.sums, mixed, lse)
    rows = 64 if q.shape[0] * group > 16 else 16
    columns = min(padded(dim), 128)  # a basis of 256 x 256 is more than shared memory takes
    _apply_kernel[(triton.cdiv(q.shape[0] * group, rows), heads, triton.cdiv(dim, columns))](
        mixed, basis, out, q.shape[0], GROUP=group, ROWS=rows, COLUMNS=columns, **sizes
    )
    return out, lse
