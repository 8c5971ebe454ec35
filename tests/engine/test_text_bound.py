"""A text is refused unread only if it cannot fit, and a long one that cannot fit is."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from spectral_paged.engine.prompt_encoder import PromptEncoder
from spectral_paged.engine.text_bound import PIECE, text_bound
from spectral_paged.errors import InvalidRequestError, PromptTooLongError
from support.small_tokenizers import Slow, byte_fallback, byte_level, whole_words


def with_parts(made, **parts):
    for name, part in parts.items():
        setattr(made.backend_tokenizer, name, part)
    return made


def stripping():
    made = byte_level()
    made.backend_tokenizer.add_special_tokens([AddedToken("<end>", rstrip=True, lstrip=True)])
    return made


SHRINKS = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" +"), " ")])
FULL = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "gemma": byte_fallback("gemma"),
    "shrinking": with_parts(byte_level(), normalizer=SHRINKS),
    "stripped": with_parts(byte_level(), normalizer=normalizers.Strip()),
    "prepended": with_parts(byte_fallback(), normalizer=normalizers.Prepend("▁")),
    "tokens that take spaces along": stripping(),
    "split at spaces": with_parts(
        byte_level(),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()]
        ),
    ),
    "a token for each unknown character": byte_fallback(num_bytes=0),
}
OPEN = {
    "unknown words": whole_words("plain"),
    "dropped characters": with_parts(
        byte_level(), pre_tokenizer=pre_tokenizers.Split("a", behavior="removed")
    ),
    "no token for some bytes": with_parts(byte_level(), pre_tokenizer=None),
    "without a backend": Slow(byte_level()),
}
PIECES = [
    "a",
    " ",
    "  ",
    "é",
    "e\u0301",
    "Paris",
    "日本",
    "東京",
    " added",
    "<end>",
    "\n",
    "ﬃ",
    "が",
]
TEXTS = st.lists(
    st.tuples(st.sampled_from(PIECES), st.integers(1, 60)), min_size=1, max_size=5
).map(lambda parts: "".join(piece * count for piece, count in parts))


@pytest.mark.parametrize("name", FULL)
@settings(max_examples=80)
@given(text=TEXTS, num_tokens=st.integers(0, 60))
def test_only_a_text_that_cannot_fit_exceeds_its_bound(name, text, num_tokens):
    bound = text_bound(FULL[name])
    if bound.exceeds(text, num_tokens):
        assert len(FULL[name](text, add_special_tokens=False)["input_ids"]) > num_tokens


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("size", [8, PIECE, 3 * PIECE + 1])
def test_a_text_far_above_its_bound_exceeds_it(name, size):
    bound = text_bound(FULL[name])
    text = "é" * (size * bound.longest * 2 + 1)
    assert bound.exceeds(text, size)
    assert not bound.exceeds(text, len(text))


@pytest.mark.parametrize("name", OPEN)
def test_a_tokenizer_with_tokens_for_any_text_has_no_bound(name):
    assert text_bound(OPEN[name]) is None


def test_a_text_that_cannot_fit_is_not_tokenized(monkeypatch):
    made = byte_level()
    encoder = PromptEncoder(made, None, 64)
    made.chat_template = "{{ messages[0].content }}"
    longest = max(map(len, made.get_vocab()))
    text = "a" * (63 * longest + 1)
    monkeypatch.setattr(type(made), "__call__", None)
    with pytest.raises(
        PromptTooLongError, match=f"{len(text)} characters, .* at most {longest}; with"
    ):
        encoder.encode(text)
    with pytest.raises(PromptTooLongError, match="max_model_len 64"):
        encoder.encode_chat([{"role": "user", "content": text}])
    with pytest.raises(PromptTooLongError, match="prompt has 64;"):
        encoder.encode(iter([-1] * 64))


def test_half_a_surrogate_pair_is_no_text():
    made = with_parts(byte_level(), normalizer=SHRINKS)
    made.chat_template = "{{ messages[0].content }}"
    encoder = PromptEncoder(made, None, 64)
    for size in (1, 100_000):
        with pytest.raises(InvalidRequestError, match="is not valid text"):
            encoder.encode("\ud800" * size)
        with pytest.raises(InvalidRequestError, match="is not valid text"):
            encoder.encode_chat([{"role": "user", "content": "\ud800" * size}])


def test_a_template_may_leave_long_texts_out():
    made = byte_level()
    made.chat_template = "{{ messages[-1].content }}"
    long, short = ({"role": "user", "content": text} for text in ("a" * 100_000, "ab"))
    encoder = PromptEncoder(made, None, 64)
    assert encoder.encode_chat([long, short]) == encoder.encode_chat([short])


def test_many_megabytes_are_refused_at_once():
    encoder = PromptEncoder(FULL["shrinking"], None, 8192)
    text = "e\u0301 " * (8 << 20)
    begin = time.process_time()
    with pytest.raises(PromptTooLongError):
        encoder.encode(text)
    assert time.process_time() - begin < 2
