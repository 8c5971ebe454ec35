"""Control tokens direct a model, and text of messages must not become one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers

from spectral_paged.errors import refusal

# A code point that Unicode keeps for use inside of programs. It stands where a control token would
# be read, and goes when the text around it is normalized, which is after control tokens are found.
MARK = "\ufdd0"


# roles of messages and the type of tools, which templates compare
WORDS = ("system", "user", "assistant", "tool", "function")
Parts = Mapping[str, Any]  # what a template takes: lists of messages and of tools, by name


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in lists and objects, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


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

    def marked(self, parts: Parts) -> Parts | None:
        """Return messages or tools with marks where their text would be read as control tokens.

        None: nothing needs a mark.

        Raises:
            InvalidRequestError: the text of a message has a control token which this tokenizer
                cannot read as text.
        """
        found = {name: self._mark_all(value, name) for name, value in parts.items()}
        if found == parts and not self._in_normalized(parts):
            return None
        return found

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text with marks, which have no tokens themselves."""
        return list(self._unmarking.encode_batch([text], add_special_tokens=False)[0].ids)

    def _mark_all(self, value: Any, where: str) -> Any:
        """Mark every text in lists and objects, but for words that templates compare."""
        if isinstance(value, str):
            return self._mark(value, where)
        if isinstance(value, Mapping):
            return {
                self._mark(str(key), where): part
                if key in ("role", "type") and part in WORDS
                else self._mark_all(part, f"{where}.{key}")
                for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._mark_all(part, f"{where}.{place}") for place, part in enumerate(value)]
        return value

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

    def _in_normalized(self, parts: Parts) -> bool:
        """Return whether a text spells a control token that is looked for in normalized text."""
        if not self._normalized or self._backend is None or self._backend.normalizer is None:
            return False
        normalize = self._backend.normalizer.normalize_str
        names = [normalize(token.content) for token in self._normalized]
        texts = [normalize(text) for text in _texts(parts)]
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
