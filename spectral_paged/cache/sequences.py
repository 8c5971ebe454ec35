"""The sequences a cache holds: rows, prefix hits, and slots in every group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.prefix import PrefixChain
from spectral_paged.cache.prefix_hit import longest_hit, prefix_chain
from spectral_paged.cache.sequence_state import SequenceState
from spectral_paged.errors import PoolError
from spectral_paged.pages import PageFormat


class SequenceTable:
    """Sequences by id; a row of the block tables each.

    Args:
        groups: the cache's layer groups.
        max_num_seqs: rows.
        prefix_caching: False lets no sequence find another's slots.
    """

    def __init__(
        self, groups: list[LayerGroup], max_num_seqs: int, *, prefix_caching: bool
    ) -> None:
        self._groups = groups
        self._prefix_caching = prefix_caching
        self._sequences: dict[str, SequenceState] = {}
        self._num_rows = max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    def __contains__(self, seq_id: str) -> bool:
        return seq_id in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sequences)

    def __getitem__(self, seq_id: str) -> SequenceState:
        return self._sequences[seq_id]

    def items(self) -> list[tuple[str, SequenceState]]:
        return list(self._sequences.items())

    def held(self, seq_id: str, message: str) -> SequenceState:
        """The state of a sequence that must be there.

        Raises:
            PoolError: it is not; `message` says what that means.
        """
        state = self._sequences.get(seq_id)
        if state is None:
            raise PoolError(f"sequence {seq_id!r} is not held{message}")
        return state

    def _row(self, seq_id: str) -> int | None:
        if seq_id in self._sequences:
            raise PoolError(f"sequence {seq_id!r} is held already")
        return self._free_rows.pop() if self._free_rows else None

    def _chain(
        self, format: PageFormat, state: SequenceState, cache_salt: str
    ) -> PrefixChain | None:
        if state.token_ids is None or not self._prefix_caching:
            return None
        return prefix_chain(
            format, state.token_ids, state.num_prompt_tokens, cache_salt, state.pinned
        )

    def add(
        self,
        format: PageFormat,
        seq_id: str,
        *,
        num_prompt_tokens: int,
        token_ids: Sequence[int] | None,
        cache_salt: str,
        pinned: tuple[int, ...],
        resumed: bool,
    ) -> SequenceState | None:
        """A new sequence with its prefix hit attached; None when every row is taken."""
        row = self._row(seq_id)
        if row is None:
            return None
        state = SequenceState(num_prompt_tokens, row, token_ids, pinned=pinned, resumed=resumed)
        try:
            state.chain = self._chain(format, state, cache_salt)
            for group in self._groups:
                group.add(seq_id, row, pinned)
            if state.chain is not None:
                num_hit, num_sealed = longest_hit(
                    format, self._groups, state.chain, num_prompt_tokens, pinned
                )
                state.num_tokens = state.num_cached_tokens = num_hit
                for group in self._groups:
                    group.attach(seq_id, state.chain, num_hit, num_sealed)
        except BaseException:
            self._undo(seq_id, row)
            raise
        self._sequences[seq_id] = state
        return state

    def _undo(self, seq_id: str, row: int) -> None:
        """Give back what a sequence that cannot be had holds already."""
        for group in self._groups:
            if seq_id in group.sequences:
                group.free(seq_id)
        self._free_rows.append(row)

    def fork(
        self,
        format: PageFormat,
        parent_id: str,
        child_id: str,
        *,
        token_ids: Sequence[int] | None,
        cache_salt: str,
    ) -> bool:
        """A copy of `parent_id` that shares its full slots; False: not now."""
        parent = self._sequences[parent_id]
        row = self._row(child_id)
        if row is None:
            return False
        whole = False
        try:
            whole = all(g.fork(parent_id, child_id, row, parent.num_tokens) for g in self._groups)
        finally:
            if not whole:  # not now, or something raised
                self._undo(child_id, row)
        if not whole:
            return False
        child = SequenceState(
            parent.num_prompt_tokens,
            row,
            token_ids,
            num_tokens=parent.num_tokens,
            num_cached_tokens=parent.num_tokens,
            pinned=parent.pinned,
            ran=True,  # it asked the prefix cache for nothing
        )
        child.chain = self._chain(format, child, cache_salt)
        self._sequences[child_id] = child
        return True

    def store(self, seq_id: str, num_new: int) -> None:
        """Count `num_new` more tokens as stored, let full exact pages be found, and give back what
        has left a window."""
        state = self._sequences[seq_id]
        state.num_tokens += num_new
        state.ran = True
        if state.chain is not None and state.token_ids is not None:
            known = min(state.num_tokens, len(state.token_ids))
            state.chain.extend(state.token_ids, known)
            for group in self._groups:
                group.publish_exact(seq_id, state.chain, known)
        for group in self._groups:
            group.slide(seq_id, state.num_tokens)

    def remove(self, seq_id: str, *, forget: bool) -> None:
        """Release a sequence's slots and row; `forget` lets nobody find what it stored."""
        state = self._sequences.pop(seq_id)
        for group in self._groups:
            if forget:
                group.forget(seq_id, state.chain)
            group.free(seq_id, state.chain)
        self._free_rows.append(state.row)

    def check_integrity(self) -> None:
        """Raise PoolError unless rows and groups agree with the sequences."""
        rows = [state.row for state in self._sequences.values()]
        if sorted(rows + self._free_rows) != list(range(self._num_rows)):
            raise PoolError("a table row is lost or held twice")
        for group in self._groups:
            group.check_integrity()
            if set(group.sequences) != set(self._sequences):
                raise PoolError("a group and the cache hold different sequences")
