"""Pinned spans are tokens of a prompt whose blocks are never sealed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectral_paged.errors import InvalidRequestError, shown
from spectral_paged.kernels.page.layout import BLOCK_TOKENS
from spectral_paged.pages import PageFormat

Spans = Sequence[tuple[int, int]]
MAX_PINNED_BLOCKS = 8  # tables have room for the exact pages of so many


def spans_of(value: Any) -> tuple[tuple[int, int], ...]:
    """A caller's pinned spans as pairs, checked for their form; None gives no span.

    Raises:
        InvalidRequestError: `value` is no list of pairs of integers.
    """
    if value is None:
        return ()
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        raise _no_spans(value)
    spans = []
    for span in value:
        if not isinstance(span, Sequence) or isinstance(span, str | bytes) or len(span) != 2:
            raise _no_spans(span)
        if any(isinstance(x, bool) or not isinstance(x, int) for x in span):
            raise _no_spans(span)
        spans.append((span[0], span[1]))
    return tuple(spans)


def _no_spans(value: Any) -> InvalidRequestError:
    return InvalidRequestError(
        f"pinned_spans has {shown(value)}: give a list of (start, end) token positions"
    )


def pinned_blocks(format: PageFormat, spans: Spans, num_prompt_tokens: int) -> tuple[int, ...]:
    """The blocks that `spans` touch, ascending; a span is `(start, end)` in token positions, end
    not included.

    Raises:
        InvalidRequestError: a span is malformed, empty or outside the prompt, or the spans touch
            more blocks than a sequence may pin.
    """
    blocks: set[int] = set()
    for start, end in spans_of(spans):
        if not 0 <= start < end <= num_prompt_tokens:
            raise InvalidRequestError(
                f"pinned span ({start}, {end}) does not lie in the prompt of {num_prompt_tokens} "
                "tokens: give (start, end) positions of prompt tokens, end not included"
            )
        first, last = (x - format.num_landmark_tokens for x in (start, end - 1))
        if last >= 0:
            blocks.update(range(max(first, 0) // BLOCK_TOKENS, last // BLOCK_TOKENS + 1))
    if not format.seals:
        return ()
    if len(blocks) > MAX_PINNED_BLOCKS:
        raise InvalidRequestError(
            f"the pinned spans touch {len(blocks)} blocks of {BLOCK_TOKENS} tokens; a sequence "
            f"pins at most {MAX_PINNED_BLOCKS}: pin less, or use kv_format='exact'"
        )
    return tuple(sorted(blocks))
