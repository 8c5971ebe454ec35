"""A server refuses unsupported requests in OpenAI's form and names the field at fault."""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
import sys
import urllib.error
import urllib.request

import openai
import pytest

from spectral_paged.cli.commands import main
from spectral_paged.errors import MissingPackageError
from support.served import served_llm, serving

USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def served():
    llm = served_llm(kv_cache_bytes=700_000, max_num_seqs=4, max_model_len=2048)
    with serving(
        llm, max_num_requests=6, max_body_bytes=40_000, max_tokens=900, max_token_rules=999
    ) as running:
        yield running
        running.settle()


def post(url, body, **headers):
    """Status, JSON and headers of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


TEXT = {
    "temperature": ({"temperature": -1}, "temperature", "temperature is -1"),
    "temperature of another kind": ({"temperature": "hot"}, "temperature", "between 0"),
    "top_p": ({"top_p": 0}, "top_p", "top_p is 0"),
    "n": ({"n": 0}, "n", "n is 0"),
    "max_tokens": ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
    "max_tokens above the server's": ({"max_tokens": 901}, "max_tokens", "this server allows 900"),
    "logprobs": ({"logprobs": 21}, "logprobs", "at most 20"),
    "all logprobs": ({"logprobs": -1}, "logprobs", "asks for all tokens; at most 20"),
    "prompt_logprobs": ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
    "streamed prompt_logprobs": (
        {"prompt_logprobs": 1, "stream": True},
        "prompt_logprobs",
        "no part of a stream",
    ),
    "given tokens alone": ({"logprob_token_ids": [1]}, "logprob_token_ids", "needs logprobs"),
    "a given token": (
        {"logprob_token_ids": [199], "logprobs": 1},
        "logprob_token_ids",
        "outside the vocabulary",
    ),
    "presence_penalty": ({"presence_penalty": 3}, "presence_penalty", "in [-2, 2]"),
    "seed": ({"seed": "x"}, "seed", "None or an integer"),
    "stop": ({"stop": ["a", 1]}, "stop", "strings that are not empty"),
    "many stops": ({"stop": ["a"] * 17}, "stop", "allows 16"),
    "a long stop": ({"stop": "a" * 257}, "stop", "256 characters"),
    "many stop tokens": ({"stop_token_ids": [1] * 17}, "stop_token_ids", "allows 16"),
    "many allowed tokens": (
        {"prompt": ["a"] * 6, "allowed_token_ids": [1] * 200},
        "allowed_token_ids",
        "1200 entries for all prompts",
    ),
    "many biases": (
        {"prompt": ["a"] * 6, "logit_bias": dict.fromkeys(range(200), 1)},
        "logit_bias",
        "1200 entries for all prompts",
    ),
    "a stop token": ({"stop_token_ids": [199]}, "stop_token_ids", "outside the vocabulary"),
    "min_tokens": ({"min_tokens": 17}, "min_tokens", "between 0 and max_tokens"),
    "a model": ({"model": "gpt-4o"}, "model", "is not served here"),
    "a model of another kind": ({"model": 4}, "model", "must be a string"),
    "no prompt": ({"prompt": None}, "prompt", "needs a 'prompt'"),
    "an empty prompt": ({"prompt": ""}, "prompt", "empty"),
    "an empty list": ({"prompt": []}, "prompt", "empty"),
    "an empty prompt among others": ({"prompt": ["a", ""]}, "prompt", "empty"),
    "a mixed prompt": ({"prompt": [1, "a"]}, "prompt", "a list of those"),
    "a prompt of another kind": ({"prompt": {"text": "a"}}, "prompt", "a list of those"),
    "a token": ({"prompt": [1, 199]}, "prompt", "outside the vocabulary"),
    "a negative token": ({"prompt": [-1]}, "prompt", "not a token id"),
    "a long prompt": ({"prompt": "a" * 2048}, "prompt", "max_model_len"),
    "a prompt for a larger pool": ({"prompt": "a" * 2000, "max_tokens": 40}, "prompt", "never fit"),
    "many prompts": ({"prompt": ["a"] * 7}, "prompt", "6 completions at once"),
    "many completions": ({"prompt": ["a"] * 2, "n": 4}, "prompt", "6 completions at once"),
    "stream": ({"stream": 1}, "stream", "true or false"),
    "stream_options": (
        {"stream_options": {"include_usage": True}},
        "stream_options",
        "needs stream",
    ),
    "a stream option": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "not supported",
    ),
    "cache_salt": ({"cache_salt": 4}, "cache_salt", "must be a string"),
    "a long cache_salt": ({"cache_salt": "a" * 257}, "cache_salt", "256 characters"),
    "another stream option": (
        {"stream": True, "stream_options": {"include_usge": False}},
        "stream_options.include_usge",
        "not supported",
    ),
    "stream options of another kind": ({"stream_options": [True]}, "stream_options", "an object"),
    "a typo that is null": ({"temprature": None}, "temprature", "not supported"),
    "a typo that is false": ({"temprature": False}, "temprature", "not supported"),
    "a number for a flag": ({"echo": 0}, "echo", "true or false"),
    "false for a number": ({"temperature": False}, "temperature", "between 0"),
    "text for a number": ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'"),
    "a user of another kind": ({"user": 5}, "user", "must be a string"),
    "metadata of another kind": ({"metadata": {"a": 1}}, "metadata.a", "must be a string"),
    "much metadata": ({"metadata": dict.fromkeys("abcdefghijklmnopq", "x")}, "metadata", "16"),
    "storage": ({"store": True}, "store", "not supported"),
    "another tier": ({"service_tier": "flex"}, "service_tier", "not supported"),
    "best_of": ({"best_of": 3}, "best_of", "not supported"),
    "suffix": ({"suffix": "end"}, "suffix", "not supported"),
    "logit_bias": ({"logit_bias": {"x": 1}}, "logit_bias", "numbers between"),
    "a typo": ({"temprature": 1}, "temprature", "not supported"),
    "a typo of zero": ({"temprature": 0}, "temprature", "not supported"),
}
CHAT = {
    "no messages": ({"messages": None}, "messages", "must be a list"),
    "no message": ({"messages": []}, "messages", "must be a list"),
    "a message that is text": ({"messages": ["x"]}, "messages.0", "must be an object"),
    "a role": ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "one of"),
    "a tool's answer without an answer": (
        {"messages": [*USER, {"role": "tool", "tool_call_id": "x"}]},
        "messages.1.content",
        "text parts",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content", "text parts"),
    "an image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                    ],
                }
            ]
        },
        "messages.0.content.0.type",
        "read text only",
    ),
    "a tool call": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        "messages.0.tool_calls.0",
        "an object with a function",
    ),
    "a tool call of another role": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "messages.0.tool_calls",
        "not supported",
    ),
    "what the template refuses": (
        {"messages": [{"role": "assistant", "content": "x"}]},
        "messages",
        "begins with the user",
    ),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "tool_choice",
        "--tool-call-parser",
    ),
    "tools that the template does not take": (
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        "tools",
        "takes no tools",
    ),
    "tools of another kind": ({"tools": [{"type": "web_search"}]}, "tools.0.type", "tools.0.type"),
    "response_format": (
        {"response_format": {"type": "xml"}},
        "response_format",
        "an object of type text, json_object, json_schema",
    ),
    "audio": ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    "reasoning_effort": ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    "logprobs of another kind": ({"logprobs": 2}, "logprobs", "true or false"),
    "min_tokens above the room": ({"min_tokens": 2047}, "min_tokens", "between 0 and max_tokens"),
}


def cases():
    for url, base, table in (
        ("/v1/completions", {"prompt": "x"}, TEXT),
        ("/v1/chat/completions", {"messages": USER}, CHAT),
    ):
        for name, (change, param, message) in table.items():
            yield pytest.param(url, base | change, param, message, id=name)


@pytest.mark.parametrize("url, body, param, message", list(cases()))
def test_a_bad_field_is_named(served, url, body, param, message):
    status, answer, _ = post(served.url + url, body)
    assert status == (404 if message == "is not served here" else 400)
    error = answer["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == param and error["code"]


@pytest.mark.parametrize(
    "fields",
    [
        {
            "suffix": None,
            "logit_bias": {},
            "best_of": None,
            "stream": False,
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
        },
        {"stream_options": None, "stop": None, "seed": None, "model": None},
        {"best_of": 1, "length_penalty": 1.0, "add_special_tokens": True, "bad_words": []},
    ],
    ids=["that describe or ask for nothing", "that are null", "that have a default's value"],
)
def test_fields_are_let_pass(served, fields):
    status, answer, _ = post(served.url + "/v1/completions", {"prompt": "x"} | fields)
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    "raw, message",
    [
        (b"", "not JSON"),
        (b'{"prompt": ', "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 30_000, "not JSON"),
        (b'["x"]', "must be an object"),
        (b'{"prompt": "x", "temperature": NaN}', "not JSON: NaN"),
        (b'{"prompt": "a\\ud800"}', "not valid Unicode"),
        (b'{"prompt": "x", "\xed\xa0\x80": 1}', "not JSON"),
        ('{"prompt": "x", "\\ud800": 1}'.encode("utf-16"), "not JSON"),
    ],
    ids=[
        "nothing",
        "torn",
        "bytes",
        "deep",
        "a list",
        "a constant of other languages",
        "half a surrogate pair",
        "that half as bytes",
        "another encoding",
    ],
)
def test_a_body_that_is_no_object_is_refused(served, raw, message):
    status, answer, _ = post(served.url + "/v1/completions", raw)
    assert status == 400 and message in answer["error"]["message"]


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_that_is_refused_is_refused_by_its_status(served, url):
    body = {"prompt": "a" * 2048, "stream": True}
    if "chat" in url:
        body = {"messages": [{"role": "user", "content": "a" * 2048}], "stream": True}
    status, answer, _ = post(served.url + url, body)
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
    assert answer["error"]["param"] == ("messages" if "chat" in url else "prompt")


@pytest.mark.parametrize(
    "body, limit",
    [
        ({"prompt": "a" * 2048}, 2048),
        ({"prompt": [1] * 3000}, 2048),
        ({"messages": [{"role": "user", "content": "a" * 2048}]}, 2048),
        ({"prompt": "a" * 2000, "max_tokens": 40}, None),
    ],
    ids=["text", "token ids", "chat", "the pool"],
)
def test_an_error_of_length_has_the_words_that_clients_look_for(served, body, limit):
    """litellm, as others, tells it from other refusals by these words of OpenAI's."""
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    limit = limit or served.service.llm.cache.max_sequence_tokens
    status, answer, _ = post(served.url + url, body)
    error = answer["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(f"This model's maximum context length is {limit} tokens")


def test_a_refusal_queues_none_of_several_prompts(served):
    served.settle()  # what tests before this one left may still be at work
    before = served.service.llm.stats()["generated_tokens"]
    status, *_ = post(served.url + "/v1/completions", {"prompt": ["a", "b", "a" * 2048]})
    assert status == 400
    served.settle()
    assert served.service.llm.stats()["generated_tokens"] == before


def test_a_prompt_that_is_too_long_never_reaches_the_engines_thread(served, monkeypatch):
    """Reading millions of token ids there would hold everybody's steps up."""
    monkeypatch.setattr(served.service.llm.engine, "add_request", None)
    status, answer, _ = post(served.url + "/v1/completions", {"prompt": [[1], [1] * 2048]})
    assert status == 400 and answer["error"]["code"] == "context_length_exceeded"


def test_headers_have_a_limit(served):
    """Whatever parser of HTTP is installed beside ours."""
    port = int(served.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.settimeout(10)
        with contextlib.suppress(ConnectionError):
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            for number in range(40):
                raw.sendall(b"X-%d: " % number + b"a" * 8000 + b"\r\n")
            raw.sendall(b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert raw.recv(100)[:12] in (b"", b"HTTP/1.1 400")


def test_a_long_body_is_refused_before_it_is_read_and_while(served):
    url = served.url + "/v1/completions"
    assert post(url, {"prompt": "a" * 40_000})[0] == 413
    assert post(url, {"prompt": "a" * 75_000})[0] == 413  # more than one write takes
    request = urllib.request.Request(
        url, iter([b"a" * 30_000] * 4), {"Content-Type": "application/json"}
    )  # no length: it comes in chunks
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 413


def test_another_content_type_is_refused(served):
    body = b'{"prompt": "x"}'
    status, answer, _ = post(served.url + "/v1/completions", body, **{"Content-Type": "text/plain"})
    assert status == 415 and "use application/json" in answer["error"]["message"]


def test_routes_and_methods_that_do_not_exist(served):
    status, answer, _ = post(served.url + "/v1/embeddings", {})
    assert status == 404 and "/v1/embeddings" in answer["error"]["message"]
    status, answer, _ = post(served.url + "/v1/models", {})
    assert status == 405 and answer["error"]["code"] == "method_not_allowed"
    assert answer["error"]["type"] == "invalid_request_error"
    probe = urllib.request.Request(served.url + "/health", method="HEAD")
    assert urllib.request.urlopen(probe).status == 200, "probes of balancers ask so"


def test_more_than_fits_at_once_may_try_again(served):
    """Six completions are in work; the seventh is told to come back, and does."""
    with served.client() as client, served.client(max_retries=5) as patient:
        values = {"model": "tiny", "prompt": "abc", "temperature": 0}
        stream = client.completions.create(n=6, max_tokens=400, stream=True, **values)
        next(stream)
        status, answer, headers = post(served.url + "/v1/completions", {"prompt": "x"})
        assert (status, headers["Retry-After"]) == (429, "1")
        assert answer["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client.completions.create(max_tokens=1, **values)
        stream.close()
        assert patient.completions.create(max_tokens=1, **values).choices


@pytest.fixture(scope="module")
def locked():
    with serving(served_llm(), api_keys=("key one", "key two")) as running:
        yield running


@pytest.mark.parametrize("given", [None, "Bearer ", "Bearer wrong", "Basic key one", "key one"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/completions"])
def test_without_the_key_nothing_of_v1_is_answered(locked, given, path):
    headers = {} if given is None else {"Authorization": given}
    data = b'{"prompt": "x"}' if path == "/v1/completions" else None
    request = urllib.request.Request(
        locked.url + path, data, {"Content-Type": "application/json"} | headers
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 401 and caught.value.headers["WWW-Authenticate"] == "Bearer"
    assert json.load(caught.value)["error"]["code"] == "invalid_api_key"


def test_each_of_the_keys_opens(locked):
    for key in ("key one", "key two"):
        with locked.client(api_key=key) as client:
            assert client.completions.create(model="tiny", prompt="x").choices
    with locked.client(api_key="none") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with urllib.request.urlopen(f"{locked.url}/health") as answer:
        assert answer.status == 200, "a probe needs no key"


@pytest.mark.parametrize(
    "line, message",
    [
        (["--api-key", ""], "an API key is empty"),
        (["--api-key", "schlüssel"], "not ASCII"),
        (["--metrics-key", " m"], "the metrics key is empty, begins or ends with a space"),
        (["--prefix-cache-per-key"], "needs keys to go by: give --api-key"),
        (["--grace-seconds", "-1"], "must be >= 0"),
        (["--grace-seconds", "inf"], "and finite"),
        (["--max-body-bytes", "512MiB"], "the longest body would never fit"),
        (["--allowed-origins", "http://localhost:3000/"], "and without a path"),
        (["--allowed-origins", "http://a.example,http://b.example"], "behind each other"),
        (["--allowed-origins", "http://*.example"], "'http://*.example' is none"),
        (["--allowed-origins", "localhost"], "scheme://host"),
        (["--allowed-origins", '["*"'], "is no JSON list"),
        (["--allowed-origins", "[1]"], "'1' is none"),
        (["--host", "no.such.host.invalid"], "name another --port or --host"),
    ],
)
def test_a_bad_option_ends_before_a_model_is_loaded(line, message, capsys, monkeypatch):
    monkeypatch.setattr("spectral_paged.llm.LLM", None)
    assert main(["serve", "tiny", "--port", "0", *line]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_a_package_the_error_says_what_to_install(monkeypatch, package):
    for name in [n for n in sys.modules if n.startswith("spectral_paged.server.")]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)  # the package's own reference, so that it comes back too
    monkeypatch.delitem(sys.modules, "spectral_paged.metrics.prometheus", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[server\]'"):
        importlib.import_module("spectral_paged.server.http_server")
