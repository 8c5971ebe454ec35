"""Text of a growing completion: incremental detokenization and stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from spectral_paged.engine.stop_strings import stop_strings
from spectral_paged.engine.token_bytes import UTF8, TokenBytes, chars_before
from spectral_paged.outputs import Logprob


class OutputText:
    """Decodes a completion token by token and cuts its text at the first stop string.

    The text is what the prompt's tokens and the completion's say more than the prompt's alone.
    Bytes that are no UTF-8 become U+FFFD; those that may begin a character wait for the others.

    Args:
        tokens: the bytes of tokens; None: the text stays empty.
        prompt: the token ids before the completion.
        stop: strings that end the completion.
        keep_stop: the text ends with the stop string instead of before it.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: False spells an added token behind another without spaces.
    """

    def __init__(
        self,
        tokens: TokenBytes | None,
        *,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        keep_stop: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokens = tokens
        self._prompt: Sequence[int] | None = prompt  # None: it was read
        self._skip_special_tokens = skip_special_tokens
        self._keep_stop = keep_stop
        self._joins = not (skip_special_tokens or spaces_between_special_tokens)
        self._utf8 = UTF8("replace")
        self._behind: int | None = None  # the last token of the text, the prompt's included
        self._stops = stop_strings(tuple(stop)) if stop else None
        self._state = 0  # of the stops
        self.text = ""

    def append(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Add a token and return the stop string that ends the text with it, or None."""
        data = self._shown(token_id)
        if data is None:
            return None
        self._behind = token_id
        piece = self._utf8.decode(data)
        before = len(self.text)
        self.text += piece
        if self._stops is None:
            return None
        # only what this token completes may end the text: earlier stops came before `min_tokens`
        self._state, found = self._stops.feed(self._state, piece)
        if not found or not may_stop:
            return None
        at, stop = min(found)
        self.text = self.text[: before + at + self._keep_stop * len(stop)]
        return stop

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens to a text without stop strings."""
        parts = []
        for token_id in token_ids:
            data = self._shown(token_id)
            if data is not None:
                self._behind = token_id
                parts.append(data)
        self.text += self._utf8.decode(b"".join(parts))

    def finish(self) -> None:
        """End the text: a character that is not complete becomes U+FFFD."""
        if self._tokens is not None:
            self._read_prompt(self._tokens)
        self.text += self._utf8.decode(b"", True)

    def settled(self) -> str:
        """Return the text that no later stop string can remove."""
        held = 0
        if self._stops is not None and not self._keep_stop:
            held = self._stops.held(self._state)
        return self.text[:-held] if held else self.text

    def offset_of(self, token_id: int) -> int:
        """Return the place in the text of the character that the next token begins or goes on with.

        Args:
            token_id: the next token.
        """
        return len(self.text) + chars_before(self._utf8, self._shown(token_id))

    def logprob(self, token_id: int, logprob: float, rank: int) -> Logprob:
        """Return the entry of a candidate for the next token."""
        if self._tokens is None:
            return Logprob(logprob, rank, "")
        self._read_prompt(self._tokens)
        data = self._tokens.of(token_id, self._behind)
        return Logprob(logprob, rank, data.decode("utf-8", "replace"), data)

    def _shown(self, token_id: int) -> bytes | None:
        if self._tokens is None:
            return None
        self._read_prompt(self._tokens)
        if self._joins and self._behind is not None:
            joined = self._tokens.joined(token_id, self._behind)
            if joined is not None:
                return joined
        return self._tokens.shown(
            token_id, self._behind, skip_special_tokens=self._skip_special_tokens
        )

    def _read_prompt(self, tokens: TokenBytes) -> None:
        """Find what the completion goes on from; not before it begins, as a tokenizer may raise."""
        if self._prompt is None:
            return
        skip = self._skip_special_tokens
        tail = tokens.tail(self._prompt, skip_special_tokens=skip)
        if tail:
            self._behind = tail[-1]
            self._utf8.decode(tokens.join(tail, skip_special_tokens=skip))
        self._prompt = None
