"""A transformers tokenizer with the same ids as llama.cpp's for a GGUF file's vocabulary."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from spectral_paged.errors import CorruptFileError, UnsupportedModelError, shown
from spectral_paged.models.gguf.keys import REMEDY
from spectral_paged.models.gguf.pre_tokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from spectral_paged.models.gguf.vocabulary import FOUND_FIRST, SPECIAL, Kind, Vocabulary

logger = logging.getLogger(__name__)

SPACE = "▁"
KEEPS_BLANKS = ("<unk>", "<s>", "<|endoftext|>")  # Phi 3's other special tokens strip blanks


def build_tokenizer(path: Path, vocabulary: Vocabulary) -> Any:
    """Build the tokenizer of a vocabulary, which never cuts a special token.

    Raises:
        CorruptFileError: a merge does not make a token.
        UnsupportedModelError: this version does not know the rule for words, or cannot give the
            same ids.
    """
    build = _byte_level if vocabulary.model == "gpt2" else _sentencepiece
    backend = build(path, vocabulary)
    backend.add_tokens(list(_added_tokens(vocabulary)))
    backend.post_processor = _post_processor(vocabulary)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{
            f"{name}_token": vocabulary.tokens[vocabulary.ids[role]]
            for name, role in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if role in vocabulary.ids
        },
    )
    if vocabulary.templates:
        templates = {name: _with_bos(t, vocabulary) for name, t in vocabulary.templates.items()}
        alone = list(templates) == ["default"]
        tokenizer.chat_template = templates["default"] if alone else templates
    check_tokenizer(path, vocabulary, tokenizer)
    return tokenizer


def _byte_level(path: Path, vocabulary: Vocabulary) -> Tokenizer:
    """BPE over bytes, each written as one letter, with the file's merges."""
    if vocabulary.pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.pre is {shown(vocabulary.pre)}; words are cut by "
            f"{', '.join(PRE_TOKENIZERS)}: {REMEDY}"
        )
    if vocabulary.pre == "default":
        logger.warning(
            "%s does not say how its tokenizer cuts text into words (tokenizer.ggml.pre); they are "
            "cut as llama.cpp does then, which may not be how the model was trained",
            path,
        )
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    merges = []
    for merge in vocabulary.merges:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise CorruptFileError(
                f"{path}: the merge {shown(merge)} of tokenizer.ggml.merges does not join two "
                f"tokens to a third: fetch the file again, or {REMEDY}"
            )
        merges.append((left, right))
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=merges, ignore_merges=vocabulary.pre in WHOLE_WORDS)
    )
    cuts = [
        pre_tokenizers.Split(Regex(expression), "isolated")
        for expression in PRE_TOKENIZERS[vocabulary.pre]
    ]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(path: Path, vocabulary: Vocabulary) -> Tokenizer:
    """BPE over characters, with spaces written as ▁ and merges by score; bytes are the fallback.

    SentencePiece joins the two neighbours whose union is the token of the highest score, so every
    way to cut a token in two is a merge, in the order of scores.
    """
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    unknown = vocabulary.tokens[vocabulary.ids["unknown"]] if "unknown" in vocabulary.ids else None
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=merges_by_score(path, vocabulary, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        backend.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = spaces
        backend.decoder = decoders.Sequence(plain)
    return backend


def merges_by_score(
    path: Path, vocabulary: Vocabulary, ids: dict[str, int]
) -> list[tuple[str, str]]:
    """Pairs of tokens whose union is a token, the union of the highest score first.

    Raises:
        UnsupportedModelError: merges in a fixed order could give other ids than SentencePiece,
            which joins the best neighbours, and of equals the leftmost.
    """
    assert vocabulary.scores is not None
    scores = vocabulary.scores.tolist()
    pairs = []
    for text, token in ids.items():
        if vocabulary.kinds[token] in FOUND_FIRST:  # found in text before anything is merged
            continue
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[token], left, right, token))
            elif _joins_a_letter(text, cut, left, right, vocabulary.kinds[token]):
                raise UnsupportedModelError(
                    f"{path}: token {token}, {shown(text)}, is made of a letter that is no token, "
                    f"which this version cannot join: {REMEDY}"
                )
    pairs.sort()
    tokens = vocabulary.tokens
    for _, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        if clash := _order_matters(list(group)):
            raise UnsupportedModelError(
                f"{path}: tokens {shown(tokens[clash[0]])} and {shown(tokens[clash[1]])} have the "
                "same score in tokenizer.ggml.scores, and where they overlap this version cannot "
                f"prefer the left one: {REMEDY}"
            )
    return [(tokens[left], tokens[right]) for _, left, right, _ in pairs]


def _joins_a_letter(text: str, cut: int, left: int | None, right: int | None, kind: Kind) -> bool:
    """Return whether SentencePiece would join a letter here that is not a token."""
    parts = (left is not None or cut == 1) and (right is not None or len(text) - cut == 1)
    return parts and kind is Kind.NORMAL


def _order_matters(pairs: list[tuple[float, int, int, int]]) -> tuple[int, int] | None:
    """Two tokens of one score where the end of one is the beginning of the other, or None."""
    if len({token for *_, token in pairs}) < 2:
        return None  # all pairs cut the same token
    begins: dict[int, int] = {}
    for _, left, _, token in pairs:
        begins.setdefault(left, token)
    for _, _, right, token in pairs:
        if begins.get(right, token) != token:
            return token, begins[right]
    return None


def _added_tokens(vocabulary: Vocabulary) -> Iterator[AddedToken]:
    """Tokens that are found in text before anything is merged."""
    for text, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind in FOUND_FIRST:
            strips = vocabulary.strips and text not in KEEPS_BLANKS
            yield AddedToken(text, normalized=False, special=kind in SPECIAL, rstrip=strips)


def _post_processor(vocabulary: Vocabulary) -> Any:
    """The processor that puts BOS before and EOS behind a text, where the file asks for it."""
    before = ["bos"] if vocabulary.adds_bos else []
    behind = ["eos"] if vocabulary.adds_eos else []
    roles = [
        {"id": role, "ids": [i := vocabulary.ids[role]], "tokens": [vocabulary.tokens[i]]}
        for role in (*before, *behind)
    ]
    one = [*before, "$A", *behind]
    two = [*one, *before, "$B", *behind]
    return processors.TemplateProcessing(single=one, pair=two, special_tokens=roles)


def _with_bos(template: str, vocabulary: Vocabulary) -> str:
    """A chat template that begins with BOS where every text does; llama.cpp adds it to chats."""
    if not vocabulary.adds_bos:
        return template
    bos = vocabulary.tokens[vocabulary.ids["bos"]]
    return template if "bos_token" in template or bos in template else "{{ bos_token }}" + template


def check_tokenizer(path: Path, vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Refuse a tokenizer that has other ids than the file, or cuts a special token.

    Raises:
        UnsupportedModelError: the message names the first token that differs.
    """
    tokens = vocabulary.tokens
    found = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    wrong = [i for i, (a, b) in enumerate(zip(found, tokens, strict=True)) if a != b]
    special = [i for i, kind in enumerate(vocabulary.kinds) if kind in FOUND_FIRST]
    if special and len(tokenizer) == len(tokens) and not wrong:
        cut = tokenizer([tokens[i] for i in special], add_special_tokens=False)["input_ids"]
        wrong = [i for i, ids in zip(special, cut, strict=True) if ids != [i]]
    if wrong or len(tokenizer) != len(tokens):
        what = f"token {wrong[0]}, {shown(tokens[wrong[0]])}," if wrong else "the vocabulary"
        raise UnsupportedModelError(
            f"{path}: {what} is not what a tokenizer made of the file has: {REMEDY}"
        )
