"""The bytes of a token behind other tokens: of text, log-probabilities, stops and echoes."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from spectral_paged.grammar import Vocabulary

# Decoders that read a token in the light of the token before it, not only of whether there is one.
LOOKS_BACK = {"BPEDecoder", "CTC"}
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
MAX_CHARACTER_BYTES = 4  # of UTF-8
UTF8 = codecs.getincrementaldecoder("utf-8")


class TokenBytes:
    """Knows the bytes that each token adds to a text.

    Tokenizers tell texts of token lists only. What a token adds is what its text behind another
    token has more, so the space of ` word` is kept where something precedes it. A token whose
    text is no UTF-8 by itself is a part of a character: its bytes are in its spelling.

    Args:
        tokenizer: of transformers, fast or slow.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._known = lru_cache(maxsize=1 << 17)(self._find)

    def of(self, token_id: int, behind: int | None) -> bytes:
        """Return the bytes of a token, special tokens spelled out; none if its id is unknown.

        Args:
            behind: the token before it in the text; None: it begins the text.
        """
        return self._known(token_id, self._context(behind)) or b""

    def shown(
        self, token_id: int, behind: int | None, *, skip_special_tokens: bool
    ) -> bytes | None:
        """Return the bytes of a token as `of` does, or None if the text leaves the token out."""
        if skip_special_tokens and token_id in self._special:
            return None
        return self._known(token_id, self._context(behind))

    def vocabulary(self, least: int) -> list[bytes]:
        """Return the bytes of all tokens behind other text; none of special and unknown ones.

        Args:
            least: the fewest tokens to return.
        """
        backend = self._backend
        known = len(self._tokenizer) if backend is None else backend.get_vocab_size()
        ids = range(max(known, least))
        if backend is None:
            slow = (self.shown(i, self._anchor, skip_special_tokens=True) for i in ids)
            return [data or b"" for data in slow]
        spellings = {token_id: text for text, token_id in backend.get_vocab(True).items()}
        shown = [i for i in ids if i in spellings and i not in self._special]
        found = [b""] * len(ids)
        anchor = self._anchor
        before = [] if anchor is None else [anchor]
        lead = "" if anchor is None else self._decode(before)
        texts = backend.decode_batch([[*before, i] for i in shown], skip_special_tokens=False)
        for token_id, text in zip(shown, texts, strict=True):
            text = text[len(lead) :] if text.startswith(lead) else self._decode([token_id])
            found[token_id] = self._bytes_of(text, spellings[token_id])
        return found

    def grammar_vocabulary(self, least: int, ends: Sequence[int]) -> Vocabulary:
        """Return the tokens that a text may have; those that end it have none.

        Args:
            least: the fewest tokens to return.
            ends: ids of tokens that end a text.
        """
        tokens = self.vocabulary(least)
        for token in ends:
            tokens[token] = b""
        return Vocabulary(tokens, self.encode)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special ones."""
        if self._backend is not None:  # which threads may share
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def joined(self, token_id: int, behind: int) -> bytes | None:
        """Return the bytes of an added token behind another without spaces; None of others."""
        if token_id not in self._added or behind not in self._added:
            return None
        return self._added[token_id].encode()

    def join(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> bytes:
        """Return the bytes of a text that the tokens begin."""
        behind, parts = None, []
        for token_id in token_ids:
            data = self.shown(token_id, behind, skip_special_tokens=skip_special_tokens)
            if data is not None:
                parts.append(data)
                behind = token_id
        return b"".join(parts)

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text that the tokens begin, without a character that they leave unfinished."""
        data = self.join(token_ids, skip_special_tokens=skip_special_tokens)
        return UTF8("replace").decode(data)

    def places(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
        """Return where in the text that the tokens begin the character of each token begins."""
        utf8, length, behind, found = UTF8("replace"), 0, None, []
        for token_id in token_ids:
            data = self.shown(token_id, behind, skip_special_tokens=skip_special_tokens)
            found.append(length + chars_before(utf8, data))
            if data is not None:
                length += len(utf8.decode(data))
                behind = token_id
        return found

    def tail(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> list[int]:
        """Return the last shown tokens, enough for any character that they leave unfinished."""
        found: list[int] = []
        for token_id in reversed(token_ids):
            shown = self.shown(token_id, None, skip_special_tokens=skip_special_tokens)
            if shown is not None:
                found.append(token_id)
            if len(found) == MAX_CHARACTER_BYTES:
                break
        return found[::-1]

    # ---- the tokenizer -------------------------------------------------------------------

    def _find(self, token_id: int, behind: int | None) -> bytes | None:
        spelling = self._spelling(token_id)
        if spelling is None:
            return None
        text = self._decode([token_id])
        if behind is not None:
            before, both = self._decode([behind]), self._decode([behind, token_id])
            if both.startswith(before):
                text = both[len(before) :]
        return self._bytes_of(text, spelling)

    @staticmethod
    def _bytes_of(text: str, spelling: str) -> bytes:
        """Return the bytes of a token whose text may be a part of a character."""
        if "\ufffd" in text:
            data = spelled_bytes(spelling)
            if data is not None:
                return data
        return text.encode()

    def _context(self, behind: int | None) -> int | None:
        """Return a token that stands for all that the text may have before the next one."""
        return behind if behind is None or self._looks_back else self._anchor

    def _decode(self, token_ids: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(token_ids, skip_special_tokens=False))
        return str(
            self._tokenizer.decode(
                token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _spelling(self, token_id: int) -> str | None:
        """Return a token as the vocabulary has it, or None if it does not have it."""
        if self._backend is not None:
            return self._backend.id_to_token(token_id)
        if token_id >= len(self._tokenizer):
            return None
        return self._tokenizer.convert_ids_to_tokens(token_id)

    @cached_property
    def _special(self) -> frozenset[int]:
        if self._backend is None:
            return frozenset(self._tokenizer.all_special_ids)
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _added(self) -> dict[int, str]:
        added = self._tokenizer.added_tokens_decoder
        return {token_id: token.content for token_id, token in added.items()}

    @cached_property
    def _looks_back(self) -> bool:
        decoder = None if self._backend is None else self._backend.decoder
        if decoder is None:
            return False
        described = json.loads(decoder.__getstate__())
        kinds = {part["type"] for part in (described, *described.get("decoders", ()))}
        return not kinds.isdisjoint(LOOKS_BACK)

    @cached_property
    def _anchor(self) -> int | None:
        """The first token of plain letters or digits: whatever follows leaves its text as it is."""
        backend = self._backend
        size = len(self._tokenizer) if backend is None else backend.get_vocab_size()
        for token_id in range(size):
            spelling = self._spelling(token_id)
            if spelling and spelling.isascii() and spelling.isalnum():
                alone = self._decode([token_id])
                if alone and self._decode([token_id] * 2).startswith(alone):
                    return token_id
        return None


def chars_before(utf8: codecs.IncrementalDecoder, data: bytes | None) -> int:
    """Return the characters that begin before the one that `data` begins or goes on with.

    They are those of the bytes that wait in `utf8`: none, or as many U+FFFD as they become if
    `data` does not go on with them.
    """
    waiting, _ = utf8.getstate()
    if not waiting or not data:
        return 0
    return len((waiting + data[:1]).decode("utf-8", "replace")) - 1


def spelled_bytes(spelling: str) -> bytes | None:
    """Return the bytes that a token's spelling stands for, `<0xC3>` or byte-level, if it does."""
    byte = BYTE_TOKEN.fullmatch(spelling)
    if byte is not None:
        return bytes.fromhex(byte[1])
    values = [BYTE_OF.get(character) for character in spelling]
    return None if None in values else bytes(v for v in values if v is not None)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level spellings.

    Printable bytes are spelled as themselves, and the others in order as characters from 256 on.
    """
    own: list[str] = []
    others: list[str] = []
    for character in sorted(ByteLevel.alphabet()):
        (own if ord(character) < 256 else others).append(character)
    free = sorted(set(range(256)) - {ord(c) for c in own})
    return {c: ord(c) for c in own} | dict(zip(others, free, strict=True))


BYTE_OF = _byte_alphabet()
