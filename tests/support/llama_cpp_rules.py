"""llama.cpp's rules from text to token ids, written plainly from their description.

They do not use the `tokenizers` library: in a list of symbols, the best neighbours are joined until
none can be. This takes quadratic time, which does not matter for the short texts of tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import regex
from transformers.convert_slow_tokenizer import bytes_to_unicode

LETTERS = bytes_to_unicode()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

Ids = dict[str, int]


def fragments(text: str, special: Sequence[str]) -> list[tuple[bool, str]]:
    """Pieces `(is special, piece)` of text cut at special tokens, the longest token first."""
    pieces = [(False, text)]
    for token in sorted(special, key=lambda token: -len(token.encode())):
        cut = []
        for is_special, piece in pieces:
            if is_special:
                cut.append((True, piece))
                continue
            for number, part in enumerate(piece.split(token)):
                cut += [(True, token)] * (number > 0) + [(False, part)] * bool(part)
        pieces = cut
    return pieces


def joined(symbols: list[str], worth: Callable[[str, str], float | None]) -> list[str]:
    """Join the two neighbours of the greatest worth, the leftmost of equals, until none has one."""
    while True:
        pairs = [(worth(a, b), -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:]))]
        best = max((pair for pair in pairs if pair[0] is not None), default=None)
        if best is None:
            return symbols
        at = -best[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def sentencepiece_ids(
    text: str, ids: Ids, scores: Sequence[float], special: Sequence[str], *, space_prefix: bool
) -> list[int]:
    """Ids of the "llama" model: unions by score, and bytes for symbols that are no token."""

    def worth(left: str, right: str) -> float | None:
        token = ids.get(left + right)
        return None if token is None else scores[token]

    found = []
    after_special = True
    for is_special, piece in fragments(text, special):
        if is_special:
            found.append(ids[piece])
        else:
            spaced = (" " if space_prefix and after_special else "") + piece
            for symbol in joined(list(spaced.replace(" ", "▁")), worth):
                if symbol in ids:
                    found.append(ids[symbol])
                else:
                    found += [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
        after_special = is_special
    return found


def words(text: str, expressions: Sequence[str]) -> list[str]:
    """Words of text cut by each expression in turn: the matches and the text between them."""
    pieces = [text]
    for expression in expressions:
        cut = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(expression, piece):
                cut += [piece[end : match.start()], match[0]]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


def byte_level_ids(
    text: str,
    ids: Ids,
    merges: Sequence[str],
    special: Sequence[str],
    expressions: Sequence[str],
    *,
    whole_words: bool = False,
) -> list[int]:
    """Ids of the "gpt2" model: merges by rank inside words of letters that stand for bytes."""
    ranks = {}
    for rank, merge in enumerate(merges):
        cut = merge.find(" ", 1)
        ranks.setdefault((merge[:cut], merge[cut + 1 :]), rank)

    def worth(left: str, right: str) -> float | None:
        rank = ranks.get((left, right))
        return None if rank is None else -rank

    found = []
    for is_special, piece in fragments(text, special):
        if is_special:
            found.append(ids[piece])
            continue
        for word in words(piece, expressions):
            letters = "".join(LETTERS[byte] for byte in word.encode())
            if whole_words and letters in ids:
                found.append(ids[letters])
                continue
            for symbol in joined(list(letters), worth):
                found += [ids[s] for s in ([symbol] if symbol in ids else symbol) if s in ids]
    return found
