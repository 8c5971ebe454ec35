"""SpectralKVCache reserves, stores, attends, seals and frees; it is usable without an engine.

One step of a caller's loop:

```
plan = cache.reserve({seq_id: new_tokens, ...})     None: not now (nothing is reserved)
cache.begin_step(plan)
for each layer: out = cache.attend(layer, q, k, v)  flattened [tokens, heads, D], plan order
report = cache.end_step()                           publishes, seals what is due
```
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from spectral_paged.cache import build, capacity, stats as cache_stats
from spectral_paged.cache.attention import PagedAttention
from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.cache.index import GroupStep, OpenStep
from spectral_paged.cache.layer_spec import Ropes, Windows, layer_specs
from spectral_paged.cache.observer import CacheObserver, Observers
from spectral_paged.cache.pins import Spans, pinned_blocks
from spectral_paged.cache.plan import StepPlan, StepReport
from spectral_paged.cache.read_ahead import Asking
from spectral_paged.cache.sealer import Sealer
from spectral_paged.cache.sequences import SequenceTable, StepRules
from spectral_paged.cache.step_sequences import StepSequences
from spectral_paged.cache.store_waiter import StoreWaiter
from spectral_paged.cache.visibility import Visibility
from spectral_paged.device import StepClock
from spectral_paged.errors import PoolError, shown
from spectral_paged.kernels.math.scores import Scores
from spectral_paged.kernels.ops import page_ops
from spectral_paged.options import CacheOptions, CacheOptionsDict
from spectral_paged.pages import PageFormat


class SpectralKVCache:
    """The paged KV cache of one model.

    Args:
        num_layers, num_q_heads, num_kv_heads, head_dim: the model's geometry.
        rope: the model's rotary table, or one for each layer (None: it rotates nothing). Layers
            with the same table take the same object. Needed unless the format has `rope="post"`.
        format: a `PageFormat` or a preset name.
        device, dtype: where the arenas live, and the element type of exact pages.
        sliding_windows: tokens that a query sees, its own included, for all layers or for each
            (None: all tokens). Windows up to 1,024 stay exact, longer ones are sealed.
        softmax_scale: default `head_dim ** -0.5`.
        softcap: scores s become `softcap * tanh(s / softcap)` (Gemma 2); None caps none.
        attention_sinks: every call of `attend` brings the layer's sinks (gpt-oss).
        cache_options, **options: `CacheOptions`, or its fields by name; `kv_cache_bytes` is needed.

    Raises:
        TypeError: an option that does not exist, or no `kv_cache_bytes`.
        FormatError: unknown preset, a format that does not fit the geometry, or one that needs a
            calibration without it.
        CapacityError: `kv_cache_bytes` is too small for two slabs.
        InvalidRequestError: no kernel serves the GPU, or it does not compute in `dtype`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: Ropes,
        format: PageFormat | str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        sliding_windows: Windows = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        attention_sinks: bool = False,
        cache_options: CacheOptions | None = None,
        **options: Unpack[CacheOptionsDict],
    ) -> None:
        chosen = CacheOptions.of(SpectralKVCache, cache_options, options)
        self.device, self.dtype = torch.device(device), dtype
        if isinstance(format, str):
            format = PageFormat.preset(format, num_kv_heads=num_kv_heads, head_dim=head_dim)
        if chosen.kv_cache_bytes is None:
            raise TypeError("SpectralKVCache needs kv_cache_bytes, the bytes of its arenas")
        heads = num_q_heads, num_kv_heads, head_dim
        build.check_shape(format, chosen, num_layers, *heads, self.device, dtype)
        longest = chosen.max_model_len
        self.layers, longest = layer_specs(
            format, num_layers, rope, sliding_windows, max_model_len=longest, device=self.device
        )
        chosen = replace(chosen, max_model_len=longest)
        self._basis = CacheBasis(chosen.calibration, format, num_layers, self.device)
        self.num_layers, self.num_q_heads = num_layers, num_q_heads
        self.max_num_seqs, self.max_model_len = chosen.max_num_seqs, longest
        self.prefix_caching = chosen.enable_prefix_caching
        self.counters, self.clock = cache_stats.CacheCounters(), StepClock()  # off at first
        self.ops = page_ops(self.device)
        scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.open_step: OpenStep | None = None
        self.replayed: Sequence[GroupStep] | None = None
        self.groups = build.build_groups(
            self._basis, self.layers, chosen, num_q_heads, dtype=dtype, device=self.device
        )
        self._observers = Observers()
        self.sealer = Sealer(
            self.groups, self._basis, self.ops, self.device, self._observers, self.counters
        )
        scores = Scores(scale, softcap, attention_sinks)
        self.attention = PagedAttention(self.groups, self._basis, self.ops, num_q_heads, scores)
        self.visibility = Visibility.of(self.format)
        rules = StepRules.of(self.groups, self.visibility, longest)
        self._sequences = SequenceTable(
            self.groups, self._basis, rules, self.max_num_seqs, prefix_caching=self.prefix_caching
        )
        self._lower = build.lower_tiers(self.groups, self.visibility, chosen, longest, self.device)
        self.max_sequence_tokens = capacity.longest_sequence(self.groups, longest)
        self.capacity_tokens = capacity.capacity_tokens(self.groups)

    def close(self) -> None:
        """Write what the store is to keep, and give its memory back. The cache goes on without."""
        self._lower.close(self.sealer.wait)

    @property
    def format(self) -> PageFormat:
        """The page format; an online calibration changes its fingerprint at the first seal."""
        return self._basis.format

    @property
    def num_bytes(self) -> int:
        """Bytes of all arenas together."""
        return sum(group.arena.num_bytes for group in self.groups)

    def warm_up(self) -> None:
        """Compile the kernels that seal and rebuild history; nothing is compiled on the CPU, nor
        before the first seal of an online calibration."""
        for group in self.groups:
            self.sealer.warm_up(group)
            self.attention.warm_up(group)

    def observe(self, observer: CacheObserver) -> AbstractContextManager[None]:
        """Call `observer`'s methods at every event of the cache while a `with` block runs."""
        return self._observers.joined(observer)

    def keeping_all(self) -> AbstractContextManager[None]:
        """Wait after each step, while a `with` block runs, until the store has what is complete."""
        return self._observers.joined(StoreWaiter(self.sealer, self._lower))

    def concurrency(self, num_tokens: int) -> int:
        """The sequences of `num_tokens` tokens that fit at once; prompts need a little more."""
        return capacity.concurrency(self.groups, num_tokens)

    def fits_alone(
        self, num_tokens: int, *, num_prompt_tokens: int = 0, pinned_spans: Spans = ()
    ) -> bool:
        """True if a sequence of `num_tokens` fits when it has the pool to itself.

        Raises:
            InvalidRequestError: a pinned span outside the prompt, or too many blocks pinned.
        """
        pinned = pinned_blocks(self.format, pinned_spans, num_prompt_tokens)
        return capacity.fits_alone(self.groups, num_tokens, pinned)

    def has_room(self, lengths: Mapping[str, int]) -> bool:
        """True if these sequences can grow to so many tokens each, beside all that is in use now. A
        prompt counts with its peak, before its last blocks are sealed. Nothing is reserved."""
        held = self._sequences.by_id
        return capacity.has_room(self.groups, [(held[s].slots, n) for s, n in lengths.items()])

    # ---- sequences -----------------------------------------------------------------------

    def add_sequence(
        self,
        seq_id: str,
        *,
        num_prompt_tokens: int,
        token_ids: Sequence[int] | None = None,
        cache_salt: str = "",
        pinned_spans: Spans = (),
        resumed: bool = False,
        max_cached_tokens: int | None = None,
    ) -> int | None:
        """Register a sequence and attach its longest hit in the prefix cache.

        Args:
            num_prompt_tokens: the first generated token's position, the same after a resume.
            token_ids: prompt and (after a resume) generated tokens; the caller may append to the
                list later. Needed for prefix caching.
            cache_salt: sequences with different salts never share slots.
            pinned_spans: `(start, end)` positions whose blocks are never sealed (decision 0014).
            resumed: the prompt was computed before; prefix hits are counted separately.
            max_cached_tokens: most tokens of the hit; None: as many as the cache has.

        Returns:
            Tokens that need no computing (0 without a hit); None if `max_num_seqs` are held.
        """
        state = self._sequences.add(
            seq_id,
            num_prompt_tokens=num_prompt_tokens,
            token_ids=token_ids,
            cache_salt=cache_salt,
            pinned=pinned_blocks(self.format, pinned_spans, num_prompt_tokens),
            resumed=resumed,
            max_cached_tokens=max_cached_tokens,
        )
        if state is not None:
            self._lower.admitted(state)
            self._observers.added(seq_id, num_prompt_tokens)
        return None if state is None else state.num_tokens

    def prefetch(
        self,
        seq_id: str,
        *,
        num_prompt_tokens: int,
        token_ids: Sequence[int],
        cache_salt: str = "",
        pinned_spans: Spans = (),
    ) -> bool | None:
        """Bring a sequence's prefix from tiers below the pool while steps run; True: it is there.

        False: on its way. None: no room now. Once True, `add_sequence` or `cancel_prefetch`.
        """
        pinned = pinned_blocks(self.format, pinned_spans, num_prompt_tokens)
        asking = Asking(seq_id, token_ids, num_prompt_tokens, cache_salt, pinned, self.format)
        return self._lower.prefetch(asking, alone=not self.num_sequences)

    def cancel_prefetch(self, seq_id: str) -> None:
        """Give up the prefetch of a sequence that will not be added; unknown ones are ignored."""
        self._lower.cancel(seq_id)

    def num_tokens(self, seq_id: str) -> int:
        """The number of tokens whose K and V are stored for a sequence."""
        return self._sequences.by_id[seq_id].num_tokens

    def progress(self, seq_ids: list[str]) -> tuple[list[int], list[bool]]:
        """The tokens stored of each sequence, and True where one more needs no reservation."""
        return self._sequences.progress(seq_ids)

    @property
    def num_sequences(self) -> int:
        """The number of sequences that are held."""
        return len(self._sequences.by_id)

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._sequences.by_id

    def fork(
        self,
        parent_id: str,
        child_id: str,
        *,
        token_ids: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> bool:
        """Make `child_id` a copy of `parent_id` that shares its full slots; False: not now. With
        the child's own `token_ids`, other sequences can find its later tokens as a prefix."""
        parent = self._sequences.by_id[parent_id]
        child = self._sequences.fork(parent, child_id, token_ids=token_ids, cache_salt=cache_salt)
        if child is not None:
            self.sealer.forked(parent, child)
        return child is not None

    def free(self, seq_id: str, *, forget: bool = False) -> None:
        """Release a sequence; its published slots can be found until they are evicted. With
        `forget` no later sequence finds them, because their content is not to be trusted."""
        state = self._sequences.by_id.get(seq_id)
        if state is None:
            raise PoolError(f"sequence {shown(seq_id)} is not held: double free")
        self.sealer.freed(state)
        if state.ran:
            self.counters.count_freed(self.groups, state)
        self._lower.freed(state, forget=forget or state.error is not None)
        self._sequences.remove(state, forget=forget or state.error is not None)
        self._observers.freed(seq_id)

    def reset_prefix_cache(self, *, reset_store: bool = False) -> int:
        """Evict every cached slot, with `reset_store` the store's too; returns their number."""
        self._lower.give_up()
        if reset_store:
            self._lower.forget_all()
        return sum(group.arena.slots.drop_cached() for group in self.groups)

    # ---- one step ------------------------------------------------------------------------

    def chunk_limit(self, seq_id: str) -> int:
        """The most tokens of a sequence that a step may compute, in one view (decision 0001)."""
        return self._sequences.by_id[seq_id].chunk_limit()

    def seals_due(self, seq_id: str, num_new: int) -> int:
        """The number of blocks that become due when `num_new` more tokens are stored."""
        return self._sequences.by_id[seq_id].seals_due(num_new)

    def try_reserve(self, seq_id: str, num_new: int) -> bool:
        """Reserve slots for `num_new` more tokens and the seals they make due; False: not now.

        Raises:
            PoolError: unknown sequence, or one that failed.
            ValueError: no tokens, or across a change of view.
            CapacityError: past `max_model_len`.
        """
        state = self._sequences.by_id.get(seq_id)
        if state is None:
            raise PoolError(f"sequence {shown(seq_id)} is not held")
        return state.reserve(num_new) or (self._lower.give_way() and state.reserve(num_new))

    def reserve(self, new_tokens: Mapping[str, int]) -> StepPlan | None:
        """Reserve a whole step; None, if it does not fit now, and errors leave nothing reserved.
        Unknown sequences are added with these tokens as their whole prompt."""
        with ExitStack() as undo:
            for seq_id, num_new in new_tokens.items():
                if seq_id not in self:
                    if self.add_sequence(seq_id, num_prompt_tokens=num_new) is None:
                        return None
                    undo.callback(self.free, seq_id)
                if not self.try_reserve(seq_id, num_new):
                    return None
                undo.callback(self.cancel_reservation, seq_id)
            undo.pop_all()  # neither None nor an error, so every reservation stays
        return self.plan(new_tokens)

    def cancel_reservation(self, seq_id: str) -> None:
        """Release the slots reserved for tokens that no step stored."""
        self._sequences.by_id[seq_id].cancel()

    def plan(self, new_tokens: Mapping[str, int], drafted: Container[str] = ()) -> StepPlan:
        """The plan of a step whose tokens are reserved already. Of sequences in `drafted`, which
        generate, all tokens but the first one are a draft, which `take_back` may drop."""
        return self._sequences.plan(new_tokens, drafted)

    def begin_step(self, plan: StepPlan) -> None:
        """Open a step: find the slots of its tokens and commit the tables."""
        if self.open_step is not None:
            raise PoolError("begin_step before end_step of the step before")
        sequences = StepSequences(plan, self._sequences)
        if overdue := [state for state in sequences.visited() if state.overdue]:
            with self.clock.section("seal"):  # their next queries must see these blocks as pages
                self.sealer.seal_due(overdue)
        self.open_step = OpenStep(plan, sequences, self.groups, self.ops)
        for group, index in zip(self.groups, self.open_step.index, strict=True):
            group.commit()
            index.count_reads(self.counters, len(group.layers))
        self._observers.planned(plan)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Store k and v of the step's tokens, then attend; returns `[T, Hq, D]` in q's dtype.

        Args:
            q: `[T, Hq, D]`; k, v: `[T, Hkv, D]`; after RoPE, flattened in plan order.
            sinks: `[Hq]`, the layer's, for a cache with `attention_sinks`.
        """
        steps = self.replayed or self._step_for("attend").steps
        self._observers.storing(layer, k, v)
        with self.clock.section("attention"):
            return self.attention.run(steps, layer, q, k, v, sinks)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k and v of the step's tokens, without attention."""
        steps = self.replayed or self._step_for("append").steps
        self._observers.storing(layer, k, v)
        self.attention.append(steps, layer, k, v)

    def take_back(self, counts: Mapping[str, int]) -> None:
        """Let the last `counts[seq_id]` tokens of drafts in the open step not count as stored, so
        that no page gets them. Raises PoolError where a sequence has no draft of so many."""
        step = self._step_for("take_back")
        step.plan = step.plan.shortened(counts)
        step.sequences.shorten(step.plan)

    def abort_step(self) -> None:
        """Drop a step that failed before `end_step`; its tokens do not count as stored."""
        step, self.open_step = self.open_step, None
        if step is not None:
            step.sequences.cancel()

    def _step_for(self, what: str) -> OpenStep:
        if self.open_step is None:
            raise PoolError(f"{what} outside begin_step / end_step")
        return self.open_step

    def end_step(self) -> StepReport:
        """Count the step's tokens as stored, publish full pages, and seal due blocks.

        Sequences of the plan may have been freed since `begin_step`. A seal kernel finds NaN and
        Inf while it runs, and a later `end_step` (or `settle`) reports them.
        """
        step = self._step_for("end_step")
        self.open_step = None
        self.sealer.wait()
        gone, visited = step.sequences.gone(), step.sequences.visited()
        step.sequences.store(gone, self.counters)
        with self.clock.section("seal"):
            self.sealer.seal_due(visited)
        step.sequences.trim()
        self._lower.step_ended(visited)
        for state in visited:
            state.settle()
        report = self.sealer.take_report()
        self._observers.ended(step.plan if gone is None else step.plan.without(gone), report)
        return report

    def settle(self) -> StepReport:
        """Wait for the checks of all blocks sealed so far; returns unreported failures."""
        self.sealer.wait()
        return self.sealer.take_report()

    @property
    def has_late_failures(self) -> bool:
        """True if failures are known that no step has reported; `settle` returns them."""
        return bool(self.sealer.unreported.failed)

    # ---- figures -------------------------------------------------------------------------

    def sequence_stats(self, seq_id: str) -> dict[str, float]:
        """A sequence's tokens, cached_tokens, pages_sealed, bytes_per_token, compression_ratio."""
        return cache_stats.sequence_figures(self.groups, self._sequences.by_id[seq_id])

    def stats(self) -> dict[str, object]:
        """The cache's figures; `compression_ratio` counts all bytes, against 2 bytes an element,
        of sequences freed so far and those held now."""
        ops, encoders, scores = self.ops, self.sealer.encoders, self.attention.scores
        return {
            "format": self.format.name,
            "fingerprint": self.format.fingerprint,
            **cache_stats.backends(ops, encoders, self.groups, self.num_q_heads, scores),
            "capacity_tokens": self.capacity_tokens,
            "max_sequence_tokens": self.max_sequence_tokens,
            **cache_stats.cost_figures(self.groups, self._sequences.all(), self.counters),
            **cache_stats.seal_figures(self.sealer.timer),
            **cache_stats.tier_figures(self.counters, self._lower),
        }

    @property
    def usage(self) -> float:
        """The share of the arenas' bytes that sequences hold, between 0 and 1."""
        return cache_stats.usage(self.groups)

    def check_integrity(self) -> None:
        """Raise PoolError unless pools, tables, sequences and lower tiers agree."""
        self._sequences.check_integrity()
        self._lower.check_integrity()
