"""The tokens that a grammar chooses from, as llguidance asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Vocabulary:
    """The bytes of each token behind other text, and the tokens of a text.

    Where only one text may follow, llguidance allows the token that the tokenizer would take there.

    Args:
        tokens: bytes by token id; b"" for tokens that no text has.
        encode: returns a text's token ids, without special ones.
    """

    def __init__(self, tokens: Sequence[bytes], encode: Callable[[str], Sequence[int]]) -> None:
        self.num_tokens = len(tokens)
        self.tokens = [*tokens, b"<end>"]  # of no text; it stands for the end
        self.bos_token_id = None
        self.eos_token_id = self.num_tokens
        self.special_token_ids = [self.num_tokens]
        self._encode = encode
        self._ids = {data: token for token, data in reversed(list(enumerate(tokens))) if data}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Return the token ids of a text: the tokenizer's where they say it byte for byte."""
        try:
            found = list(self._encode(text.decode()))
        except UnicodeDecodeError:
            return self._longest_first(text)
        if b"".join(self.tokens[token] for token in found) != text:
            return self._longest_first(text)
        return found

    def _longest_first(self, text: bytes) -> list[int]:
        found: list[int] = []
        place = 0
        while place < len(text):
            for size in range(min(self._longest, len(text) - place), 0, -1):
                token = self._ids.get(text[place : place + size])
                if token is not None:
                    found.append(token)
                    place += size
                    break
            else:
                return found  # no token says what comes next
        return found
