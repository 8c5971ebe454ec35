"""No error message grows with what a caller gave, at any door of the library or the server."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from spectral_paged import LLM, PageFormat, SamplingParams
from spectral_paged.batch.file import read_lines
from spectral_paged.errors import MAX_SHOWN, SpectralPagedError, cut, shown
from spectral_paged.openai import CHAT_URL, COMPLETIONS_URL
from spectral_paged.options import parse_bytes, port_number, positive
from spectral_paged.server.api_error import ApiError, failed, refused
from spectral_paged.server.parsing import parse_request
from spectral_paged.server.settings import ServerSettings
from support.served import served_llm
from support.tiny_model import tiny_model

LIMIT = 2048  # bytes of a message
TALK = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def llm():
    return served_llm(kv_cache_bytes=1 << 20, max_num_seqs=2, max_model_len=512)


def nested(depth, value):
    for _ in range(depth):
        value = [value]
    return value


SIZES = st.sampled_from([0, 1, 700, 4000, 30_000])
LEAVES = st.sampled_from(["x", "\n", "é", "\x00", "'", '"', -1, 1.5, True, None])
JSON = st.one_of(
    st.builds(lambda leaf, n: str(leaf) * n, LEAVES, SIZES),
    st.builds(lambda leaf, n: [leaf] * n, LEAVES, SIZES),
    st.builds(lambda leaf, n: {f"{i}{leaf}": leaf for i in range(n)}, LEAVES, SIZES),
    st.builds(lambda leaf, n: {"x" * n: leaf}, LEAVES, SIZES),
    st.builds(lambda leaf, n: [{"type": "y" * n, "text": leaf}] * 5, LEAVES, SIZES),
    st.builds(lambda leaf, n: nested(min(n, 500), leaf), LEAVES, SIZES),
    st.builds(lambda n: -(10 ** min(n, 4000)), SIZES),
    st.builds(lambda n: 10 ** min(n, 4000), SIZES),
    LEAVES,
)


class Talkative:
    """Its `repr` has no end in sight."""

    def __repr__(self):
        return "talk\n" * 10_000


class Mute:
    def __repr__(self):
        raise RuntimeError("no")


ANY = st.one_of(
    JSON,
    st.builds(lambda n: b"x" * n, SIZES),
    st.builds(lambda n: 10**n, SIZES),
    st.builds(lambda n: ("x" * 10,) * n, SIZES),
    st.builds(lambda n: set(range(n)), SIZES),
    st.builds(Talkative),
    st.builds(Mute),
)
QUICK = settings(
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def message_of(call, *args, **kwargs):
    """What a call says if it refuses, and of what type the error is."""
    try:
        call(*args, **kwargs)
    except (SpectralPagedError, TypeError, argparse.ArgumentTypeError) as error:
        return str(error)
    except ApiError as error:
        return json.dumps(error.content)
    return ""


def check(call, *args, **kwargs):
    assert len(message_of(call, *args, **kwargs)) <= LIMIT


@QUICK
@given(value=ANY)
@example(value=10**5000)  # Python writes no integer of so many digits
@example(value="x" * 4_000_000)
def test_what_is_shown_of_a_value_is_short_and_on_one_line(value):
    text = shown(value)
    assert text and len(text) <= MAX_SHOWN and "\n" not in text


def test_a_value_that_is_nested_too_deep_to_be_printed_is_shown():
    """No example of the test above, because hypothesis prints its examples whole."""
    assert 0 < len(shown(nested(900, 1))) <= MAX_SHOWN


@pytest.mark.parametrize("value", ["", "x", "it's", 3, -1.5, None, [1, 2], {"a": [1]}, ("x",)])
def test_a_short_value_is_shown_whole(value):
    assert shown(value) == repr(value) and cut(repr(value)) == repr(value)


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
@QUICK
@given(value=ANY)
@example(value=10**5000)
def test_sampling_parameters(name, value):
    check(SamplingParams, **{name: value})


PROMPTS = {
    "a prompt": lambda x: x[:3] if isinstance(x, list) else x,
    "a prompt in a list": lambda x: [x],
    "a mapping": lambda x: {"prompt": x},
    "another key": lambda x: {str(x)[:40_000]: 1},
    "a salt": lambda x: {"prompt": "a", "cache_salt": x},
    "pins": lambda x: {"prompt": "a", "pinned_spans": x},
}


@pytest.mark.parametrize("make", PROMPTS.values(), ids=PROMPTS)
@QUICK
@given(value=JSON)
def test_prompts(llm, make, value):
    one = SamplingParams(max_tokens=1)
    check(llm.generate, make(value), one, use_tqdm=False)
    assert not llm.engine.has_unfinished()


MESSAGES = {
    "messages": lambda x: x,
    "a message": lambda x: [x],
    "a role": lambda x: [{"role": x, "content": "x"}],
    "content": lambda x: [{"role": "user", "content": x}],
    "a name": lambda x: [{"role": "user", "content": "x", "name": x}],
    "another field": lambda x: [{"role": "user", "content": "x", str(x)[:40_000]: x}],
}


@pytest.mark.parametrize("make", MESSAGES.values(), ids=MESSAGES)
@QUICK
@given(value=JSON)
def test_conversations(llm, make, value):
    check(llm.chat, make(value), SamplingParams(max_tokens=1), use_tqdm=False)
    assert not llm.engine.has_unfinished()


def test_parameters_and_ids_of_requests(llm):
    for wrong in (Talkative(), ["x" * 10_000], [None] * 3000):
        check(llm.generate, ["a"], wrong, use_tqdm=False)
    long = "id" * 10_000
    llm.engine.add_request(long, "a")
    check(llm.engine.add_request, long, "a")
    llm.engine.abort(long)
    stops = SamplingParams(stop_token_ids=list(range(1000, 9000)))
    check(llm.generate, "a", stops, use_tqdm=False)


def options():
    found = []
    for name in ("kv_format", "device", "dtype", "generation_config", "calibration", "x" * 9000):
        found.append(
            pytest.param(lambda x, n=name: LLM.from_model(tiny_model(), **{n: x}), id=name[:20])
        )
    found.append(pytest.param(lambda x: PageFormat("f", 1, 16, rope=x), id="a format's"))
    return found


@pytest.mark.parametrize("call", options())
@pytest.mark.parametrize(
    "value",
    ["x" * 9000, ["x" * 9000], {"x" * 9000: 1}, Talkative()],
    ids=["text", "a list", "a mapping", "an object"],
)
def test_options(call, value):
    check(call, value)


@pytest.mark.parametrize("read", [parse_bytes, port_number, positive])
@pytest.mark.parametrize("text", ["x" * 9000, "9" * 400, "9" * 9000, "-" + "9" * 9000], ids=len)
def test_arguments_of_a_command(read, text):
    check(read, text)


def bodies(llm, text, *, chat):
    """The error content that a server answers with."""
    server = ServerSettings(("tiny",), max_num_requests=8, max_stops=4)
    try:
        parse_request(llm, server, text.encode(errors="surrogatepass"), chat=chat)
    except SpectralPagedError as error:
        return json.dumps(refused(error).content, ensure_ascii=False)
    except ApiError as error:
        return json.dumps(error.content, ensure_ascii=False)
    return ""


def lines(folder, text):
    path = folder / "in.jsonl"
    path.write_text(text)
    return [str(line.error) for line in read_lines(path, {}) if line.error is not None]


FIELDS = ["prompt", "model", "stream", "stream_options", "logprobs", "echo", "max_tokens", "n"]
FIELDS += ["temperature", "seed", "stop", "stop_token_ids", "user", "metadata", "min_tokens"]
FIELDS += ["cache_salt", "logit_bias", "response_format", "top_logprobs", "messages", "tools"]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@QUICK
@given(name=st.sampled_from(FIELDS) | JSON.map(lambda x: str(x)[:40_000]), value=JSON)
@example(name="temperature", value="x" * 4_000_000)
def test_bodies_and_lines_of_a_batch(llm, tmp_path, chat, name, value):
    body = {"messages": TALK} if chat else {"prompt": "x"}
    body[name] = value
    assert len(bodies(llm, json.dumps(body), chat=chat)) <= LIMIT
    envelope = {"custom_id": "a", "url": CHAT_URL if chat else COMPLETIONS_URL, "body": body}
    found = lines(tmp_path, f"{json.dumps(body)}\n{json.dumps(envelope)}\n")
    assert all(len(text) <= LIMIT for text in found)


@pytest.mark.parametrize("name", ["custom_id", "url", "method", "body", "sampling_params", "more"])
@QUICK
@given(value=JSON)
def test_envelopes_of_a_batch_line(tmp_path, name, value):
    line = {"custom_id": "a", "url": COMPLETIONS_URL, "body": {"prompt": "x"}} | {name: value}
    text = json.dumps(line)
    assert all(len(said) <= LIMIT for said in lines(tmp_path, f"{text}\n{text}\n"))


def test_many_unknown_fields(llm, tmp_path):
    body = {"prompt": "x"} | {f"field{i}": i for i in range(20_000)}
    found = bodies(llm, json.dumps(body), chat=False)
    assert "not supported" in found and len(found) <= LIMIT
    (text,) = lines(tmp_path, json.dumps(body))
    assert len(text) <= LIMIT


def test_the_error_of_a_failure_in_the_server_is_short():
    assert len(json.dumps(failed(RuntimeError("x" * 100_000)).content)) <= LIMIT
