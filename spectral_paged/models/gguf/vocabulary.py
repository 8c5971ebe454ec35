"""The vocabulary of a GGUF file: tokens, their kinds and scores, and the special tokens.

Defaults, and tokens known by their text, are those of llama.cpp, because files are made for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from spectral_paged.errors import CorruptFileError, UnsupportedModelError, shown
from spectral_paged.models.gguf.keys import REMEDY, Keys
from spectral_paged.models.gguf.pre_tokenizers import ADDS_BOS

MODELS = ("llama", "gpt2")  # SentencePiece's BPE with scores, and byte-level BPE with merges
# Tokens that end a turn or a text, of whatever kind the file makes them.
ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
    "<｜end▁of▁sentence｜>",
}
# Tokens of code models that end the filling in of a file, by their role.
FILL_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
FILLS = {
    *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>"),
    *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>"),
    *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>"),
    *("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    *("<|prefix|>", "<|suffix|>", "<|middle|>"),
}.union(*FILL_ENDS.values())
CHANNELS = {"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"}
# Where all of a group are ends, the named token is not: it ends a message, and others follow.
NO_END = (
    ({"<|return|>", "<|call|>"}, "<|end|>"),
    ({"<|calls|>", "<|flush|>"}, "<|end|>"),
    ({"<|call|>", "<|flush|>"}, "<|end|>"),
    ({"<|tool_response>"}, "</s>"),
)
SPECIAL_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "fim_pad", "fim_rep", "fim_sep")
# Special tokens that neither encode nor end a text.
OTHER_IDS = (
    "seperator",
    "separator",
    "mask",
    "cls",
    "prefix",
    "suffix",
    "middle",
    "fim_pre",
    "fim_suf",
    "fim_mid",
)


class Kind(IntEnum):
    """Token types of GGUF."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL = (Kind.CONTROL, Kind.UNKNOWN)  # left out of text
FOUND_FIRST = (*SPECIAL, Kind.USER_DEFINED)  # one token each, wherever their text stands


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The parts of a GGUF file from which a tokenizer is built.

    Attributes:
        model: "llama" or "gpt2".
        pre: the rule that cuts text into words before merging; only for gpt2.
        scores: a score for each token; only for llama.
        merges: "left right"; only for gpt2.
        ids: ids of special tokens by role, such as "bos"; roles without a token are left out.
        ends: every token that ends a text, ascending; `eos` is one.
        space_prefix: a space is put before text, at the start and after each special token.
        strips: special tokens take the blanks behind them (Phi 3).
        templates: chat templates by name; "default" is the one without a name.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[Kind]
    scores: np.ndarray[Any, Any] | None
    merges: list[str]
    ids: dict[str, int]
    ends: tuple[int, ...]
    adds_bos: bool
    adds_eos: bool
    space_prefix: bool
    strips: bool
    templates: dict[str, str]

    @classmethod
    def read(cls, keys: Keys) -> Vocabulary:
        """Read the vocabulary from the keys below `tokenizer.`, all of which are used.

        Raises:
            CorruptFileError: lists differ in length, a token comes twice, or an id is too large.
            UnsupportedModelError: the tokenizer is of another kind.
        """
        model = keys.string("tokenizer.ggml.model")
        if model not in MODELS:
            raise UnsupportedModelError(
                f"{keys.path}: tokenizer.ggml.model is {shown(model)}; served are "
                f"{' and '.join(MODELS)}: {REMEDY}"
            )
        is_bpe = model == "gpt2"
        pre = keys.string("tokenizer.ggml.pre", "default")
        tokens, kinds = _tokens(keys)
        ids = _special_ids(keys, tokens, is_bpe)
        ends = _ends(tokens, kinds, ids)
        keys.expect("tokenizer.ggml.add_sep_token", False, why="a separator follows every text")
        keys.expect("tokenizer.ggml.remove_extra_whitespaces", False, why="text loses blanks")
        keys.skip("tokenizer.ggml.token_type_count")  # for embeddings of BERT
        keys.skip("tokenizer.huggingface.json", "tokenizer.rwkv.world")  # llama.cpp reads neither
        adds_bos = keys.boolean("tokenizer.ggml.add_bos_token", not is_bpe or pre in ADDS_BOS)
        adds_eos = keys.boolean("tokenizer.ggml.add_eos_token", False)
        for adds, role in ((adds_bos, "bos"), (adds_eos, "eos")):
            if adds and role not in ids:
                raise CorruptFileError(
                    f"{keys.path}: tokenizer.ggml.add_{role}_token is true, and there is no "
                    f"{role}_token_id: fetch the file again, or {REMEDY}"
                )
        space_prefix = keys.boolean("tokenizer.ggml.add_space_prefix", True)
        name = keys.string("general.name", "").lower()
        return cls(
            model=model,
            pre=pre,
            tokens=tokens,
            kinds=kinds,
            scores=_scores(keys, len(tokens), is_bpe),
            merges=_merges(keys, is_bpe),
            ids=ids,
            ends=ends,
            adds_bos=adds_bos,
            adds_eos=adds_eos,
            space_prefix=space_prefix and not is_bpe,
            strips="phi-3" in name or "phi3" in name,
            templates=_templates(keys),
        )


def _tokens(keys: Keys) -> tuple[list[str], list[Kind]]:
    found = keys.strings("tokenizer.ggml.tokens")
    if not found:
        raise CorruptFileError(
            f"{keys.path} has no tokenizer.ggml.tokens: fetch the file again, or {REMEDY}"
        )
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(found)]
    if len(set(tokens)) < len(tokens):
        seen: dict[str, int] = {}
        at, text = next((i, t) for i, t in enumerate(tokens) if seen.setdefault(t, i) != i)
        raise CorruptFileError(
            f"{keys.path}: tokens {seen[text]} and {at} are both {shown(text)}: fetch the file "
            f"again, or {REMEDY}"
        )
    types = _one_each(keys, "tokenizer.ggml.token_type", len(tokens))
    kinds = [Kind.NORMAL] * len(tokens)
    if types is not None:
        known = {int(kind): kind for kind in Kind}
        kinds = [known.get(number, Kind.UNDEFINED) for number in types.tolist()]
    for i, text in enumerate(tokens):
        if text in ENDS or text in FILLS:
            kinds[i] = Kind.CONTROL
        elif text in CHANNELS:
            kinds[i] = Kind.USER_DEFINED
    return tokens, kinds


def _one_each(keys: Keys, key: str, count: int) -> np.ndarray[Any, Any] | None:
    """The list of numbers, one for each token, under a key; None where the key is missing."""
    found = keys.vector(key)
    if found is not None and len(found) != count:
        raise CorruptFileError(
            f"{keys.path}: {key} has {len(found)} numbers for {count} tokens: fetch the file "
            f"again, or {REMEDY}"
        )
    return found


def _scores(keys: Keys, count: int, is_bpe: bool) -> np.ndarray[Any, Any] | None:
    found = _one_each(keys, "tokenizer.ggml.scores", count)
    if is_bpe:
        return None
    if found is None or not np.isfinite(found).all():
        lacks = "is missing" if found is None else "has values that are no numbers"
        raise CorruptFileError(
            f"{keys.path}: tokenizer.ggml.scores {lacks}, and without it nothing says which pieces "
            f"are merged first: fetch the file again, or {REMEDY}"
        )
    return found


def _merges(keys: Keys, is_bpe: bool) -> list[str]:
    found = keys.strings("tokenizer.ggml.merges")
    if is_bpe and found is None:
        raise CorruptFileError(
            f"{keys.path} has no tokenizer.ggml.merges: fetch the file again, or {REMEDY}"
        )
    return found or []


def _special_ids(keys: Keys, tokens: list[str], is_bpe: bool) -> dict[str, int]:
    """Ids of special tokens by role; files of the llama model may omit SentencePiece's own."""
    found = {} if is_bpe else {"bos": 1, "eos": 2, "unknown": 0}
    found = {role: i for role, i in found.items() if i < len(tokens)}
    for role in (*SPECIAL_IDS, *OTHER_IDS):
        key = f"tokenizer.ggml.{role}_token_id"
        if key not in keys:
            continue
        number = keys.integer(key)
        if number >= len(tokens):
            raise CorruptFileError(
                f"{keys.path}: {key} is {number}, and there are {len(tokens)} tokens: fetch the "
                f"file again, or {REMEDY}"
            )
        found[role] = number
    suppressed = keys.vector("tokenizer.ggml.suppress_tokens")
    if suppressed is not None and len(suppressed):
        raise UnsupportedModelError(
            f"{keys.path}: tokenizer.ggml.suppress_tokens names tokens that are never to come, "
            f"which this version does not serve: {REMEDY}"
        )
    return found


def _ends(tokens: list[str], kinds: list[Kind], ids: dict[str, int]) -> tuple[int, ...]:
    """The ids of all tokens that end a text, known by their role or by their text."""
    by_text = {text: i for i, text in enumerate(tokens) if text in ENDS or text in FILLS}
    ends = {i for text, i in by_text.items() if text in ENDS}
    for role, texts in FILL_ENDS.items():
        own = [ids[role]] if role in ids else [by_text[t] for t in texts if t in by_text]
        ends.update(own)
    for together, not_one in NO_END:
        if all(by_text.get(text) in ends for text in together) and not_one in by_text:
            ends.discard(by_text[not_one])
            kinds[by_text[not_one]] = Kind.USER_DEFINED
    ends.update(ids[role] for role in ("eos", "eot", "eom") if role in ids)
    return tuple(sorted(ends))


def _templates(keys: Keys) -> dict[str, str]:
    """Chat templates by name."""
    prefix = "tokenizer.chat_template"
    keys.skip("tokenizer.chat_templates")  # names of those that follow
    found = {"default": keys.string(prefix)} if prefix in keys else {}
    named = keys.below(f"{prefix}.")
    return found | {key.removeprefix(f"{prefix}."): keys.string(key) for key in named}
