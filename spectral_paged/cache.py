"""SpectralKVCache: the façade. Reserve, append and attend, seal, free; usable without an engine.

One step of a caller's loop:

```
plan = cache.reserve({seq_id: new_tokens, ...})     None: not now (nothing is held)
cache.begin_step(plan)
for each layer: out = cache.attend(layer, q, k, v)  flattened [tokens, heads, D], plan order
report = cache.end_step()                           publishes, seals what is due
```
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectral_paged.block_pool import Kind
from spectral_paged.codec import encode_pages
from spectral_paged.errors import CapacityError, FormatError, NonFiniteError, PoolError
from spectral_paged.kernels.chunk_attention import chunk_attention
from spectral_paged.kernels.exact_decode import exact_decode
from spectral_paged.kernels.exact_pages import exact_append, exact_gather
from spectral_paged.kernels.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from spectral_paged.kernels.merge import merge
from spectral_paged.kernels.rotary import rotate
from spectral_paged.kernels.spectral_decode import spectral_decode
from spectral_paged.kernels.spectral_rebuild import spectral_rebuild
from spectral_paged.layer_group import LayerGroup
from spectral_paged.page_format import PageFormat
from spectral_paged.page_pool import PagePool
from spectral_paged.prefix import PrefixChain
from spectral_paged.rope import RotaryTable

SEALS_AT_ONCE = 8


@dataclass(slots=True)
class SequenceState:
    """What the façade knows of a sequence; tokens are those whose K and V are stored."""

    num_prompt_tokens: int
    row: int
    token_ids: Sequence[int] | None
    chain: PrefixChain | None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_pages_sealed: int = 0
    ran: bool = False  # prefix figures count sequences that ran, not attempts to admit one
    error: NonFiniteError | None = None


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """`num_new` tokens of one sequence, the first of them at position `start`."""

    seq_id: str
    start: int
    num_new: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes, in the order in which q, k and v are flattened."""

    entries: tuple[PlanEntry, ...]

    @property
    def num_tokens(self) -> int:
        return sum(e.num_new for e in self.entries)


@dataclass(slots=True)
class StepReport:
    """What `end_step` did. Sequences in `failed` hold NaN or Inf; free them."""

    blocks_sealed: int = 0
    failed: dict[str, NonFiniteError] = field(default_factory=dict)


@dataclass(slots=True)
class _GroupStep:
    """Index tensors of the running step for one group."""

    append_positions: Tensor
    append_offsets: Tensor
    decode_tokens: Tensor  # places in the flat batch of sequences with one new token
    decode_rows: Tensor
    decode_exact: Tensor
    decode_pages: Tensor
    chunks: list[tuple[int, PlanEntry, int, int]]  # flat start, entry, row, sealed blocks


@dataclass(slots=True)
class CacheCounters:
    """Totals since construction. `pages_attended` counts page reads, layer by layer."""

    blocks_sealed: int = 0
    pages_sealed: int = 0
    pages_attended: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    freed_token_bytes: int = 0  # 2 bytes an element, of sequences freed so far
    freed_held_bytes: int = 0  # what they held, exact bytes counted at 2 an element


class SpectralKVCache:
    """Paged KV cache of one model.

    Args:
        num_layers, num_q_heads, num_kv_heads, head_dim: the model's geometry.
        rope: the model's rotary table; needed for `rope="pre"` formats.
        format: a `PageFormat` or a preset name.
        device, dtype: where the arenas live, and the element type of exact pages.
        kv_cache_bytes: bytes of all arenas together, allocated here and once.
        max_num_seqs: sequences held at a time.
        max_model_len: longest sequence, tokens; default the rotary table's length.
        exempt_layers: layers that stay exact (a second group).
        softmax_scale: default `head_dim ** -0.5`.
        enable_prefix_caching: reuse slots of sequences added with `token_ids`.
        poison: fill freed slots with NaN bytes (tests).

    Raises:
        FormatError: unknown preset, or a format that does not fit the geometry.
        CapacityError: `kv_cache_bytes` is too small for two slabs.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: RotaryTable | None,
        format: PageFormat | str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_cache_bytes: int,
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        exempt_layers: Sequence[int] = (),
        softmax_scale: float | None = None,
        enable_prefix_caching: bool = True,
        poison: bool = False,
    ) -> None:
        if isinstance(format, str):
            format = PageFormat.preset(format, num_kv_heads=num_kv_heads, head_dim=head_dim)
        _check_geometry(format, num_layers, num_q_heads, num_kv_heads, head_dim, exempt_layers)
        if format.seals and format.rope == "pre" and rope is None:
            raise FormatError("rope='pre' formats un-rotate keys: pass the model's RotaryTable")
        if max_model_len is None:
            if rope is None:
                raise FormatError("max_model_len must be given where there is no rotary table")
            max_model_len = rope.max_positions
        elif rope is not None and rope.max_positions < max_model_len:
            raise FormatError(
                f"the rotary table has {rope.max_positions} positions, max_model_len is "
                f"{max_model_len}: build the table longer or lower max_model_len"
            )
        self.format = format
        self.device = torch.device(device)
        self.dtype = dtype
        self.num_layers = num_layers
        self.num_q_heads = num_q_heads
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.softmax_scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.backend = "torch"
        self.counters = CacheCounters()
        self._prefix_caching = enable_prefix_caching
        empty = torch.zeros(0, 0, device=self.device)
        self._cos = rope.cos.to(self.device) if rope is not None else empty
        self._sin = rope.sin.to(self.device) if rope is not None else empty
        self._sequences: dict[str, SequenceState] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._step: StepPlan | None = None
        self._group_steps: list[_GroupStep] = []
        self.groups = self._build_groups(set(exempt_layers), kv_cache_bytes, poison)
        self._group_of = {
            layer: (g, i)
            for g, group in enumerate(self.groups)
            for i, layer in enumerate(group.layers)
        }
        self._capacity_tokens = self._fit_tokens()

    def _build_groups(
        self, exempt: set[int], kv_cache_bytes: int, poison: bool
    ) -> list[LayerGroup]:
        spectral = [i for i in range(self.num_layers) if self.format.seals and i not in exempt]
        exact = [i for i in range(self.num_layers) if i not in spectral]
        per_token = {
            True: self.format.page_bytes / BLOCK_TOKENS * len(spectral),
            False: self.format.exact_page_bytes(self.dtype.itemsize)
            / EXACT_PAGE_TOKENS
            * len(exact),
        }
        groups = []
        for seals, layers in ((True, spectral), (False, exact)):
            if not layers:
                continue
            share = per_token[seals] / (per_token[True] + per_token[False])
            pool = PagePool(
                self.format,
                num_layers=len(layers),
                dtype=self.dtype,
                device=self.device,
                budget_bytes=int(kv_cache_bytes * share),
                exact_only=not seals,
                poison=poison,
            )
            longest = self._peak_exact_tokens(self.max_model_len) if seals else self.max_model_len
            groups.append(
                LayerGroup(
                    layers,
                    pool,
                    seals=seals,
                    max_rows=self.max_num_seqs,
                    max_exact_pages=-(-longest // EXACT_PAGE_TOKENS) + 1,
                    max_pages=-(-self.max_model_len // BLOCK_TOKENS) if seals else 0,
                )
            )
        return groups

    # ---- capacity ------------------------------------------------------------------------

    def _peak_exact_tokens(self, num_tokens: int) -> int:
        """Most tokens a sequence of `num_tokens` ever holds in exact pages."""
        fmt = self.format
        window = fmt.num_landmark_tokens + BLOCK_TOKENS + fmt.hot_tokens + fmt.prefill_segment
        return min(num_tokens, window)

    def _slabs_for(self, group: LayerGroup, num_tokens: int) -> int:
        blocks = group.pool.blocks
        if not group.seals:
            return blocks.slabs_needed(-(-num_tokens // EXACT_PAGE_TOKENS), 0)
        exact = -(-self._peak_exact_tokens(num_tokens) // EXACT_PAGE_TOKENS)
        return blocks.slabs_needed(exact, self.format.visible_blocks(num_tokens, 0))

    def fits_alone(self, num_tokens: int) -> bool:
        """True if a sequence of `num_tokens` fits when it has the pool to itself."""
        return all(self._slabs_for(g, num_tokens) <= g.pool.blocks.num_slabs for g in self.groups)

    def _fit_tokens(self) -> int:
        low, high = 0, self.max_model_len
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits_alone(middle) else (low, middle - 1)
        return low

    @property
    def max_sequence_tokens(self) -> int:
        """Longest single sequence that fits (at most `max_model_len`)."""
        return self._capacity_tokens

    @property
    def capacity_tokens(self) -> int:
        """Tokens of long sequences that the arenas hold (sealed, tails not counted)."""
        per_group = []
        for group in self.groups:
            blocks = group.pool.blocks
            kind, tokens = (
                (Kind.PAGE, BLOCK_TOKENS) if group.seals else (Kind.EXACT, EXACT_PAGE_TOKENS)
            )
            per_group.append(blocks.num_slabs * blocks.slots_per_slab[kind] * tokens)
        return min(per_group)

    # ---- sequences -----------------------------------------------------------------------

    def add_sequence(
        self,
        seq_id: str,
        *,
        num_prompt_tokens: int,
        token_ids: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> int | None:
        """Register a sequence and take what the prefix cache has of it.

        Args:
            num_prompt_tokens: where generated tokens begin; stays the same after a resume.
            token_ids: prompt and (after a resume) generated tokens; the caller may append to it
                later. Needed for prefix caching.
            cache_salt: sequences with different salts never share slots.

        Returns:
            Tokens that need no computing (0 without a hit); None when `max_num_seqs` are held.
        """
        if seq_id in self._sequences:
            raise PoolError(f"sequence {seq_id!r} is held already")
        if not self._free_rows:
            return None
        chain = None
        if token_ids is not None and self._prefix_caching:
            root = f"{self.format.fingerprint}/{cache_salt}"
            chain = PrefixChain(root, num_prompt_tokens, generated_differ=self.format.seals)
        state = SequenceState(num_prompt_tokens, self._free_rows.pop(), token_ids, chain)
        self._sequences[seq_id] = state
        for group in self.groups:
            group.add(seq_id, state.row)
        if chain is not None and token_ids is not None:
            num_hit, num_sealed = self._find_prefix(chain, token_ids, num_prompt_tokens)
            state.num_tokens = state.num_cached_tokens = num_hit
            for group in self.groups:
                group.attach(seq_id, chain, num_hit, num_sealed)
        return state.num_tokens

    def _find_prefix(
        self, chain: PrefixChain, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> tuple[int, int]:
        """Longest hit that leaves one token to compute and obeys the rule of what it may see.

        The first new query must find exactly what a cold run would show it: pages for the blocks
        that it sees as pages, and exact pages for everything else before it.
        """
        chain.extend(token_ids, len(token_ids) - 1)
        limit = (len(token_ids) - 1) // EXACT_PAGE_TOKENS
        best = (0, 0)
        start = 0
        while start <= limit * EXACT_PAGE_TOKENS:
            visible = self.format.visible_blocks(start, num_prompt_tokens)
            end = self.format.chunk_end(start, num_prompt_tokens)
            last = min(limit, (end - 1) // EXACT_PAGE_TOKENS)
            run = min(
                (self._cached_run(group, chain, visible, last) for group in self.groups),
            )
            if run * EXACT_PAGE_TOKENS >= start and run * EXACT_PAGE_TOKENS > best[0]:
                best = (run * EXACT_PAGE_TOKENS, visible)
            start = end
        return best

    @staticmethod
    def _cached_run(group: LayerGroup, chain: PrefixChain, visible: int, last: int) -> int:
        """Exact pages (of 64 tokens) covered without a gap when `visible` blocks are pages."""
        sealed = group.blocks_sealed(visible)
        if any(group.cached_page(chain, b) is None for b in range(sealed)):
            return 0
        hidden_start = group.num_landmark_pages
        hidden_end = hidden_start + sealed * (BLOCK_TOKENS // EXACT_PAGE_TOKENS)
        for index in range(last):
            if not hidden_start <= index < hidden_end and group.cached_exact(chain, index) is None:
                return index
        return last

    def num_tokens(self, seq_id: str) -> int:
        """Tokens stored of a sequence."""
        return self._sequences[seq_id].num_tokens

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._sequences

    def fork(self, parent_id: str, child_id: str) -> bool:
        """Make `child_id` a copy of `parent_id`; full slots are shared. False: not now."""
        parent = self._sequences[parent_id]
        if child_id in self._sequences:
            raise PoolError(f"sequence {child_id!r} is held already")
        if not self._free_rows:
            return False
        row = self._free_rows.pop()
        for done, group in enumerate(self.groups):
            if not group.fork(parent_id, child_id, row, parent.num_tokens):
                for earlier in self.groups[:done]:
                    earlier.free(child_id)
                self._free_rows.append(row)
                return False
        child = SequenceState(parent.num_prompt_tokens, row, None, None, parent.num_tokens)
        child.num_pages_sealed = parent.num_pages_sealed
        child.num_cached_tokens = parent.num_tokens
        self._sequences[child_id] = child
        return True

    def follow_tokens(self, seq_id: str, token_ids: Sequence[int], cache_salt: str = "") -> None:
        """Give a forked sequence its own token list, so that its spans can be found as prefixes."""
        state = self._sequences[seq_id]
        state.token_ids = token_ids
        if self._prefix_caching:
            root = f"{self.format.fingerprint}/{cache_salt}"
            state.chain = PrefixChain(
                root, state.num_prompt_tokens, generated_differ=self.format.seals
            )

    def free(self, seq_id: str) -> None:
        """Release a sequence. Published slots stay findable until they are evicted."""
        state = self._sequences.pop(seq_id, None)
        if state is None:
            raise PoolError(f"sequence {seq_id!r} is not held: double free")
        if state.ran:
            self.counters.freed_token_bytes += self._token_bytes(state.num_tokens)
            self.counters.freed_held_bytes += self._held_bytes(seq_id)
        for group in self.groups:
            group.free(seq_id)
        self._free_rows.append(state.row)

    def reset_prefix_cache(self) -> int:
        """Forget every cached slot that nobody uses; returns how many."""
        return sum(group.pool.blocks.drop_cached() for group in self.groups)

    # ---- one step ------------------------------------------------------------------------

    def chunk_limit(self, seq_id: str) -> int:
        """Most tokens of a sequence that one step may compute: queries of a step share one view."""
        state = self._sequences[seq_id]
        return self.format.chunk_end(state.num_tokens, state.num_prompt_tokens) - state.num_tokens

    def seals_due(self, seq_id: str, num_new: int) -> int:
        """Blocks that become due for sealing when `num_new` more tokens are stored."""
        state = self._sequences[seq_id]
        after = self.format.visible_blocks(state.num_tokens + num_new, state.num_prompt_tokens)
        return after - self.format.visible_blocks(state.num_tokens, state.num_prompt_tokens)

    def try_reserve(self, seq_id: str, num_new: int) -> bool:
        """Hold slots for `num_new` more tokens and for the seals they make due. False: not now.

        Raises:
            PoolError: unknown sequence, or one that failed.
            ValueError: no tokens, past `max_model_len`, or across a change of view.
        """
        state = self._sequences.get(seq_id)
        if state is None:
            raise PoolError(f"sequence {seq_id!r} is not held")
        if state.error is not None:
            raise PoolError(f"sequence {seq_id!r} failed: {state.error}") from state.error
        if num_new < 1:
            raise ValueError(f"{num_new} new tokens for {seq_id!r}: at least 1")
        total = state.num_tokens + num_new
        if total > self.max_model_len:
            raise CapacityError(
                f"{seq_id!r} would hold {total} tokens; max_model_len is {self.max_model_len}"
            )
        if num_new > self.chunk_limit(seq_id):
            raise ValueError(
                f"{num_new} new tokens of {seq_id!r} cross a change of what queries see; at most "
                f"{self.chunk_limit(seq_id)} now (chunk_limit), the rest in the next step"
            )
        visible_after = self.format.visible_blocks(total, state.num_prompt_tokens)
        before = [
            (len(g.sequences[seq_id].exact), len(g.sequences[seq_id].pages)) for g in self.groups
        ]
        for done, group in enumerate(self.groups):
            sealed = group.sequences[seq_id].num_sealed
            num_exact = group.num_exact_pages(total, sealed)
            if not group.grow(seq_id, num_exact, group.blocks_sealed(visible_after)):
                for earlier, counts in zip(self.groups[:done], before[:done], strict=True):
                    earlier.shrink(seq_id, *counts)
                return False
        return True

    def reserve(self, new_tokens: Mapping[str, int]) -> StepPlan | None:
        """Reserve a whole step; None (and nothing held) when it does not fit now.

        An unknown sequence is added, its first tokens taken for its whole prompt; call
        `add_sequence` first where that is not so.
        """
        added: list[str] = []
        grown: list[str] = []
        for seq_id, num_new in new_tokens.items():
            if seq_id not in self._sequences:
                if self.add_sequence(seq_id, num_prompt_tokens=num_new) is None:
                    break
                added.append(seq_id)
            if not self.try_reserve(seq_id, num_new):
                break
            grown.append(seq_id)
        else:
            return self.plan(new_tokens)
        for seq_id in grown:
            self.cancel_reservation(seq_id)
        for seq_id in added:
            self.free(seq_id)
        return None

    def cancel_reservation(self, seq_id: str) -> None:
        """Give back slots reserved for tokens that no step stored."""
        state = self._sequences[seq_id]
        for group in self.groups:
            sealed = group.sequences[seq_id].num_sealed
            group.shrink(seq_id, group.num_exact_pages(state.num_tokens, sealed), sealed)

    def plan(self, new_tokens: Mapping[str, int]) -> StepPlan:
        """The step over sequences whose tokens are reserved already."""
        return StepPlan(
            tuple(PlanEntry(s, self._sequences[s].num_tokens, n) for s, n in new_tokens.items())
        )

    def begin_step(self, plan: StepPlan) -> None:
        """Commit tables and build the step's index tensors."""
        if self._step is not None:
            raise PoolError("begin_step before end_step of the step before")
        self._step = plan
        self._group_steps = [self._index(group, plan) for group in self.groups]
        for group in self.groups:
            group.exact_table.commit()
            group.page_table.commit()

    def _index(self, group: LayerGroup, plan: StepPlan) -> _GroupStep:
        positions, offsets = [], []
        tokens, rows, exact, pages = [], [], [], []
        chunks: list[tuple[int, PlanEntry, int, int]] = []
        flat = 0
        for entry in plan.entries:
            slots = group.sequences[entry.seq_id]
            first = entry.start - slots.num_sealed * BLOCK_TOKENS
            place = torch.arange(first, first + entry.num_new)
            positions.append(group.exact_table.host[slots.row][place // EXACT_PAGE_TOKENS])
            offsets.append(place % EXACT_PAGE_TOKENS)
            if entry.num_new == 1:
                tokens.append(flat)
                rows.append(slots.row)
                exact.append(first + 1)
                pages.append(slots.num_sealed)
            else:
                chunks.append((flat, entry, slots.row, slots.num_sealed))
            flat += entry.num_new
        device = self.device
        return _GroupStep(
            append_positions=torch.cat(positions).to(device),
            append_offsets=torch.cat(offsets).to(device),
            decode_tokens=torch.tensor(tokens, dtype=torch.long, device=device),
            decode_rows=torch.tensor(rows, dtype=torch.long, device=device),
            decode_exact=torch.tensor(exact, dtype=torch.int32, device=device),
            decode_pages=torch.tensor(pages, dtype=torch.int32, device=device),
            chunks=chunks,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v of the step's tokens, then attend.

        Args:
            q: `[T, Hq, D]`; k, v: `[T, Hkv, D]`; after RoPE, flattened in plan order.

        Returns:
            `[T, Hq, D]` in q's dtype.
        """
        if self._step is None:
            raise PoolError("attend outside begin_step / end_step")
        fmt = self.format
        expected = (self._step.num_tokens, fmt.num_kv_heads, fmt.head_dim)
        if k.shape != expected or v.shape != expected or q.shape[1] != self.num_q_heads:
            raise FormatError(
                f"attend takes k and v {list(expected)} and {self.num_q_heads} query heads; got "
                f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} (KV heads unexpanded)"
            )
        group_index, layer_index = self._group_of[layer]
        group, step = self.groups[group_index], self._group_steps[group_index]
        plane = group.pool.plane(layer_index)
        exact_append(
            k.to(self.dtype), v.to(self.dtype), plane, step.append_positions, step.append_offsets
        )
        out = q.new_empty(q.shape, dtype=torch.float32)
        if len(step.decode_tokens):
            out[step.decode_tokens] = self._decode(group, step, plane, q[step.decode_tokens])
        for flat, entry, row, sealed in step.chunks:
            queries = q[flat : flat + entry.num_new]
            out[flat : flat + entry.num_new] = self._chunk(
                group, plane, row, sealed, entry, queries
            )
        return out.to(q.dtype)

    def _decode(self, group: LayerGroup, step: _GroupStep, plane: Tensor, q: Tensor) -> Tensor:
        out, lse = exact_decode(
            q,
            plane,
            group.exact_table.device[step.decode_rows],
            step.decode_exact,
            num_kv_heads=self.format.num_kv_heads,
            scale=self.softmax_scale,
            dtype=self.dtype,
        )
        if not group.seals:
            return out
        self.counters.pages_attended += int(step.decode_pages.sum())
        page_out, page_lse = spectral_decode(
            q,
            plane,
            group.page_table.device[step.decode_rows],
            step.decode_pages,
            layout=self.format.layout,
            first_position=self.format.num_landmark_tokens,
            cos=self._cos,
            sin=self._sin,
            scale=self.softmax_scale,
        )
        return merge([out, page_out], [lse, page_lse])[0]

    def _chunk(
        self, group: LayerGroup, plane: Tensor, row: int, sealed: int, entry: PlanEntry, q: Tensor
    ) -> Tensor:
        fmt = self.format
        num_exact = entry.start + entry.num_new - sealed * BLOCK_TOKENS
        k, v = exact_gather(
            plane,
            group.exact_table.device[row],
            num_exact,
            fmt.num_kv_heads,
            fmt.head_dim,
            self.dtype,
        )
        if sealed:
            self.counters.pages_attended += sealed
            history = spectral_rebuild(
                plane,
                group.page_table.device[row, :sealed],
                layout=fmt.layout,
                first_position=fmt.num_landmark_tokens,
                cos=self._cos,
                sin=self._sin,
                dtype=self.dtype,
            )
            k = torch.cat((history[0], k), dim=1)
            v = torch.cat((history[1], v), dim=1)
        return chunk_attention(q, k, v, scale=self.softmax_scale)

    def abort_step(self) -> None:
        """Forget a step that failed before `end_step`; its tokens were never stored."""
        plan, self._step = self._step, None
        for entry in plan.entries if plan is not None else ():
            if entry.seq_id in self._sequences:
                self.cancel_reservation(entry.seq_id)

    def end_step(self) -> StepReport:
        """Count the step's tokens as stored, publish full pages, seal what is due."""
        if self._step is None:
            raise PoolError("end_step without begin_step")
        plan, self._step = self._step, None
        report = StepReport()
        for entry in plan.entries:
            state = self._sequences[entry.seq_id]
            state.num_tokens += entry.num_new
            if not state.ran and state.chain is not None and state.token_ids is not None:
                self.counters.prefix_query_tokens += len(state.token_ids)
                self.counters.prefix_hit_tokens += state.num_cached_tokens
            state.ran = True
            if state.chain is not None and state.token_ids is not None:
                known = min(state.num_tokens, len(state.token_ids))
                state.chain.extend(state.token_ids, known)
                for group in self.groups:
                    group.publish_exact(entry.seq_id, state.chain, known)
        for group in self.groups:
            self._seal(group, plan, report)
        return report

    def _seal(self, group: LayerGroup, plan: StepPlan, report: StepReport) -> None:
        due = [
            (entry.seq_id, block)
            for entry in plan.entries
            for block in group.due(entry.seq_id, self._visible_next(entry.seq_id))
        ]
        for start in range(0, len(due), SEALS_AT_ONCE):
            self._encode(group, due[start : start + SEALS_AT_ONCE], report)
        for seq_id in dict.fromkeys(seq_id for seq_id, _ in due):
            state = self._sequences[seq_id]
            if state.error is not None:
                continue
            count = len(group.due(seq_id, self._visible_next(seq_id)))
            group.publish_sealed(seq_id, state.chain, self._visible_next(seq_id))
            state.num_pages_sealed += count * len(group.layers)
            report.blocks_sealed += count
            self.counters.blocks_sealed += count
            self.counters.pages_sealed += count * len(group.layers)

    def _visible_next(self, seq_id: str) -> int:
        state = self._sequences[seq_id]
        return self.format.visible_blocks(state.num_tokens, state.num_prompt_tokens)

    def _encode(
        self, group: LayerGroup, due: list[tuple[str, int]], report: StepReport
    ) -> None:
        """Encode blocks of a group in one batch and write their pages, not yet shown."""
        ready, keys, values = [], [], []
        for seq_id, block in due:
            k, v = group.read_block(seq_id, block)
            error = self._find_non_finite(group, seq_id, block, k, v)
            if error is not None:
                self._sequences[seq_id].error = report.failed[seq_id] = error
                continue
            if self.format.rope == "pre":
                k = self._unrotate(k, block)
            ready.append((seq_id, block))
            keys.append(k)
            values.append(v)
        if not ready:
            return
        pages = encode_pages(torch.cat(keys), torch.cat(values), self.format)
        for (seq_id, block), page in zip(ready, pages.split(len(group.layers)), strict=True):
            group.write_page(seq_id, block, page)

    def _unrotate(self, k: Tensor, block: int) -> Tensor:
        first = self.format.num_landmark_tokens + block * BLOCK_TOKENS
        span = slice(first, first + BLOCK_TOKENS)
        return rotate(k, self._cos[span], self._sin[span], inverse=True)

    def _find_non_finite(
        self, group: LayerGroup, seq_id: str, block: int, k: Tensor, v: Tensor
    ) -> NonFiniteError | None:
        for side, x in (("K", k), ("V", v)):
            bad = ~torch.isfinite(x).flatten(2).all(dim=-1)
            if bool(bad.any()):
                layer, head = bad.nonzero()[0].tolist()
                return NonFiniteError(
                    f"{side} of sequence {seq_id!r} has NaN or Inf in layer "
                    f"{group.layers[layer]}, head {head}, block {block}: the model produced it; "
                    "check its dtype (fp16 overflow) and its weights",
                    block_index=block,
                )
        return None

    # ---- figures -------------------------------------------------------------------------

    def _token_bytes(self, num_tokens: int) -> int:
        return num_tokens * self.num_layers * self.format.num_kv_heads * self.format.head_dim * 4

    def _held_bytes(self, seq_id: str) -> int:
        """Bytes a sequence holds (shared slots counted whole), exact ones at 2 an element."""
        exact = self.format.exact_page_bytes(2)
        return sum(
            len(g.layers)
            * (
                len(g.sequences[seq_id].exact) * exact
                + len(g.sequences[seq_id].pages) * g.pool.page_bytes
            )
            for g in self.groups
        )

    def sequence_stats(self, seq_id: str) -> dict[str, float]:
        """tokens, cached_tokens, pages_sealed, bytes_per_token and compression_ratio of one."""
        state = self._sequences[seq_id]
        held = self._held_bytes(seq_id)
        return {
            "tokens": state.num_tokens,
            "cached_tokens": state.num_cached_tokens,
            "pages_sealed": state.num_pages_sealed,
            "bytes_per_token": held / max(state.num_tokens, 1),
            "compression_ratio": self._token_bytes(state.num_tokens) / held if held else 1.0,
        }

    def stats(self) -> dict[str, object]:
        """Plain figures; `compression_ratio` is against 2 bytes an element, all bytes counted.

        Ratio and bytes per token are taken over sequences freed so far and those held now.
        """
        live_tokens = sum(self._token_bytes(s.num_tokens) for s in self._sequences.values())
        live_held = sum(self._held_bytes(s) for s in self._sequences)
        token_bytes = self.counters.freed_token_bytes + live_tokens
        held_bytes = self.counters.freed_held_bytes + live_held
        pools = [g.pool for g in self.groups]
        exact_in_use = sum(p.blocks.num_in_use[Kind.EXACT] * p.num_layers for p in pools)
        in_use = sum(p.blocks.num_in_use[Kind.PAGE] * p.num_layers for p in pools)
        used_bytes = sum(
            p.num_layers * p.blocks.num_in_use[kind] * p.slot_bytes(kind)
            for p in pools
            for kind in Kind
        )
        total_bytes = sum(p.num_bytes for p in pools)
        return {
            "backend": self.backend,
            "format": self.format.name,
            "fingerprint": self.format.fingerprint,
            "kv_cache_bytes": total_bytes,
            "capacity_tokens": self.capacity_tokens,
            "max_sequence_tokens": self.max_sequence_tokens,
            "bytes_per_token": held_bytes / token_bytes * self._token_bytes(1)
            if token_bytes
            else 0.0,
            "compression_ratio": token_bytes / held_bytes if held_bytes else 1.0,
            "sealed_ratio": self.format.page_ratio,
            "num_sequences": len(self._sequences),
            "pages_sealed": self.counters.pages_sealed,
            "pages_attended": self.counters.pages_attended,
            "pages_in_use": in_use,
            "pages_cached": sum(p.blocks.num_cached(Kind.PAGE) * p.num_layers for p in pools),
            "exact_pages_in_use": exact_in_use,
            "exact_pages_cached": sum(
                p.blocks.num_cached(Kind.EXACT) * p.num_layers for p in pools
            ),
            "kv_cache_usage": used_bytes / total_bytes,
            "slots_evicted": sum(p.blocks.num_evicted for p in pools),
            "slots_moved": sum(p.blocks.num_moved for p in pools),
            "prefix_query_tokens": self.counters.prefix_query_tokens,
            "prefix_hit_tokens": self.counters.prefix_hit_tokens,
        }

    def check_integrity(self) -> None:
        """Raise PoolError unless pools, tables and sequences agree."""
        rows = [s.row for s in self._sequences.values()]
        if sorted(rows + self._free_rows) != list(range(self.max_num_seqs)):
            raise PoolError("a table row is lost or held twice")
        for group in self.groups:
            group.check_integrity()
            if set(group.sequences) != set(self._sequences):
                raise PoolError("a group and the cache hold different sequences")


def _check_geometry(
    format: PageFormat,
    num_layers: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    exempt_layers: Sequence[int],
) -> None:
    if (format.num_kv_heads, format.head_dim) != (num_kv_heads, head_dim):
        raise FormatError(
            f"format {format.name!r} is for {format.num_kv_heads} KV heads of width "
            f"{format.head_dim}; the model has {num_kv_heads} of {head_dim}"
        )
    if num_q_heads % num_kv_heads:
        raise FormatError(f"{num_q_heads} query heads do not divide over {num_kv_heads} KV heads")
    if format.needs_queries:
        raise FormatError(
            f"format {format.name!r} weighs by queries, which the cache does not keep in this "
            "version: use token_weighting='none', dim_weighting='none' (the codec takes both)"
        )
    bad = [i for i in exempt_layers if not 0 <= i < num_layers]
    if bad:
        raise FormatError(f"exempt layers {bad} do not exist; the model has {num_layers} layers")
