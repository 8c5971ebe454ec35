"""The figures of a cache: pages sealed and attended, prefix hits, and the bytes of a token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spectral_paged.cache.encoder import Encoder
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.lower_tiers import LowerTiers
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.device import DeviceTimer
from spectral_paged.kernels.launch.card import card_of
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.ops import PageOps
from spectral_paged.pool.slot_pool import SlotKind

TIERS = ("host", "disk")
TIER_FIGURES = (
    "capacity_bytes",
    "bytes",
    "records",
    "written_bytes",
    "read_bytes",
    "evicted_records",
    "dropped_records",
    "failures",
)


@dataclass(slots=True)
class CacheCounters:
    """A cache's totals since its construction."""

    pages_sealed: int = 0
    pages_attended: int = 0  # pages that queries attend to, summed over layers
    pages_shared: int = 0  # of these, read once for several sequences, and not again
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    below_hit_tokens: Counter[str] = field(default_factory=Counter)  # of these, by lower tier
    resumed_query_tokens: int = 0
    resumed_hit_tokens: int = 0
    freed_tokens: int = 0  # of sequences freed so far
    freed_token_bytes: int = 0  # their K and V at 2 bytes an element
    freed_held_bytes: int = 0  # bytes that they held, exact ones at 2 an element

    def count_prefix(self, state: SequenceState) -> None:
        """Count the tokens of a sequence that runs for the first time, and its cached ones.

        As in vLLM, resumed sequences are counted separately, because they find their own slots.
        Siblings that could not be forked are counted with them: the first one counts the prompt.
        """
        if state.chain is None or state.token_ids is None:
            return
        asked, found = len(state.token_ids), state.num_cached_tokens
        if state.resumed:
            self.resumed_query_tokens += asked
            self.resumed_hit_tokens += found
        else:
            self.prefix_query_tokens += min(asked, state.num_prompt_tokens)
            self.prefix_hit_tokens += min(found, state.num_prompt_tokens)
            self.below_hit_tokens.update(state.cached_below)

    def count_freed(self, groups: Sequence[LayerGroup], state: SequenceState) -> None:
        """Count the tokens and bytes that a sequence holds when it is freed."""
        self.freed_tokens += state.num_tokens
        self.freed_token_bytes += token_bytes(groups, state.num_tokens)
        self.freed_held_bytes += held_bytes(groups, state)


def token_bytes(groups: Sequence[LayerGroup], num_tokens: int) -> int:
    """The bytes of K and V of `num_tokens` tokens at 2 bytes an element, whatever the dtype.

    Layers with a window count only the tokens inside it.
    """
    return sum(
        len(g.layers)
        * min(num_tokens, g.retention.reach)
        * (g.arena.format.num_kv_heads * g.arena.format.head_dim * 2 * 2)
        for g in groups
    )


def held_bytes(groups: Sequence[LayerGroup], state: SequenceState) -> int:
    """The bytes that a sequence holds (shared slots counted whole), exact ones at 2 an element."""
    return sum(
        len(group.layers)
        * (
            len(slots.exact) * group.arena.format.exact_page_bytes(2)
            + len(slots.pages) * group.arena.page_bytes
        )
        for group, slots in zip(groups, state.slots, strict=True)
    )


def sequence_figures(groups: Sequence[LayerGroup], state: SequenceState) -> dict[str, float]:
    """A sequence's tokens, cached_tokens, of these host_cached_tokens and disk_cached_tokens,
    pages_sealed, bytes_per_token and compression_ratio."""
    held = held_bytes(groups, state)
    plain = token_bytes(groups, state.num_tokens)
    return {
        "tokens": state.num_tokens,
        "cached_tokens": state.num_cached_tokens,
        "host_cached_tokens": state.cached_below.get("host", 0),
        "disk_cached_tokens": state.cached_below.get("disk", 0),
        "pages_sealed": state.num_pages_sealed,
        "bytes_per_token": held / max(state.num_tokens, 1),
        "compression_ratio": plain / held if held else 1.0,
    }


def cost_figures(
    groups: Sequence[LayerGroup], sequences: Sequence[SequenceState], counters: CacheCounters
) -> dict[str, object]:
    """The bytes of a token over sequences freed so far and held now, the counters, and the pool's
    figures."""
    plain, held = counters.freed_token_bytes, counters.freed_held_bytes
    num_tokens = counters.freed_tokens
    for state in sequences:
        if state.removed:  # meanwhile, by the engine's thread: `counters` has it as freed
            continue
        held += held_bytes(groups, state)
        plain += token_bytes(groups, state.num_tokens)
        num_tokens += state.num_tokens
    return pool_stats(groups) | {
        "num_sequences": len(sequences),
        "bytes_per_token": held / num_tokens if num_tokens else 0.0,
        "compression_ratio": plain / held if held else 1.0,
        "sealed_ratio": groups[0].arena.format.page_ratio,
        "pages_sealed": counters.pages_sealed,
        "pages_attended": counters.pages_attended,
        "pages_shared": counters.pages_shared,
        "prefix_query_tokens": counters.prefix_query_tokens,
        "prefix_hit_tokens": counters.prefix_hit_tokens,
        "resumed_query_tokens": counters.resumed_query_tokens,
        "resumed_hit_tokens": counters.resumed_hit_tokens,
    }


def tier_figures(counters: CacheCounters, lower: LowerTiers) -> dict[str, object]:
    """The figures of tiers below the pool by the tier's name, 0 where there is no such tier; hits
    also of the pool (`gpu`, on a CPU too)."""
    below = {name: counters.below_hit_tokens[name] for name in TIERS}
    stats = {tier.name: tier.stats() for tier in lower.tiers}
    found = counters.prefix_hit_tokens - sum(below.values())
    figures: dict[str, object] = {"prefix_hit_tokens_by_tier": {"gpu": found} | below}
    for figure in TIER_FIGURES:
        figures[f"store_{figure}"] = {name: stats.get(name, {}).get(figure, 0) for name in TIERS}
    return figures


def seal_figures(timer: DeviceTimer) -> dict[str, float]:
    """The seconds of all seals, and how many of them the device waited for the host, at most."""
    return {"seal_seconds": timer.seconds, "seal_waiting_seconds": timer.waiting_seconds}


def backends(
    ops: PageOps,
    encoders: Mapping[LayerGroup, Encoder],
    groups: Sequence[LayerGroup],
    num_q_heads: int,
    scores: Scores,
) -> dict[str, object]:
    """The device, and the backends in use there for decode attention, prompt chunks and sealing;
    names are joined where groups differ."""
    arena = groups[0].arena
    format, dtype, device = arena.format, arena.dtype, arena.planes.device
    num_queries = num_q_heads // format.num_kv_heads

    def named(names: list[str]) -> str:
        return " and ".join(sorted({part for name in names for part in name.split(" and ")}))

    # groups that never seal read exact pages only, so they count only if no group seals
    sealing = [g for g in groups if g.seals] or groups[:1]
    card = card_of(device)
    return {
        "device": str(device) if card is None else f"{card.name} ({card.kind})",
        "backend": named(
            [
                ops.backend(g.layout, num_queries, device, g.rotation.dim or format.head_dim)
                for g in sealing
            ]
        ),
        "prefill_backend": named(
            [ops.prefill_backend(dtype, format.head_dim, scores, g.window, device) for g in groups]
        ),
        "seal_backend": named([e.backend for e in encoders.values()] or ["torch"]),
    }


def usage(groups: Sequence[LayerGroup]) -> float:
    """The share of the arenas' bytes that sequences hold."""
    arenas = [g.arena for g in groups]
    used = sum(
        a.num_layers * a.slots.num_in_use[kind] * a.slot_bytes(kind)
        for a in arenas
        for kind in SlotKind
    )
    return used / sum(a.num_bytes for a in arenas)


def pool_stats(groups: Sequence[LayerGroup]) -> dict[str, object]:
    """The slots of all groups, counted once a layer, and the share of bytes in use."""
    arenas = [g.arena for g in groups]

    def in_use(kind: SlotKind) -> int:
        return sum(a.slots.num_in_use[kind] * a.num_layers for a in arenas)

    def cached(kind: SlotKind) -> int:
        return sum(a.slots.num_cached(kind) * a.num_layers for a in arenas)

    return {
        "kv_cache_bytes": sum(a.num_bytes for a in arenas),
        "kv_cache_usage": usage(groups),
        "pages_in_use": in_use(SlotKind.PAGE),
        "pages_cached": cached(SlotKind.PAGE),
        "exact_pages_in_use": in_use(SlotKind.EXACT),
        "exact_pages_cached": cached(SlotKind.EXACT),
        "slots_evicted": sum(a.slots.num_evicted for a in arenas),
        "slots_moved": sum(a.slots.num_moved for a in arenas),
    }
