"""A cache's layer groups: which layers share a table, and how the arenas' bytes are divided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_paged.capacity import peak_exact_tokens
from spectral_paged.errors import FormatError
from spectral_paged.kernels.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.kernels.page_ops import check_layout
from spectral_paged.layer_group import LayerGroup
from spectral_paged.page_format import PageFormat
from spectral_paged.page_pool import PagePool
from spectral_paged.pins import MAX_PINNED_BLOCKS
from spectral_paged.rope import RotaryTable


def check_geometry(
    format: PageFormat,
    num_layers: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    exempt_layers: Sequence[int],
) -> None:
    """Refuse a format that does not fit the model, or that this cache cannot feed.

    Raises:
        FormatError: names the value, the limit and the remedy.
    """
    if (format.num_kv_heads, format.head_dim) != (num_kv_heads, head_dim):
        raise FormatError(
            f"format {format.name!r} is for {format.num_kv_heads} KV heads of width "
            f"{format.head_dim}; the model has {num_kv_heads} of {head_dim}"
        )
    if num_q_heads % num_kv_heads:
        raise FormatError(f"{num_q_heads} query heads do not divide over {num_kv_heads} KV heads")
    if format.needs_queries:
        raise FormatError(
            f"format {format.name!r} weighs tokens by queries, which the cache does not keep: it "
            "costs memory and was measured to gain nothing; use token_weighting='none'"
        )
    bad = [i for i in exempt_layers if not 0 <= i < num_layers]
    if bad:
        raise FormatError(f"exempt layers {bad} do not exist; the model has {num_layers} layers")


def check_prefixes(format: PageFormat, prefix_caching: bool) -> None:
    """Refuse prefix caching where what a query sees depends on how its prompt was cut.

    Raises:
        FormatError: says what to pass.
    """
    if prefix_caching and not format.prefill_segment:
        raise FormatError(
            f"format {format.name!r} has prefill_segment=0, so what its pages hold depends on how "
            "prompts were cut, and no other prompt may find them: pass enable_prefix_caching=False"
        )


def check_kernels(format: PageFormat, device: torch.device) -> None:
    """Refuse a format whose pages no kernel on `device` reads.

    Raises:
        FormatError: names the limit and what to use instead.
    """
    try:
        if format.seals:
            check_layout(format.layout, device)
    except ValueError as error:
        raise FormatError(f"format {format.name!r}: {error}") from error


def check_heads(
    q: Tensor | None, k: Tensor, v: Tensor, num_tokens: int, num_q_heads: int, format: PageFormat
) -> None:
    """Refuse what `attend` (and without q `append`) cannot take.

    Raises:
        FormatError: names the shapes that were expected and those that came.
    """
    expected = (num_tokens, format.num_kv_heads, format.head_dim)
    queries = (num_tokens, num_q_heads, format.head_dim)
    if k.shape != expected or v.shape != expected or (q is not None and q.shape != queries):
        raise FormatError(
            f"a step of {num_tokens} tokens takes q {list(queries)}, k and v {list(expected)}; got "
            f"q {None if q is None else list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} (KV "
            "heads unexpanded)"
        )


def check_length(
    max_model_len: int | None, rope: RotaryTable | None, format: PageFormat
) -> int:
    """Longest sequence, by default the rotary table's length.

    Raises:
        FormatError: neither is given, or the table is shorter, or missing where keys are turned.
    """
    if format.seals and format.rope != "post" and rope is None:
        raise FormatError(
            f"rope={format.rope!r} formats turn keys back: pass the model's RotaryTable"
        )
    if max_model_len is None and rope is not None:
        return rope.max_positions
    if max_model_len is None:
        raise FormatError("max_model_len must be given where there is no rotary table")
    if rope is not None and rope.max_positions < max_model_len:
        raise FormatError(
            f"the rotary table has {rope.max_positions} positions, max_model_len is "
            f"{max_model_len}: build the table longer or lower max_model_len"
        )
    return max_model_len


def build_groups(
    format: PageFormat,
    *,
    num_layers: int,
    exempt_layers: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    kv_cache_bytes: int,
    max_num_seqs: int,
    max_model_len: int,
    poison: bool,
) -> list[LayerGroup]:
    """Allocate every arena: a spectral group, and an exact one for exempt layers (or for all).

    Bytes are divided by what a token costs in each group, so that both run full at the same
    length.

    Raises:
        CapacityError: a group's share is too small for two slabs.
    """
    exempt = set(exempt_layers)
    spectral = [i for i in range(num_layers) if format.seals and i not in exempt]
    exact = [i for i in range(num_layers) if i not in spectral]
    cost = {
        True: format.page_bytes / BLOCK_TOKENS * len(spectral) if spectral else 0.0,
        False: format.exact_page_bytes(dtype.itemsize) / EXACT_PAGE_TOKENS * len(exact),
    }
    groups = []
    for seals, layers in ((True, spectral), (False, exact)):
        if not layers:
            continue
        pool = PagePool(
            format,
            num_layers=len(layers),
            dtype=dtype,
            device=device,
            budget_bytes=int(kv_cache_bytes * cost[seals] / sum(cost.values())),
            exact_only=not seals,
            poison=poison,
        )
        longest = max_model_len
        if seals:
            pinned = MAX_PINNED_BLOCKS * BLOCK_TOKENS
            longest = min(longest, peak_exact_tokens(format, max_model_len) + pinned)
        groups.append(
            LayerGroup(
                layers,
                pool,
                seals=seals,
                max_rows=max_num_seqs,
                max_exact_pages=-(-longest // EXACT_PAGE_TOKENS) + 1,
                max_pages=-(-max_model_len // BLOCK_TOKENS) if seals else 0,
            )
        )
    return groups
