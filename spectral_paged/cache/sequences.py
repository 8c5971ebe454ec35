"""The sequences of a cache: each has a row of the block tables, tokens, and slots in each group."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from spectral_paged.cache.cache_basis import CacheBasis
from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.plan import StepPlan
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.prefix_hit import longest_hit, prefix_chain
from spectral_paged.cache.row_counts import Array, RowCounts, next_edge
from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.cache.visibility import NEVER, Visibility
from spectral_paged.errors import CapacityError, FormatError, NonFiniteError, PoolError, shown
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class StepRules:
    """The bounds on the tokens of a sequence, and on those that one step computes.

    visibility: rule for the blocks that queries see as pages.
    max_num_tokens: the most tokens of a sequence.
    longest_chunk: the most tokens of a sequence that one step computes, whatever they see.
    windows: the windows of the layer groups.
    """

    visibility: Visibility
    max_num_tokens: int
    longest_chunk: int
    windows: tuple[int, ...] = ()

    @classmethod
    def of(cls, groups: Iterable[LayerGroup], visibility: Visibility, max_num_tokens: int) -> Self:
        """The rules of a cache of these groups; windows slide between steps, so that where a group
        has one, a chunk ends with its segment's length."""
        windows = tuple(group.window for group in groups if group.window is not None)
        longest = visibility.segment if windows and visibility.segment else NEVER
        return cls(visibility, max_num_tokens, longest, windows)

    def quiet_until(self, position: int) -> int:
        """The first position from `position` on whose token may change more than counts.

        All that happens while a sequence generates happens where a span of 64 tokens begins or
        ends, of its own tokens or of those that have left a window.
        """
        edges = [next_edge(position, window - 1) for window in self.windows]
        return min(next_edge(position), self.max_num_tokens, *edges)


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sequence of a cache; `slots` has one item a group.

    counts: the counts of all rows, of which `row` is the sequence's.
    rules: the bounds on its steps, the same for all sequences of the cache.
    """

    seq_id: str
    row: int
    slots: list[SequenceSlots]
    counts: RowCounts
    rules: StepRules
    num_prompt_tokens: int
    token_ids: Sequence[int] | None
    chain: PrefixChain | None = None
    pinned: tuple[int, ...] = ()  # blocks that stay exact
    num_cached_tokens: int = 0
    cached_below: dict[str, int] = field(default_factory=dict)  # of these, by tier below the pool
    num_pages_sealed: int = 0  # a fork starts at 0
    resumed: bool = False
    ran: bool = False  # prefix figures count sequences that ran, not attempts to admit one
    removed: bool = False  # another sequence may have its id by now
    overdue: bool = False  # an error interrupted the seals of its last step
    error: NonFiniteError | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens whose K and V are stored."""
        return int(self.counts.num_tokens[self.row])

    @num_tokens.setter
    def num_tokens(self, count: int) -> None:
        self.counts.num_tokens[self.row] = count

    @property
    def is_quiet(self) -> bool:
        """True if one more token changes the sequence's counts, and nothing else."""
        return bool(self.counts.num_tokens[self.row] < self.counts.quiet_until[self.row])

    def fail(self, error: NonFiniteError) -> None:
        """Take no more tokens."""
        self.error = error
        self.counts.quiet_until[self.row] = 0

    def settle(self) -> None:
        """Find, after a step that visited the sequence, how long it is quiet."""
        count, row = self.num_tokens, self.row
        generates = self.error is None and count >= self.num_prompt_tokens
        # token ids may come late, and full pages are published once they are there
        late = self.chain is not None and len(self.chain) < count // EXACT_PAGE_TOKENS
        self.counts.has_block[row] = generates and any(
            slots.retention.seals and slots.complete(count) is not None for slots in self.slots
        )
        self.counts.quiet_until[row] = (
            self.rules.quiet_until(count) if generates and not late else 0
        )

    def visible_blocks(self, num_new: int = 0) -> int:
        """The number of blocks that the query after `num_new` more tokens sees as pages."""
        position = self.num_tokens + num_new
        return self.rules.visibility.visible_blocks(position, self.num_prompt_tokens)

    def chunk_limit(self) -> int:
        """The most tokens that the next step may compute, because its queries share one view."""
        end = self.rules.visibility.chunk_end(self.num_tokens, self.num_prompt_tokens)
        return min(end - self.num_tokens, self.rules.longest_chunk)

    def seals_due(self, num_new: int) -> int:
        """The number of blocks that become due when `num_new` more tokens are stored."""
        visible = self.visible_blocks(num_new)
        return max([len(slots.due(visible)) for slots in self.slots])

    def reserve(self, num_new: int) -> bool:
        """Hold slots for `num_new` more tokens and the pages that they make due in every group;
        False: not now.

        If there are too few slots, pages written ahead are released and the attempt is repeated.

        Raises:
            PoolError: the sequence failed.
            ValueError: no tokens, or across a change of view.
            CapacityError: more tokens than a sequence may have.
        """
        if num_new == 1 and self.is_quiet:
            return True
        if self.error is not None:
            raise PoolError(f"sequence {shown(self.seq_id)} failed: {self.error}") from self.error
        if num_new < 1:
            raise ValueError(f"{num_new} new tokens for {shown(self.seq_id)}: at least 1")
        total, most = self.num_tokens + num_new, self.rules.max_num_tokens
        if total > most:
            raise CapacityError(
                f"{shown(self.seq_id)} would hold {total} tokens; max_model_len is {most}"
            )
        if num_new > 1 and num_new > self.chunk_limit():  # one token has one view
            raise ValueError(
                f"{num_new} new tokens of {shown(self.seq_id)} cross a change of what queries see; "
                f"at most {self.chunk_limit()} now (chunk_limit), the rest in the next step"
            )
        visible = self.visible_blocks(num_new)
        if self._hold(total, visible):
            return True
        dropped = [slots.drop_ahead() for slots in self.slots]
        return any(dropped) and self._hold(total, visible)

    def _hold(self, num_tokens: int, visible_blocks: int) -> bool:
        before = [(len(slots.exact), len(slots.pages)) for slots in self.slots]
        for done, slots in enumerate(self.slots):
            if not slots.hold(num_tokens, visible_blocks):
                for earlier, counts in zip(self.slots[:done], before[:done], strict=True):
                    earlier.shrink(*counts)
                return False
        return True

    def cancel(self) -> None:
        """Release the slots reserved for tokens that no step stored."""
        for slots in self.slots:
            slots.cancel(self.num_tokens)

    def store(self, num_new: int) -> None:
        """Count `num_new` more tokens as stored, publish full exact pages, and release slots that
        have left a window."""
        self.num_tokens += num_new
        self.ran = True
        if self.chain is not None and self.token_ids is not None:
            known = min(self.num_tokens, len(self.token_ids))
            self.chain.extend(self.token_ids, known)
            for slots in self.slots:
                slots.publish_exact(self.chain, known)
        for slots in self.slots:
            slots.slide(self.num_tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences in the order of a step; `rows`, int64 `[N]`, are theirs of the tables."""

    seq_ids: list[str]
    states: list[SequenceState]
    rows: Array


class SequenceTable:
    """The sequences of a cache by id, and the rows of the block tables that are free.

    Args:
        groups: the cache's layer groups.
        basis: the cache's calibration and format; the format separates prefixes.
        rules: the bounds on steps of every sequence.
        max_num_seqs: number of rows.
        prefix_caching: False lets no sequence find slots of another one.
    """

    def __init__(
        self,
        groups: list[LayerGroup],
        basis: CacheBasis,
        rules: StepRules,
        max_num_seqs: int,
        *,
        prefix_caching: bool,
    ) -> None:
        self.by_id: dict[str, SequenceState] = {}
        self._groups = groups
        self._basis = basis
        self._rules = rules
        self._prefix_caching = prefix_caching
        self._num_rows = max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.counts = RowCounts(max_num_seqs)
        self._batch = Batch([], [], np.empty(0, np.int64))

    def plan(self, new_tokens: Mapping[str, int], drafted: Container[str] = ()) -> StepPlan:
        """The plan of a step with so many new tokens of each sequence, of some with a draft.

        Raises:
            FormatError: there are drafts, and a step's tokens see what its first one sees.
        """
        if drafted and self._rules.visibility.by_step:
            raise FormatError(
                "drafts need a format with a prefill_segment of at least 512: with 0 a step's "
                "tokens see what its first one sees, and a draft's would see less than without it"
            )
        seq_ids, counts = list(new_tokens), list(new_tokens.values())
        starts = self.counts.num_tokens[self.batch(seq_ids).rows]
        have = np.array([seq_id in drafted for seq_id in seq_ids]) if drafted else None
        return StepPlan(seq_ids, starts, counts, have)

    def progress(self, seq_ids: list[str]) -> tuple[list[int], list[bool]]:
        """The tokens stored of each sequence, and True for each that is quiet."""
        num_tokens, quiet_until, _ = self.counts.all[:, self.batch(seq_ids).rows]
        return num_tokens.tolist(), (num_tokens < quiet_until).tolist()

    def batch(self, seq_ids: list[str]) -> Batch:
        """The sequences of these ids; those of the last call are known already."""
        if seq_ids != self._batch.seq_ids:
            states = [self.by_id[seq_id] for seq_id in seq_ids]
            rows = np.fromiter((state.row for state in states), np.int64, len(states))
            self._batch = Batch(seq_ids, states, rows)
        return self._batch

    def all(self) -> list[SequenceState]:
        """A list of every sequence held now; another thread may free some while it is read."""
        return list(self.by_id.values())

    def add(
        self,
        seq_id: str,
        *,
        num_prompt_tokens: int,
        token_ids: Sequence[int] | None,
        cache_salt: str,
        pinned: tuple[int, ...],
        resumed: bool,
        max_cached_tokens: int | None,
    ) -> SequenceState | None:
        """A new sequence with its prefix hit attached; None if every row is taken."""
        row = self._take_row(seq_id)
        if row is None:
            return None
        try:
            slots = [group.take_row(row, pinned) for group in self._groups]
            state = SequenceState(
                seq_id,
                row,
                slots,
                self.counts,
                self._rules,
                num_prompt_tokens,
                token_ids,
                pinned=pinned,
                resumed=resumed,
            )
            state.chain = self._chain(state, cache_salt)
            if state.chain is not None:
                num_hit, visible = longest_hit(
                    self._rules.visibility,
                    slots,
                    state.chain,
                    num_prompt_tokens,
                    max_tokens=max_cached_tokens,
                )
                state.num_tokens = state.num_cached_tokens = num_hit
                for held in slots:
                    held.attach(state.chain, num_hit, visible)
        except BaseException:
            self._free_row(row)
            raise
        self.by_id[seq_id] = state
        return state

    def fork(
        self,
        parent: SequenceState,
        child_id: str,
        *,
        token_ids: Sequence[int] | None,
        cache_salt: str,
    ) -> SequenceState | None:
        """A copy of `parent` that shares its full slots; None: not now."""
        row = self._take_row(child_id)
        if row is None:
            return None
        whole = False
        try:
            slots = [group.take_row(row, parent.pinned) for group in self._groups]
            pairs = zip(slots, parent.slots, strict=True)
            whole = all(held.share(others, parent.num_tokens) for held, others in pairs)
        finally:
            if not whole:  # not now, or something raised
                self._free_row(row)
        if not whole:
            return None
        child = SequenceState(
            child_id,
            row,
            slots,
            self.counts,
            self._rules,
            parent.num_prompt_tokens,
            token_ids,
            num_cached_tokens=parent.num_tokens,
            pinned=parent.pinned,
            overdue=parent.overdue,
            ran=True,  # a fork does not search the prefix cache
        )
        child.num_tokens = parent.num_tokens
        child.chain = self._chain(child, cache_salt)
        self.by_id[child_id] = child
        return child

    def remove(self, state: SequenceState, *, forget: bool) -> None:
        """Release a sequence's slots and row; with `forget` no later sequence finds the slots."""
        del self.by_id[state.seq_id]
        self._batch = Batch([], [], np.empty(0, np.int64))  # the id may become another's
        state.removed = True
        if forget:
            for slots in state.slots:
                slots.forget(state.chain)
        self._free_row(state.row, state.chain)

    def _take_row(self, seq_id: str) -> int | None:
        if seq_id in self.by_id:
            raise PoolError(f"sequence {shown(seq_id)} is held already")
        return self._free_rows.pop() if self._free_rows else None

    def _free_row(self, row: int, chain: PrefixChain | None = None) -> None:
        """Release a row and the slots that a sequence, complete or not, holds in it."""
        for group in self._groups:
            group.free_row(row, chain)
        self.counts.clear(row)
        self._free_rows.append(row)

    def _chain(self, state: SequenceState, cache_salt: str) -> PrefixChain | None:
        if state.token_ids is None or not self._prefix_caching:
            return None
        return prefix_chain(
            self._basis.format, state.token_ids, state.num_prompt_tokens, cache_salt, state.pinned
        )

    def check_integrity(self) -> None:
        """Raise PoolError unless rows and groups agree with the sequences."""
        rows = [state.row for state in self.by_id.values()]
        if sorted(rows + self._free_rows) != list(range(self._num_rows)):
            raise PoolError("a table row is lost or held twice")
        for place, group in enumerate(self._groups):
            group.check_integrity({name: s.slots[place] for name, s in self.by_id.items()})
