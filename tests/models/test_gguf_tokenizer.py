"""Tokenizers of GGUF files, against llama.cpp's rules written plainly."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from spectral_paged import LLM
from spectral_paged.errors import CorruptFileError, SpectralPagedError, UnsupportedModelError
from spectral_paged.models import loader
from spectral_paged.models.gguf import GGUFFile, convert_gguf
from spectral_paged.models.gguf.keys import Keys
from spectral_paged.models.gguf.pre_tokenizers import PRE_TOKENIZERS
from spectral_paged.models.gguf.tokenizer import build_tokenizer
from spectral_paged.models.gguf.vocabulary import Vocabulary
from support.gguf_files import SPECIAL, byte_level_keys, plan_of, sentencepiece_keys, write_gguf
from support.llama_cpp_rules import byte_level_ids, sentencepiece_ids, words

PATH = "model.gguf"
SCRIPTS = [
    "The capital of France is Paris.",
    "  two  spaces\n\n\nnewlines\t\ttabs \n x",
    "def f(a, b):\n    return a+b  # 123456 7.89e10",
    "Привет, мир! Как дела?",
    "こんにちは世界。今日は良い天気ですね",
    "你好，世界！我们去吃饭吧",
    "안녕하세요 세계",
    "مرحبا بالعالم كيف حالك",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "Tiếng Việt naïve Straße e\u0301 Å ẞ",
    "👩‍👩‍👧 🎉 ☃ 𝒳 \u200b\ufeff",
    "I'M DON'T we'll they've 'tis",
    "\r\n\r\n x \r y\x00\x7f",
    "¼ ½ ² ٣ ৪ Ⅷ",
    "a" * 40 + " " * 33 + "=\n" * 9,
    "<0x41> ▁a ▁",
]
TEXTS = st.one_of(
    st.sampled_from(SCRIPTS),
    st.text(st.sampled_from("abc ▁é☃\n"), max_size=30),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.lists(st.sampled_from([*SPECIAL, "a", " ", "bc", "\n"]), max_size=8).map("".join),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECTRAL_PAGED_CACHE", str(tmp_path / "cache"))


def read(keys) -> Vocabulary:
    """A vocabulary of keys as they would be read of a file."""
    numbers = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
    arrays = {key: np.asarray(keys[key]) for key in numbers if key in keys}
    return Vocabulary.read(Keys(PATH, {**keys, **arrays}, "llama."))


# ---- SentencePiece -----------------------------------------------------------------------


@st.composite
def sentencepiece(draw):
    """A vocabulary with random words and scores, all of them different."""
    keys = sentencepiece_keys()
    letters = [*"abc▁é", *"☃"][: draw(st.integers(4, 6))]
    drawn = draw(st.lists(st.text(st.sampled_from(letters), min_size=2, max_size=5), unique=True))
    pieces = [*letters, *drawn]
    held = set(keys["tokenizer.ggml.tokens"])
    pieces = [piece for piece in pieces if piece not in held]
    order = draw(st.permutations(range(len(pieces))))
    return keys | {
        "tokenizer.ggml.tokens": keys["tokenizer.ggml.tokens"] + pieces,
        "tokenizer.ggml.scores": np.array(
            [*keys["tokenizer.ggml.scores"], *(-20.5 - k for k in order)], np.float32
        ),
        "tokenizer.ggml.token_type": np.array(
            [*keys["tokenizer.ggml.token_type"], *[1] * len(pieces)], np.int32
        ),
        "tokenizer.ggml.add_space_prefix": draw(st.booleans()),
    }


@settings(max_examples=60, deadline=None)
@given(keys=sentencepiece(), texts=st.lists(TEXTS, min_size=1, max_size=8))
def test_sentencepiece_gives_llama_cpps_ids(keys, texts):
    vocabulary = read(keys)
    tokenizer = build_tokenizer(PATH, vocabulary)
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    special = [t for t, k in zip(vocabulary.tokens, vocabulary.kinds) if k in (2, 3, 4)]
    prefix = vocabulary.space_prefix
    for text in texts:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        scores = vocabulary.scores.tolist()
        assert found == sentencepiece_ids(text, ids, scores, special, space_prefix=prefix)
        if "▁" not in text and not any(token in text for token in special):
            assert tokenizer.decode(found) == text


def test_scores_that_tie_where_words_overlap_are_refused():
    """The left of two equals goes first, which merges in a fixed order cannot do."""
    keys = sentencepiece_keys()
    more = ["abb", "bba", "ab", "bb", "ba"]
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + more
    keys["tokenizer.ggml.token_type"] = keys["tokenizer.ggml.token_type"] + [1] * 5
    scores = np.array(keys["tokenizer.ggml.scores"] + [-50.0, -51.0, -52.0, -52.0, -53.0])
    with pytest.raises(UnsupportedModelError, match="have the same score"):
        build_tokenizer(PATH, read(keys | {"tokenizer.ggml.scores": scores}))
    scores[-2] -= 0.5
    build_tokenizer(PATH, read(keys | {"tokenizer.ggml.scores": scores}))


def test_a_word_of_a_letter_that_is_no_token_is_refused():
    keys = sentencepiece_keys()
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + ["a☃"]
    keys["tokenizer.ggml.token_type"] = keys["tokenizer.ggml.token_type"] + [1]
    keys["tokenizer.ggml.scores"] = keys["tokenizer.ggml.scores"] + [-9.0]
    with pytest.raises(UnsupportedModelError, match="a letter that is no token"):
        build_tokenizer(PATH, read(keys))


# ---- byte-level BPE ----------------------------------------------------------------------

CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD, REST = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
RULES = {  # as llama.cpp has them, which writes some of the models' own expressions otherwise
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{REST}"],
    "qwen2": [rf"{CONTRACTION}|{WORD}|\p{{N}}|{REST}"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}


@st.composite
def byte_level(draw):
    """A vocabulary with random merges of the letters that stand for bytes."""
    keys = byte_level_keys()
    tokens, merges = keys["tokenizer.ggml.tokens"], list(keys["tokenizer.ggml.merges"])
    parts = ["a", "b", "c", "Ġ", "1", "Ð", "¿", "he", "ll"]
    made: list[str] = []
    for _ in range(draw(st.integers(0, 12))):
        left, right = draw(st.sampled_from(parts)), draw(st.sampled_from(parts))
        if left + right not in tokens + made:
            made.append(left + right)
            parts.append(left + right)
            merges.append(f"{left} {right}")
    return keys | {
        "tokenizer.ggml.tokens": tokens + made,
        "tokenizer.ggml.token_type": np.array(
            [*keys["tokenizer.ggml.token_type"], *[1] * len(made)], np.int32
        ),
        "tokenizer.ggml.merges": merges[:2] + draw(st.permutations(merges[2:])),
        "tokenizer.ggml.pre": draw(st.sampled_from(sorted(RULES))),
    }


@settings(max_examples=60, deadline=None)
@given(keys=byte_level(), texts=st.lists(TEXTS, min_size=1, max_size=8))
def test_byte_level_gives_llama_cpps_ids_and_the_text_back(keys, texts):
    vocabulary = read(keys)
    tokenizer = build_tokenizer(PATH, vocabulary)
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    rules, whole = RULES[vocabulary.pre], vocabulary.pre == "llama-bpe"
    for text in texts:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == byte_level_ids(
            text, ids, vocabulary.merges, SPECIAL, rules, whole_words=whole
        )
        assert tokenizer.decode(found) == text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_rule_for_words_cuts_as_it_says_and_loses_no_text(pre):
    tokenizer = build_tokenizer(PATH, read(byte_level_keys() | {"tokenizer.ggml.pre": pre}))
    letters = bytes_to_unicode()
    for text in SCRIPTS:
        cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        expected = words(text, PRE_TOKENIZERS[pre])
        assert [word for word, _ in cut] == [
            "".join(letters[byte] for byte in word.encode()) for word in expected
        ]
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("pre, warns", [(None, True), ("default", True), ("gpt-2", False)])
def test_a_file_that_does_not_say_how_words_are_cut_is_warned_of(caplog, pre, warns):
    keys = byte_level_keys() | {"tokenizer.ggml.pre": pre}
    build_tokenizer(PATH, read({k: v for k, v in keys.items() if v is not None}))
    assert ("tokenizer.ggml.pre" in caplog.text) is warns


@pytest.mark.parametrize("merges", [["h e", "x"], ["h zz"], ["h i"]])
def test_merges_that_make_no_token_are_refused(merges):
    with pytest.raises(CorruptFileError, match="does not join two tokens"):
        build_tokenizer(PATH, read(byte_level_keys() | {"tokenizer.ggml.merges": merges}))


# ---- special tokens ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [sentencepiece_keys, byte_level_keys])
def test_special_tokens_are_one_token_each_inside_text_too(make):
    vocabulary = read(make())
    tokenizer = build_tokenizer(PATH, vocabulary)
    for token in SPECIAL:
        i = vocabulary.tokens.index(token)
        for text in (token, f"a{token}b", f"\n{token} "):
            assert tokenizer(text)["input_ids"].count(i) == 1
        shown = tokenizer.decode([i], skip_special_tokens=True)
        assert shown == (token if token == "<tool>" else ""), "a user's token is text"


BOS_CASES = [
    (sentencepiece_keys, {}, True, False),
    (sentencepiece_keys, {"add_bos_token": False}, False, False),
    (sentencepiece_keys, {"add_eos_token": True}, True, True),
    (byte_level_keys, {}, False, False),
    (byte_level_keys, {"pre": "llama-bpe"}, True, False),
    (byte_level_keys, {"pre": "llama-bpe", "add_bos_token": False}, False, False),
    (byte_level_keys, {"add_bos_token": True, "add_eos_token": True}, True, True),
]


@pytest.mark.parametrize("make, changes, bos, eos", BOS_CASES)
def test_bos_and_eos_are_added_as_the_file_says(tmp_path, make, changes, bos, eos):
    keys = make() | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    folder = convert_gguf(write_gguf(tmp_path / "model.gguf", tokenizer=keys))
    first = [keys["tokenizer.ggml.bos_token_id"]] if bos else []
    last = [keys["tokenizer.ggml.eos_token_id"]] if eos else []
    for tokenizer in (AutoTokenizer.from_pretrained(folder), loader.load_tokenizer(str(folder))):
        inner = tokenizer("the hell", add_special_tokens=False)["input_ids"]
        assert tokenizer("the hell")["input_ids"] == first + inner + last


def test_bos_that_is_asked_for_has_to_be_named():
    keys = byte_level_keys() | {"tokenizer.ggml.add_bos_token": True}
    del keys["tokenizer.ggml.bos_token_id"]
    with pytest.raises(CorruptFileError, match="add_bos_token is true.*no bos_token_id"):
        read(keys)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("named", ["", "{{ bos_token }}", "<|begin|>"])
def test_a_chat_begins_with_one_bos_where_texts_do(tmp_path, adds, named):
    template = named + "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    keys = byte_level_keys() | {
        "tokenizer.ggml.add_bos_token": adds,
        "tokenizer.chat_template": template,
    }
    llm = LLM(str(write_gguf(tmp_path / "c.gguf", tokenizer=keys)), kv_format="exact", device="cpu")
    text = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    assert text.count("<|begin|>") == (adds or bool(named))


@pytest.mark.parametrize("listed", [{}, {"tokenizer.chat_templates": ["tool_use"]}])
def test_named_chat_templates_are_kept(listed):
    keys = byte_level_keys() | listed
    keys |= {"tokenizer.chat_template": "a", "tokenizer.chat_template.tool_use": "b"}
    tokenizer = build_tokenizer(PATH, read(keys))
    assert tokenizer.chat_template == {"default": "a", "tool_use": "b"}


def test_special_tokens_of_phi3_take_the_blanks_behind_them():
    keys = sentencepiece_keys() | {"general.name": "Phi 3 mini", "tokenizer.ggml.pre": "default"}
    for name, takes in (("Phi-3-mini", True), ("another", False)):
        tokenizer = build_tokenizer(PATH, read(keys | {"general.name": name}))
        ids = tokenizer("<|user|>\n\nth", add_special_tokens=False)["input_ids"]
        assert (len(ids) == 2) is takes


# ---- ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<|eom_id|>", "<|end|>"],
)
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_a_token_that_ends_a_text_by_its_text_ends_it(tmp_path, text, kind):
    keys = byte_level_keys()
    keys["tokenizer.ggml.tokens"] = keys["tokenizer.ggml.tokens"] + [text]
    keys["tokenizer.ggml.token_type"] = keys["tokenizer.ggml.token_type"] + [kind]
    path = write_gguf(tmp_path / "ends.gguf", tokenizer=keys)
    llm = LLM(str(path), kv_format="exact", device="cpu", kv_cache_bytes=16 << 20)
    end, eos = len(keys["tokenizer.ggml.tokens"]) - 1, 259
    assert sorted(llm.engine.eos_token_ids) == sorted({end, eos})
    assert llm.get_tokenizer()(text)["input_ids"] == [end]
    assert llm.get_tokenizer().decode([end], skip_special_tokens=True) == ""
    config = json.loads((convert_gguf(path) / "generation_config.json").read_text())
    assert sorted(config["eos_token_id"]) == sorted({end, eos})


def test_ids_that_end_a_turn_or_message_end_a_text():
    keys = byte_level_keys() | {
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": 6,
        "tokenizer.ggml.fim_pad_token_id": 7,
        "tokenizer.ggml.padding_token_id": 8,
    }
    vocabulary = read(keys)
    assert vocabulary.ends == (5, 6, 7, 259) and vocabulary.ids["padding"] == 8


def test_the_end_of_a_message_among_others_is_no_end():
    keys = byte_level_keys()
    keys["tokenizer.ggml.tokens"] += ["<|end|>", "<|return|>", "<|call|>"]
    keys["tokenizer.ggml.token_type"] = keys["tokenizer.ggml.token_type"] + [3] * 3
    assert read(keys).ends == (259, 263, 264)


# ---- what does not go together -----------------------------------------------------------


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"tokenizer.ggml.tokens": ["a"] * 262}, "tokens 0 and 1 are both 'a'"),
        ({"tokenizer.ggml.token_type": np.ones(9, np.int32)}, "9 numbers for 262 tokens"),
        ({"tokenizer.ggml.eos_token_id": 262}, "eos_token_id is 262, and there are 262 tokens"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(keys, message):
    with pytest.raises(CorruptFileError, match=message):
        plan_of("llama", keys)


def test_a_vocabulary_without_scores_is_refused():
    keys = sentencepiece_keys()
    del keys["tokenizer.ggml.scores"]
    with pytest.raises(CorruptFileError, match="scores is missing"):
        read(keys)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_change_of_a_vocabulary_is_refused_or_round_trips(data):
    """Random kinds and texts of tokens: what is built has the file's ids, or nothing is."""
    keys = byte_level_keys()
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(256, 261))
        text = data.draw(st.text(st.characters(codec="utf-8"), max_size=6))
        assume(text not in tokens)
        tokens[at] = text
        kinds[at] = data.draw(st.integers(-1, 8))
    try:
        vocabulary = read(keys | {"tokenizer.ggml.token_type": np.array(kinds, np.int32)})
        tokenizer = build_tokenizer(PATH, vocabulary)
    except SpectralPagedError:
        return
    assert tokenizer.convert_ids_to_tokens(list(range(262))) == vocabulary.tokens


# ---- real files --------------------------------------------------------------------------


@pytest.mark.model
def test_the_embedded_models_tokenizer_has_the_files_ids():
    file = GGUFFile(loader.embedded_gguf("smollm2-135m"))
    vocabulary = Vocabulary.read(Keys(file.path, file.metadata, "llama."))
    tokenizer = build_tokenizer(file.path, vocabulary)
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    special = [t for t, k in zip(vocabulary.tokens, vocabulary.kinds) if k == 3]
    for text in [*SCRIPTS, "<|im_start|>user\nWhat is 12345?<|im_end|>"]:
        found = tokenizer(text)["input_ids"]
        assert found == byte_level_ids(text, ids, vocabulary.merges, special, RULES["smollm"])
    letters = bytes_to_unicode()
    assert vocabulary.tokens.count(letters[32]) == 1 and vocabulary.ends == (0, 2, 4)
