"""The most text that so many tokens stand for, so that a longer one is refused unread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

PIECE = 1 << 16  # characters that are normalized at once, so that other threads run in between
PIECE_SLACK = 8  # characters that a cut may add to normalized text
SPLITS_AT_SPACES = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
KEEPS_ALL = {"ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Punctuation", "Split"}
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, slots=True)
class TextBound:
    """A bound on the characters of a text by the number of its tokens.

    Args:
        backend: the tokenizer.
        longest: characters of its longest token, in normalized text.
        counts_spaces: False where a token may take any number of spaces with it.
    """

    backend: Tokenizer
    longest: int
    counts_spaces: bool

    def exceeds(self, text: str, num_tokens: int) -> bool:
        """Return whether a text has more than `num_tokens` tokens whatever they are.

        Its end is not read once that is clear. False says nothing.
        """
        left = num_tokens * self.longest
        if len(text) <= left:
            return False
        normalizer = self.backend.normalizer
        if normalizer is None and self.counts_spaces:
            return True
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            if normalizer is not None:
                piece = normalizer.normalize_str(piece)
            if not self.counts_spaces:
                piece = "".join(piece.split())
            left -= max(0, len(piece) - PIECE_SLACK * (normalizer is not None))
            if left < 0:
                return True
        return False


def text_bound(tokenizer: Any) -> TextBound | None:
    """Return the bound of a tokenizer, or None if one of its tokens may stand for any text.

    Such are tokens for unknown words, and tokenizers that drop characters.
    """
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    vocabulary = backend.get_vocab()
    parts = list(_parts(backend.pre_tokenizer))
    kinds = {part["type"] for part in parts}
    drops = any(part.get("behavior") == "Removed" for part in parts)
    if drops or kinds - KEEPS_ALL - SPLITS_AT_SPACES or not _reads_all(backend, kinds, vocabulary):
        return None
    strips = any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
    counts_spaces = not strips and not kinds & SPLITS_AT_SPACES
    return TextBound(backend, max(map(len, vocabulary), default=0), counts_spaces)


def _reads_all(backend: Tokenizer, kinds: set[str], vocabulary: dict[str, int]) -> bool:
    """Return whether each character of a text has a token, or a part of one, to itself."""
    model: Any = backend.model
    if type(model).__name__ != "BPE":
        return False
    bytewise = kinds | {part["type"] for part in _parts(backend.normalizer)}
    if "ByteLevel" in bytewise:
        return vocabulary.keys() >= set(ByteLevel.alphabet())
    if model.byte_fallback and vocabulary.keys() >= set(BYTE_TOKENS):
        return True
    return model.unk_token is not None and not model.fuse_unk


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Yield the description of a component, or of each that a sequence is made of."""
    if component is None:
        return
    waiting = [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        inner = [*part.get("pretokenizers", ()), *part.get("normalizers", ())]
        waiting += inner
        if not inner:
            yield part
