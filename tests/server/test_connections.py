"""Connections of browsers and of clients that keep them open."""

from __future__ import annotations

import argparse
import http.client
import statistics
import time

import pytest

from spectral_paged.server.command import add_serve, settings_of
from support.served import served_llm, serving

PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def served():
    with serving(served_llm(), allowed_origins=(PAGE,), api_keys=("key",)) as running:
        yield running
        running.settle()


def ask(served, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        answer.read()
        return answer
    finally:
        connection.close()


def test_small_answers_on_a_kept_connection_wait_for_no_acknowledgement(served):
    """Where TCP_NODELAY is not set, each waits some 40 ms for the client's delayed ACK."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
    seconds = []
    for _ in range(50):
        begin = time.perf_counter()
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        seconds.append(time.perf_counter() - begin)
    connection.close()
    assert statistics.median(seconds) < 0.02, "40 ms each is the delayed ACK"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/health"])
def test_an_allowed_page_may_ask_and_read_answers(served, path):
    """A preflight has no key, for browsers send none."""
    asked = {"Access_Control_Request_Method": "POST"}
    asked["Access_Control_Request_Headers"] = "authorization,content-type,x-stainless-lang"
    preflight = ask(served, "OPTIONS", path, Origin=PAGE, **asked)
    assert preflight.status == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    allowed = preflight.headers["Access-Control-Allow-Headers"].lower()
    assert {"authorization", "x-stainless-lang"} <= set(allowed.replace(" ", "").split(","))


@pytest.mark.parametrize(
    "key, body, status",
    [
        ("key", b'{"prompt": "ab", "max_tokens": 2}', 200),
        ("key", b'{"prompt": "ab", "max_tokens": 2, "stream": true}', 200),
        ("key", b"{}", 400),
        ("none", b"{}", 401),
    ],
)
def test_an_allowed_page_may_read_errors_and_streams_too(served, key, body, status):
    headers = {"Authorization": f"Bearer {key}", "Content_Type": "application/json"}
    answer = ask(served, "POST", "/v1/completions", body, Origin=PAGE, **headers)
    assert answer.status == status
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE


def test_other_pages_may_not(served):
    asked = {"Origin": "https://other.example", "Access_Control_Request_Method": "POST"}
    preflight = ask(served, "OPTIONS", "/v1/completions", **asked)
    assert preflight.status == 400 and "Access-Control-Allow-Origin" not in preflight.headers
    answer = ask(served, "GET", "/health", Origin="https://other.example")
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_without_the_option_no_page_may():
    with serving(served_llm()) as running:
        asked = {"Origin": PAGE, "Access_Control_Request_Method": "POST"}
        assert ask(running, "OPTIONS", "/v1/completions", **asked).status == 405
        assert "Access-Control-Allow-Origin" not in ask(running, "GET", "/health", **asked).headers


@pytest.mark.parametrize(
    "given, allowed",
    [
        ([], ()),
        (["--allowed-origins", "*"], ("*",)),
        (["--allowed-origins", '["*"]'], ("*",)),
        (["--allowed-origins", "http://a:1", "null"], ("http://a:1", "null")),
        (["--allowed-origins", '["http://a:1", "https://b"]'], ("http://a:1", "https://b")),
        (["--allowed-origins", "http://[::1]:3000"], ("http://[::1]:3000",)),
        (["--allowed-origins", "chrome-extension://abc"], ("chrome-extension://abc",)),
    ],
)
def test_origins_are_given_one_by_one_or_as_a_json_list(given, allowed):
    parser = argparse.ArgumentParser()
    add_serve(parser)
    assert settings_of(parser.parse_args(["tiny", *given])).allowed_origins == allowed
