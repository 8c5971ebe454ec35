"""Small tokenizers of the kinds that models have, as their files describe them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = ("▁Paris", "▁is", "is", "▁the", "true", "▁▁", "é", "日本")


def byte_level(words=("ĠParis", "Ġis", "Ã©", "æĹ", "¥æ")):
    """GPT-2's kind: a token for each byte, and some of several, which split characters too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *words])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    made.add_tokens([" added", "東京"])
    return made


def byte_fallback(style="llama2", num_bytes=256, words=WORDS):
    """SentencePiece's kind: `▁` for a space, and a token for each byte that has no other.

    Args:
        style: gemma; llama2, whose texts lose a space at their beginning; or metaspace, likewise.
        num_bytes: tokens of the highest bytes.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256 - num_bytes, 256))]
    tokens += ["▁", *"abcTé", "\ufffd", *words]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    spaces, fallback = decoders.Replace("▁", " "), decoders.ByteFallback()
    backend.decoder = {
        "llama2": decoders.Sequence([spaces, fallback, decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        "gemma": decoders.Sequence([spaces, fallback, decoders.Fuse()]),
        "metaspace": decoders.Sequence([fallback, decoders.Metaspace()]),
    }[style]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def whole_words(kind):
    """Kinds without bytes: `wordpiece`, `suffix` (a word's end is marked), `plain` (no decoder)."""
    tokens = ["[UNK]", "the", "cat", "##s", "##ing", ".", "sat</w>", "s</w>", "mat", "é"]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    if kind == "wordpiece":
        backend.decoder = decoders.WordPiece()
    elif kind == "suffix":
        backend.decoder = decoders.BPEDecoder("</w>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]")


class Slow:
    """A tokenizer without a Rust backend: transformers' names over a fast one's texts."""

    def __init__(self, fast):
        self._fast = fast
        self.all_special_ids = fast.all_special_ids

    def __len__(self):
        return len(self._fast)

    def convert_ids_to_tokens(self, token_id):
        return self._fast.convert_ids_to_tokens(token_id)

    def decode(self, token_ids, **options):
        return self._fast.decode(token_ids, **options)
