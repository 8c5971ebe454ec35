"""Routes that run no step, ids that clients give, and how long answers took."""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest

from spectral_paged import LLM
from spectral_paged.metrics.prometheus import parse
from support.served import LETTERS, serving, wait_until
from support.small_tokenizers import byte_fallback
from support.tiny_model import tiny_format, tiny_model


def call(served, path, body=None, **headers):
    """Status, JSON and headers of an answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    try:
        with urllib.request.urlopen(
            urllib.request.Request(served.url + path, data, headers)
        ) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def ids_of(text):
    return [LETTERS.index(letter) for letter in text]


@pytest.mark.parametrize(
    "body, text",
    [
        ({"prompt": "The sea"}, "The sea"),
        ({"prompt": "The sea", "model": "alias", "add_special_tokens": False}, "The sea"),
        ({"prompt": ""}, ""),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "<user>Hello<assistant>"),
    ],
    ids=["text", "another name", "nothing", "messages"],
)
def test_a_prompt_has_the_tokens_that_completions_count(served, body, text):
    status, answer, _ = call(served, "/tokenize", body | {"return_token_strs": True})
    want = {"count": len(text), "tokens": ids_of(text), "token_strs": list(text)}
    assert status == 200 and answer == want | {
        "max_model_len": served.service.llm.cache.max_model_len
    }
    status, answer, _ = call(served, "/detokenize", {"tokens": want["tokens"]})
    assert (status, answer) == (200, {"prompt": text})


def test_special_tokens_are_added_and_spelled_out():
    tokenizer = byte_fallback()
    llm = LLM.from_model(tiny_model(), tokenizer, kv_format=tiny_format(), kv_cache_bytes=16 << 20)
    bos = tokenizer.convert_tokens_to_ids("<s>")
    with serving(llm) as running:
        text = "the"
        own = tokenizer(text)["input_ids"]
        assert call(running, "/tokenize", {"prompt": text})[1]["tokens"] == own
        bare = call(running, "/tokenize", {"prompt": text, "add_special_tokens": False})[1]
        assert bare["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert bare["token_strs"] is None
        spelled = call(running, "/detokenize", {"tokens": [bos, *bare["tokens"]]})[1]["prompt"]
        assert spelled.startswith("<s>") and spelled.endswith("the")


@pytest.mark.parametrize(
    "path, body, status, param",
    [
        ("/tokenize", {}, 400, "prompt"),
        (
            "/tokenize",
            {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
            400,
            "prompt",
        ),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            400,
            "add_special_tokens",
        ),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [199]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [1], "models": "x"}, 400, "models"),
    ],
)
def test_what_is_no_prompt_is_refused_by_name(served, path, body, status, param):
    code, answer, _ = call(served, path, body)
    assert (code, answer["error"]["param"]) == (status, param)


def test_the_version_is_the_packages(served):
    assert call(served, "/version")[:2] == (200, {"version": version("spectral-paged")})


def test_the_description_has_a_page(served):
    with urllib.request.urlopen(f"{served.url}/docs") as page:
        assert "/openapi.json" in page.read().decode()


# ---- ids --------------------------------------------------------------------------------------


def test_a_request_has_the_id_that_its_client_gives(served, caplog):
    def records():
        return [r for r in caplog.records if getattr(r, "request_id", "") == "job-7:a/b"]

    body = {"prompt": "ab", "max_tokens": 1}
    with caplog.at_level(logging.INFO, "spectral_paged.server.access_log"):
        _, answer, headers = call(served, "/v1/completions", body, **{"X-Request-Id": "job-7:a/b"})
        wait_until(records)  # the line is written after the answer was sent
    assert answer["id"] == "cmpl-job-7:a/b" and headers["x-request-id"] == "job-7:a/b"
    [record] = records()
    assert record.event == "http" and len(record.engine_id) == 32


@pytest.mark.parametrize("given", ["", "a b", "é", "x" * 129, "a\tb", "<b>"], ids=ascii)
def test_an_id_that_is_no_name_is_not_taken(served, given):
    name = given.encode("latin-1").decode("latin-1")
    _, answer, headers = call(
        served, "/v1/completions", {"prompt": "a", "max_tokens": 1}, **{"X-Request-Id": name}
    )
    assert len(headers["x-request-id"]) == 32 and answer["id"].endswith(headers["x-request-id"])


def test_several_requests_may_have_one_id_at_a_time(served):
    def ask(_):
        body = {"prompt": "ab", "max_tokens": 40, "ignore_eos": True}
        return call(served, "/v1/completions", body, **{"X-Request-Id": "same"})

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert {(status, answer["id"]) for status, answer, _ in answers} == {(200, "cmpl-same")}


# ---- seconds ----------------------------------------------------------------------------------


def test_answers_are_timed_by_route_and_method(served):
    def counts():
        with urllib.request.urlopen(f"{served.url}/metrics") as answer:
            return answer.read().decode()

    call(served, "/version")
    call(served, "/v1/completions", {"prompt": "ab", "max_tokens": 1})
    served.settle()
    text = counts()
    for handler, method in (("/version", "GET"), ("/v1/completions", "POST")):
        labels = f'{{handler="{handler}",method="{method}"}}'
        count = float(text.split(f"http_request_duration_seconds_count{labels} ")[1].split()[0])
        seconds = float(text.split(f"http_request_duration_seconds_sum{labels} ")[1].split()[0])
        assert count >= 1 and 0 < seconds < 60 * count
    assert "http_request_duration_highr_seconds_bucket" in text
    assert parse(text), "the live view still reads it"
    request = urllib.request.Request(f"{served.url}/version", method="Q" * 50)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request)
    assert "QQQ" not in counts(), "no client makes up labels"
