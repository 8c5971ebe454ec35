"""Streaming: the text and tokens that a request got since its last piece."""

from __future__ import annotations

from collections.abc import Iterator

from spectral_paged.engine.engine import Engine
from spectral_paged.outputs import RequestOutput, TextDelta


class TextDeltas:
    """Cuts the growing outputs of an engine's requests into pieces.

    Text that a later stop string could remove waits for a later piece.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # characters and tokens yielded, by request and completion; -1 characters: it has ended
        self._shown: dict[tuple[str, int], tuple[int, int]] = {}

    def of(self, output: RequestOutput, place: int) -> Iterator[TextDelta]:
        """Yield a piece of each completion that has new text, new tokens or an ending.

        Args:
            place: the prompt's index in its caller's list, for `prompt_index`.
        """
        for completion in output.outputs:
            key = (output.request_id, completion.index)
            first = completion.index == 0 and key not in self._shown
            num_chars, num_tokens = self._shown.get(key, (0, 0))
            if num_chars < 0:
                continue
            ended = completion.finish_reason is not None
            text = (
                completion.text
                if ended
                else self._engine.settled_text(output.request_id, completion.index)
            )
            tokens = completion.token_ids[num_tokens:]
            if not ended and not tokens and len(text) <= num_chars:
                continue
            self._shown[key] = (-1, 0) if ended else (len(text), len(completion.token_ids))
            tables, offsets = completion.logprobs, completion.text_offsets
            yield TextDelta(
                output.request_id,
                place,
                completion.index,
                text[num_chars:],
                list(tokens),
                completion.finish_reason,
                output.error,
                None if tables is None else tables[num_tokens:],
                None if offsets is None else offsets[num_tokens:],
                output.prompt_logprobs if first else None,
            )
