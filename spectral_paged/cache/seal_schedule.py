"""The seal schedule spreads seals over the steps before queries see their blocks as pages.

A block is complete `hot_tokens` tokens before it is visible. Sequences of one length complete
blocks in the same step; if they sealed at once, that step would take many times as long as others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spectral_paged.cache.sequence_slots import SequenceSlots
from spectral_paged.cache.sequences import SequenceState


@dataclass(frozen=True, slots=True)
class DueBlock:
    """A block to seal, with its sequence and that sequence's slots, which include its page's."""

    sequence: SequenceState
    slots: SequenceSlots
    block: int


def blocks_to_seal(sequences: Iterable[SequenceState], place: int) -> list[DueBlock]:
    """The blocks to seal after a step of these sequences, in the group at `place` of their slots.

    Sequences with an error are left out. Blocks are sealed ahead only while a sequence generates.
    """
    due: list[DueBlock] = []
    complete: dict[str, DueBlock] = {}
    waiting = []
    for state in sequences:
        if state.error is not None:
            continue
        slots = state.slots[place]
        now = slots.due(state.visible_blocks())
        due += [DueBlock(state, slots, block) for block in now]
        block = None if now else slots.complete(state.num_tokens)
        if block is not None and state.num_tokens >= state.num_prompt_tokens:
            complete[state.seq_id] = DueBlock(state, slots, block)
            slack = state.rules.visibility.visible_from(block) - state.num_tokens
            waiting.append((slack, state.seq_id, block))
    ahead = [complete[seq_id] for seq_id, _ in sealed_ahead(waiting)]
    return due + [item for item in ahead if item.slots.reserve_page(item.block)]


def sealed_ahead(waiting: Iterable[tuple[int, str, int]]) -> list[tuple[str, int]]:
    """The complete blocks to seal ahead in this step, as `(sequence, block)`.

    They are the fewest that let every later step seal no more. With blocks in order of deadline,
    the first i must be sealed in the `slack` steps of the i-th, so a step takes the largest
    `i / slack`, rounded up.

    Args:
        waiting: `(slack, sequence, block)`, `slack` the number of steps until the block is visible;
            only a sequence's next block, so hot windows over 512 tokens are evened out less.
    """
    ordered = sorted(waiting)
    rate = max((-(-i // max(slack, 1)) for i, (slack, _, _) in enumerate(ordered, 1)), default=0)
    return [(seq_id, block) for _, seq_id, block in ordered[:rate]]
