"""The text of a growing completion: multibyte characters, stop strings, and held-back ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from spectral_paged.engine.text import OutputText
from spectral_paged.engine.token_bytes import TokenBytes
from support.real_text import smollm2


class ByteTokenizer:
    """One token a byte: every multibyte character is torn over tokens."""

    def __init__(self):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.backend_tokenizer = Tokenizer(
            models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
        )
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend_tokenizer.decoder = decoders.ByteLevel()

    def encode(self, text):
        return self.backend_tokenizer.encode(text).ids


TOKENIZER = ByteTokenizer()
TOKENS = TokenBytes(TOKENIZER)


def feed(text, **options):
    """(shown text after every token, stop string) of a completion that says `text`."""
    out = OutputText(TOKENS, **options)
    settled = []
    for token in TOKENIZER.encode(text):
        stop = out.append(token)
        if stop is not None:
            return out, settled, stop
        settled.append(out.settled())
    return out, settled, None


TEXTS = ["plain words", "naïve café", "日本語です", "🙂🙃 x", " lead", "\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text(text):
    out, settled, _ = feed(text)
    assert out.text == text and settled[-1] == text
    for a, b in zip(settled, settled[1:]):
        assert b.startswith(a), "what was shown is never taken back"
        assert "�" not in b


def test_a_stop_string_over_token_borders_is_cut_off():
    out, settled, stop = feed("one two STOP three", stop=["STOP"])
    assert (out.text, stop) == ("one two ", "STOP")
    assert all("S" not in s for s in settled)


def test_the_earliest_stop_wins():
    assert feed("abcdef", stop=["ef", "cde"])[0].text == "ab"


def test_stops_are_ignored_while_they_may_not_stop():
    out = OutputText(TOKENS, stop=["b"])
    ids = TOKENIZER.encode("abab")
    assert [out.append(t, may_stop=i >= 2) for i, t in enumerate(ids)] == [None, None, None, "b"]
    assert out.text == "aba"


def test_a_stop_that_was_ignored_does_not_end_the_text_later():
    """However long the other stops are, only what the new token completes counts."""
    out = OutputText(TOKENS, stop=["b", "a much longer stop"])
    ids = TOKENIZER.encode("abcdb")
    assert [out.append(t, may_stop=i >= 2) for i, t in enumerate(ids)] == [None] * 4 + ["b"]
    assert out.text == "abcd"


def test_a_stop_may_begin_while_it_may_not_stop_yet():
    out = OutputText(TOKENS, stop=["STOP"])
    ids = TOKENIZER.encode("a STOP")
    assert [out.append(t, may_stop=i >= 4) for i, t in enumerate(ids)][-1] == "STOP"
    assert out.text == "a "


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("abcé🙂", min_size=1, max_size=12),
    stop=st.lists(st.text("abcé🙂", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_shown_text_is_never_taken_back_and_ends_before_the_stop(text, stop):
    out, settled, hit = feed(text, stop=stop)
    places = [text.find(s) + len(s) for s in stop if s in text]
    assert (hit is not None) == bool(places)
    if hit is not None:
        # the stop that completes first ends the text; of those, the one that begins first
        end = min(places)
        begin = min(text.find(s) for s in stop if s in text and text.find(s) + len(s) == end)
        assert out.text == text[:begin]
    else:
        assert out.text == text
    for shown in settled:
        assert out.text.startswith(shown)


def test_without_a_tokenizer_there_is_no_text():
    out = OutputText(None, stop=["a"])
    assert out.append(5) is None and out.text == ""


# ---- a real vocabulary: tokens of many characters, characters of many tokens ---------------

LINES = [
    "The quick brown fox, don't you know, jumped 12,345 times.",
    "naïve café — “quotes” …",
    "日本語です。東京は大きい",
    "🙂🙃 family 👩‍👩‍👧 flag 🇫🇷!",
    "مرحبا بالعالم",
    "  two  spaces\n\n\ttab , and a space before the comma .",
    "def f(x):\n    return x ** 2  # π ≈ 3.14159\n",
]


@pytest.mark.model
@pytest.mark.parametrize("text", LINES)
def test_text_token_by_token_is_the_decoded_whole(text):
    tokenizer = smollm2().tokenizer
    ids = tokenizer(text)["input_ids"]
    out, shown = OutputText(TokenBytes(tokenizer)), []
    for token in ids:
        out.append(token)
        shown.append(out.settled())
    assert out.text == tokenizer.decode(ids) == text
    for a, b in zip(shown, shown[1:]):
        assert b.startswith(a)


@pytest.mark.model
@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_show_only_where_they_are_asked_for(skip):
    tokenizer = smollm2().tokenizer
    ids = tokenizer("<|im_start|>user\nhi 🙂<|im_end|>")["input_ids"]
    out = OutputText(TokenBytes(tokenizer), skip_special_tokens=skip)
    for token in ids:
        out.append(token)
    assert out.text == tokenizer.decode(ids, skip_special_tokens=skip)
    assert ("<|im_end|>" in out.text) is not skip


def by_the_book(tokenizer, ids, stop, may_stop_from):
    """(text, stop string): decodes everything anew for each token and looks at every place."""
    before = ""
    for i in range(len(ids)):
        # a character that has begun waits for its other tokens, what stands before it does not
        now = tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")
        ends = [
            (at, s)
            for s in stop
            for at in range(len(now) - len(s) + 1)
            if now[at : at + len(s)] == s and at + len(s) > len(before)
        ]
        if ends and i >= may_stop_from:
            at, s = min(ends)
            return now[:at], s
        before = now
    return before, None


@pytest.mark.model
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_tokens_of_many_characters_stop_where_the_whole_text_says(data):
    """Stops are pieces of the text, so they begin and end inside tokens as often as between."""
    tokenizer = smollm2().tokenizer
    text = "".join(data.draw(st.lists(st.sampled_from(LINES), min_size=1, max_size=2)))
    piece = st.builds(
        lambda at, n: text[at : at + n], st.integers(0, len(text) - 1), st.integers(1, 9)
    )
    stop = data.draw(st.lists(piece | st.text("aeo ,🙂", min_size=1), min_size=1, max_size=3))
    may_stop_from = data.draw(st.integers(0, 12))
    ids = tokenizer(text)["input_ids"]
    out, shown, hit = OutputText(TokenBytes(tokenizer), stop=stop), [], None
    for i, token in enumerate(ids):
        hit = out.append(token, may_stop=i >= may_stop_from)
        if hit is not None:
            break
        shown.append(out.settled())
    assert (out.text, hit) == by_the_book(tokenizer, ids, stop, may_stop_from)
    for earlier in shown:
        assert out.text.startswith(earlier), "what was shown is never taken back"
