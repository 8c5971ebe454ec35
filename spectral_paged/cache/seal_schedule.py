"""When blocks are sealed: at the latest when queries see them as pages, and evenly before that.

A block is complete `hot_tokens` tokens before it is visible. Sequences of one length complete
theirs in the same step; sealed there and then, that step would take many times as long as others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.cache.sequences import SequenceState
from spectral_paged.cache.visibility import Visibility


@dataclass(frozen=True, slots=True)
class DueBlock:
    """A block to seal: whose it is, and its slots in the group; a page slot is held for it."""

    sequence: SequenceState
    slots: SequenceSlots
    block: int


def blocks_to_seal(
    sequences: Iterable[SequenceState], place: int, visibility: Visibility
) -> list[DueBlock]:
    """Blocks to seal after a step of these sequences, in the group at `place` of their slots.
    Sequences with an error are left out, and only while they generate do blocks go ahead."""
    due: list[DueBlock] = []
    complete: dict[str, DueBlock] = {}
    waiting = []
    for state in sequences:
        if state.error is not None:
            continue
        slots = state.slots[place]
        visible = visibility.visible_blocks(state.num_tokens, state.num_prompt_tokens)
        now = slots.due(visible)
        due += [DueBlock(state, slots, block) for block in now]
        block = None if now else slots.complete(state.num_tokens)
        if block is not None and state.num_tokens >= state.num_prompt_tokens:
            complete[state.seq_id] = DueBlock(state, slots, block)
            waiting.append((visibility.visible_from(block) - state.num_tokens, state.seq_id, block))
    ahead = [complete[seq_id] for seq_id, _ in sealed_ahead(waiting)]
    return due + [item for item in ahead if item.slots.reserve_page(item.block)]


def sealed_ahead(waiting: Iterable[tuple[int, str, int]]) -> list[tuple[str, int]]:
    """Of complete blocks those to seal in this step.

    The fewest that keep every later step as small: with the blocks in order of their deadline, the
    i-th of them (from 1) needs i of its `slack` steps, so a step takes the largest `i / slack`,
    rounded up.

    Args:
        waiting: `(slack, sequence, block)`, `slack` the steps that are left until it is visible;
            a sequence's next block alone, so hot windows over 512 tokens are evened out less.
    """
    ordered = sorted(waiting)
    rate = max((-(-i // max(slack, 1)) for i, (slack, _, _) in enumerate(ordered, 1)), default=0)
    return [(seq_id, block) for _, seq_id, block in ordered[:rate]]
