"""Control tokens direct a model, and text of messages must not become one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from spectral_paged.errors import refusal

# A code point that Unicode keeps for use inside of programs. It stands where a control token would
# be read, and goes when the text around it is normalized, which is after control tokens are found.
MARK = "\ufdd0"


class ControlTokens:
    """Knows the control tokens of a tokenizer, and encodes text in which their names are text.

    They are its special tokens (`<|im_start|>`), and the end tokens among its added ones, but for
    those of one character, which no text could do without. The text of a message that spells one
    gets marks, so a template's own tokens are the only ones left.

    Args:
        tokenizer: of transformers, fast or slow; its tokens are read with the first conversation.
        end_tokens: ids that end a completion.
    """

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
        self._end_tokens = frozenset(end_tokens)

    def marked(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]] | None:
        """Return messages with marks where their text would be read as control tokens.

        None: nothing needs a mark.

        Raises:
            InvalidRequestError: the text of a message has a control token which this tokenizer
                cannot read as text.
        """
        found = [
            {
                key: text if key == "role" else self._mark(text, f"messages.{place}.{key}")
                for key, text in message.items()
            }
            for place, message in enumerate(messages)
        ]
        if found == list(messages) and not self._in_normalized(messages):
            return None
        return found

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text with marks, which have no tokens themselves."""
        return list(self._unmarking.encode_batch([text], add_special_tokens=False)[0].ids)

    def _mark(self, text: str, where: str) -> str:
        spelled = [t for t in self._spellings if t[:2] in text and t in text]
        for token in spelled:
            if self._backend is None:
                raise refusal(
                    f"{where} has the control token {token!r}, which this tokenizer cannot read "
                    "as text: leave it out, or allow_special_tokens",
                    where,
                )
            while token in text:  # again where it overlaps itself
                text = text.replace(token, f"{token[0]}{MARK}{token[1:]}")
        if self._backend is None or not text.strip():
            return text
        # a template, or the next message, may go on with what an end of the text begins; spaces
        # stay at the ends, because templates strip them
        head, core, tail = text.partition(text.strip())
        inside = len(text) < self._longest and any(text in token for token in self._spellings)
        ends = range(1, self._longest)
        if inside or any(text[-size:] in self._beginnings for size in ends):
            core = f"{core}{MARK}"
        if inside or any(text[:size] in self._endings for size in ends):
            core = f"{MARK}{core}"
        return f"{head}{core}{tail}"

    def _in_normalized(self, messages: Sequence[Mapping[str, str]]) -> bool:
        """Return whether a text spells a control token that is looked for in normalized text."""
        if not self._normalized or self._backend is None or self._backend.normalizer is None:
            return False
        normalize = self._backend.normalizer.normalize_str
        names = [normalize(token.content) for token in self._normalized]
        texts = [normalize(text) for message in messages for text in message.values()]
        return any(name in text for name in names for text in texts)

    @cached_property
    def _tokens(self) -> list[AddedToken]:
        added: Mapping[int, AddedToken] = self._tokenizer.added_tokens_decoder
        control = [t for i, t in added.items() if t.special or i in self._end_tokens]
        return [token for token in control if len(token.content) > 1]

    @cached_property
    def _spellings(self) -> list[str]:
        return [token.content for token in self._tokens]

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._spellings), default=0)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(t[:size] for t in self._spellings for size in range(1, len(t)))

    @cached_property
    def _endings(self) -> frozenset[str]:
        return frozenset(t[size:] for t in self._spellings for size in range(1, len(t)))

    @cached_property
    def _normalized(self) -> list[AddedToken]:
        return [token for token in self._tokens if token.normalized]

    @cached_property
    def _unmarking(self) -> Tokenizer:
        """A copy that drops marks when it normalizes text; made when a text first has some."""
        assert self._backend is not None
        copy = Tokenizer.from_str(self._backend.to_str())
        unmark = normalizers.Replace(MARK, "")
        own = self._backend.normalizer
        copy.normalizer = unmark if own is None else normalizers.Sequence([unmark, own])
        copy.no_truncation()
        copy.no_padding()
        for token in self._normalized:  # found in the text as it is, before marks are gone
            token = AddedToken(
                token.content,
                normalized=False,
                special=token.special,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
            copy.add_special_tokens([token]) if token.special else copy.add_tokens([token])
        return copy
