"""The bytes of tokens, the text that they make behind a prompt, and where they lie in it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings, strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spectral_paged import LLM, SamplingParams
from spectral_paged.engine.text import OutputText
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.openai import chat_choice, text_choice, text_logprobs
from support.small_tokenizers import Slow, byte_fallback, byte_level, whole_words
from support.tiny_model import tiny_format, tiny_model

TOKENIZERS = {
    "byte level": byte_level(),
    "llama2": byte_fallback("llama2"),
    "gemma": byte_fallback("gemma"),
    "metaspace": byte_fallback("metaspace"),
    "wordpiece": whole_words("wordpiece"),
    "suffix": whole_words("suffix"),
    "plain": whole_words("plain"),
}
BYTES = {name: TokenBytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
BYTES["slow"] = TokenBytes(Slow(TOKENIZERS["llama2"]))
TOKENIZERS["slow"] = TOKENIZERS["llama2"]
WITH_BYTES = {"byte level", "llama2", "gemma", "metaspace", "slow"}
EVERY = pytest.mark.parametrize("name", list(TOKENIZERS))


def replaced(name, ids, skip):
    """The text of all tokens as the tokenizer has it, with U+FFFD for what is no UTF-8.

    A byte-fallback decoder replaces all of a run of byte tokens if a part of it is no UTF-8, so
    what begins as one character would be taken back: there the bytes themselves are decoded.
    """
    tokenizer = TOKENIZERS[name]
    text = tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in text or name not in WITH_BYTES - {"byte level"}:
        return text
    tokens = [t for t in tokenizer.convert_ids_to_tokens(ids) if t is not None]
    if skip:
        tokens = [t for t in tokens if t not in ("<s>", "</s>", "<unk>")]
    data = b"".join(
        bytes.fromhex(t[3:5]) if t.startswith("<0x") else t.replace("▁", " ").encode()
        for t in tokens
    )
    if name == "metaspace":  # all spaces that the first token spells so
        num_cut = tokens[0].count("▁")
    else:
        num_cut = name != "gemma" and data.startswith(b" ")
    return data[num_cut:].decode("utf-8", "replace")


def places(data):
    """For each byte the index of its character in the text that has U+FFFD for errors."""
    found, at = [], 0
    for index in itertools.count():
        if at == len(data):
            return found
        try:
            length = len(data[at : at + 4].decode()[0].encode())
        except UnicodeDecodeError as error:
            whole = data[at : at + error.start].decode()
            length = len(whole[0].encode()) if whole else error.end
        found += [index] * length
        at += length


def spelled(name, data):
    """The tokens of single bytes."""
    table = bytes_to_unicode()
    spellings = [table[b] if name == "byte level" else f"<0x{b:02X}>" for b in data]
    return TOKENIZERS[name].convert_tokens_to_ids(spellings)


def sequences(name):
    """Token ids, in which characters are often torn, and often broken too."""
    any_token = st.integers(0, len(TOKENIZERS[name]) + 2).map(lambda t: [t])
    pieces = [any_token]
    if name in WITH_BYTES:
        characters = st.sampled_from(["é", "日", "🙂", "a", " "]).map(str.encode)
        parts = st.builds(
            lambda b, i, n: b[i : i + n], characters, st.integers(0, 2), st.integers(1, 3)
        )
        pieces += [data.map(lambda b: spelled(name, b)) for data in (characters, parts)]
    return st.lists(st.one_of(pieces), max_size=8).map(lambda found: sum(found, []))


@EVERY
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_prompt_and_completion_say_what_all_tokens_say(name, data):
    """Whole, in pieces, and token by token; nothing that was shown is taken back."""
    prompt, ids = data.draw(sequences(name)), data.draw(sequences(name))
    skip = data.draw(st.booleans())
    tokens = BYTES[name]
    out = OutputText(tokens, prompt=prompt, skip_special_tokens=skip)
    echo = tokens.text(prompt, skip_special_tokens=skip)
    before = len(tokens.join(prompt, skip_special_tokens=skip))
    everything = tokens.join([*prompt, *ids], skip_special_tokens=skip)
    of_bytes, shown, at = places(everything), "", before
    for token in ids:
        offset, entry = out.offset_of(token), out.logprob(token, 0.0, 1)
        out.append(token)
        assert out.settled() == out.text and out.text.startswith(shown)
        shown = out.text
        if not (skip and token in TOKENIZERS[name].all_special_ids) and entry.token_bytes:
            assert everything[at:].startswith(entry.token_bytes)
            assert len(echo) + offset == of_bytes[at]
            at += len(entry.token_bytes)
    out.finish()
    assert at == len(everything)
    assert out.text.startswith(shown)
    assert echo + out.text == replaced(name, [*prompt, *ids], skip)
    assert tokens.join([*prompt, *ids], skip_special_tokens=skip).decode(errors="replace") == (
        echo + out.text
    )


def test_bytes_that_begin_no_character_are_one_each():
    """Python's decoder waits for more of a surrogate, and then finds that it was none."""
    ids = spelled("gemma", b"\xed\xa0a\xe6\x97")
    tokens, out = BYTES["gemma"], OutputText(BYTES["gemma"])
    offsets = []
    for token in ids:
        offsets.append(out.offset_of(token))
        out.append(token)
    assert offsets == tokens.places(ids, skip_special_tokens=True) == [0, 1, 2, 3, 3]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(WITH_BYTES)))
def test_stops_are_found_over_the_borders_of_tokens_and_characters(data, name):
    ids = data.draw(sequences(name))
    tokens = BYTES[name]
    text = tokens.text(ids, skip_special_tokens=True)
    piece = st.builds(lambda i, n: text[i : i + n], st.integers(0, 20), st.integers(1, 5))
    stops = data.draw(st.lists(piece.filter(bool) | st.just("é"), min_size=1, max_size=3))
    out, hit = OutputText(tokens, stop=stops), None
    for token in ids:
        hit = out.append(token)
        if hit is not None:
            break
    assert (hit is not None) == any(s in text for s in stops)
    if hit is not None:
        assert text.startswith(out.text + hit) and not any(s in out.text for s in stops)


@pytest.mark.parametrize("style, text", [("llama2", " Paris is"), ("metaspace", " Paris is")])
def test_a_space_between_prompt_and_completion_is_the_completions(style, text):
    tokens, ids = BYTES[style], TOKENIZERS[style].convert_tokens_to_ids
    said = ids(["▁Paris", "▁is"])

    def completion(prompt):
        out = OutputText(tokens, prompt=ids(prompt), stop=[" Paris"])
        return out.append(said[0]), out.append(said[1])

    assert completion(["<s>", "▁the"]) == (" Paris", None)
    assert completion(["<s>"]) == (None, None), "nothing is shown before it: the text begins"
    assert tokens.join(ids(["▁the", "▁Paris"]), skip_special_tokens=True) == b"the Paris"


def test_a_token_of_one_byte_is_read_from_its_spelling():
    for name in WITH_BYTES - {"metaspace"}:
        context = TOKENIZERS[name].convert_tokens_to_ids("a")
        for byte, [token] in ((b, spelled(name, [b])) for b in range(256)):
            assert BYTES[name].of(token, context) == bytes([byte])


# ---- through an LLM and in OpenAI's shape ------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    """Random weights over a vocabulary of mostly bytes: its text is mostly broken."""
    tokenizer = byte_fallback("llama2", num_bytes=150)
    assert len(tokenizer) < 199
    model = tiny_model()
    with LLM.from_model(model, tokenizer, kv_format=tiny_format(), kv_cache_bytes=16 << 20) as made:
        yield made


@pytest.mark.parametrize("seed", range(4))
def test_a_request_goes_on_behind_bytes_that_are_no_text(llm, seed):
    how = {"temperature": 2.0, "seed": seed, "n": 2, "logprobs": 3, "ignore_eos": True}
    params = SamplingParams(max_tokens=60, **how)
    prompt = [1, *llm.get_tokenizer().convert_tokens_to_ids(["a", "b"])]
    [output] = llm.generate([prompt], params, use_tqdm=False)
    pieces = list(llm.stream([prompt], params))
    for whole in output.outputs:
        out = OutputText(TokenBytes(llm.get_tokenizer()), prompt=prompt)
        for token in whole.token_ids:
            out.append(token)
        out.finish()
        mine = [p for p in pieces if p.index == whole.index]
        assert len(whole.token_ids) == 60 and "\ufffd" in whole.text
        assert whole.text == out.text == "".join(p.text for p in mine)
        assert whole.text_offsets == sum((p.text_offsets for p in mine), [])
        chat, text = chat_choice(whole, params), text_choice(whole)
        for entry, token in zip(chat["logprobs"]["content"], whole.token_ids, strict=True):
            assert bytes(entry["bytes"]) == out._tokens.of(token, prompt[-1])
        columns = text["logprobs"]
        assert columns["text_offset"] == whole.text_offsets == sorted(whole.text_offsets)
        for name, value, top in zip(
            columns["tokens"], columns["token_logprobs"], columns["top_logprobs"], strict=True
        ):
            assert top[name] == value and 3 <= len(top) <= 4


def test_candidates_of_one_text_have_entries_of_their_own():
    """Parts of characters, a byte and the character that it is, and ids that no vocabulary has."""
    out = OutputText(BYTES["llama2"], prompt=TOKENIZERS["llama2"].convert_tokens_to_ids(["a"]))
    ids = TOKENIZERS["llama2"].convert_tokens_to_ids
    five = [*ids(["b", "<0x62>", "<0xC3>", "<0xA9>", "\ufffd"]), 9000, 9001]
    table = {t: out.logprob(t, -float(i), i + 1) for i, t in enumerate(five)}
    columns = text_logprobs(five[1:2], [table], [0])
    assert columns["tokens"] == ["bytes:\\x62"]
    assert columns["top_logprobs"] == [
        {
            "b": 0.0,
            "bytes:\\x62": -1.0,
            "bytes:\\xc3": -2.0,
            "bytes:\\xa9": -3.0,
            "\ufffd": -4.0,
            "token_id:9000": -5.0,
            "token_id:9001": -6.0,
        }
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_whole_vocabulary_has_the_bytes_of_its_tokens_behind_text(name):
    known = BYTES[name]
    size = len(TOKENIZERS[name]) + 3
    found = known.vocabulary(size)
    one_by_one = [
        known.shown(i, known._anchor, skip_special_tokens=True) or b"" for i in range(size)
    ]
    assert found == one_by_one and any(found)


def test_a_whole_vocabulary_is_read_in_few_calls(monkeypatch):
    tokenizer = TOKENIZERS["llama2"]
    known, calls = TokenBytes(tokenizer), []
    decode = known._decode
    monkeypatch.setattr(known, "_decode", lambda ids: calls.append(ids) or decode(ids))
    known.vocabulary(0)
    assert len(calls) < len(tokenizer) / 4
