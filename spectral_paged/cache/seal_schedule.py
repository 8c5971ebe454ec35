"""When blocks are sealed: at the latest when queries see them as pages, and evenly before that.

A block is complete `hot_tokens` tokens before it is visible. Sequences of one length complete
theirs in the same step; sealed there and then, that step would take many times as long as others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spectral_paged.cache.layer_group import LayerGroup
from spectral_paged.cache.sequence_state import SequenceState
from spectral_paged.pages import PageFormat


def blocks_to_seal(
    group: LayerGroup, format: PageFormat, states: Mapping[str, SequenceState]
) -> list[tuple[str, int]]:
    """`(sequence, block)` pairs to seal after a step of these sequences; a page slot is held for
    each. Sequences with an error are left out, and only while they generate do blocks go ahead."""
    if not group.seals:
        return []
    due, waiting = [], []
    for seq_id, state in states.items():
        if state.error is not None:
            continue
        visible = format.visible_blocks(state.num_tokens, state.num_prompt_tokens)
        now = group.due(seq_id, visible)
        due += [(seq_id, block) for block in now]
        block = None if now else group.complete(seq_id, state.num_tokens)
        if block is not None and state.num_tokens >= state.num_prompt_tokens:
            waiting.append((format.visible_from(block) - state.num_tokens, seq_id, block))
    return due + [(s, b) for s, b in sealed_ahead(waiting) if group.reserve_page(s, b)]


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
