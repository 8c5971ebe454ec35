"""Routes of the development mode put a server to sleep and wake it up."""

from __future__ import annotations

import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from spectral_paged.cli.commands import build_parser
from spectral_paged.errors import InvalidRequestError
from spectral_paged.server.command import DEV_MODE_VARIABLE, settings_of
from support.served import served_llm, serving, wait_until

ROUTES = ["POST /sleep", "POST /wake_up", "GET /is_sleeping", "POST /reset_prefix_cache"]


def call(url, route, key=None):
    """Status and text of an answer."""
    method, path = route.split()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_server_sleeps_and_requests_wait_until_it_wakes():
    with serving(served_llm(), dev_mode=True) as served, ThreadPoolExecutor(1) as pool:
        body = {"model": "tiny", "prompt": "tell me", "max_tokens": 5, "temperature": 0}
        want = served.client().completions.create(**body).choices[0].text
        for query in ("?level=1", "?level=0&mode=keep", ""):
            assert call(served.url, f"POST /sleep{query}") == (200, "")
            assert call(served.url, "GET /is_sleeping") == (200, '{"is_sleeping":true}')
            assert call(served.url, "GET /health")[0] == 200
            answer = pool.submit(lambda: served.client().completions.create(**body))
            wait_until(served.service.llm.engine.has_unfinished)
            assert not answer.done()
            assert call(served.url, "POST /wake_up?tags=weights")[0] == 200
            assert call(served.url, "POST /wake_up")[0] == 200
            assert answer.result(30).choices[0].text == want
        assert call(served.url, "GET /is_sleeping") == (200, '{"is_sleeping":false}')
        assert call(served.url, "POST /reset_prefix_cache")[0] == 200
        served.settle()


@pytest.mark.parametrize("mode, status", [("abort", 503), ("wait", 200)])
def test_requests_in_work_are_aborted_or_finished(mode, status):
    with serving(served_llm(), dev_mode=True) as served, ThreadPoolExecutor(1) as pool:
        steps = served.service.llm.engine.counters
        body = {"model": "tiny", "prompt": "tell me", "max_tokens": 400, "temperature": 0}
        answer = pool.submit(lambda: served.client().completions.with_raw_response.create(**body))
        wait_until(lambda: steps.steps > 2)
        assert call(served.url, f"POST /sleep?mode={mode}")[0] == 200
        if mode == "abort":
            with pytest.raises(openai.InternalServerError, match="falls asleep") as caught:
                answer.result(30)
            assert caught.value.status_code == status
        else:
            assert answer.result(30).status_code == status
        assert call(served.url, "POST /wake_up")[0] == 200
        served.settle()


@pytest.mark.parametrize(
    "route, says",
    [
        ("POST /sleep?level=2", "level 2 drops the weights"),
        ("POST /sleep?level=deep", "must be 0 or 1"),
        ("POST /sleep?mode=x", "one of abort, wait, keep"),
        ("POST /wake_up?tags=x", "is none of"),
    ],
)
def test_what_cannot_be_done_is_a_400_and_the_server_goes_on(route, says):
    with serving(served_llm(), dev_mode=True) as served:
        status, text = call(served.url, route)
        assert status == 400 and says in text
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
        assert served.client().completions.create(**body).choices


def test_routes_are_behind_a_switch_and_a_key():
    with serving(served_llm()) as served:
        assert {call(served.url, route)[0] for route in ROUTES} == {404}
    with serving(served_llm(), dev_mode=True, api_keys=("right",)) as served:
        assert {call(served.url, route)[0] for route in ROUTES} == {401}
        assert {call(served.url, route, "right")[0] for route in ROUTES} == {200}


@pytest.mark.parametrize(
    "words, variable, want",
    [("", None, None), ("", "1", True), ("", "0", False), ("--no-dev-mode", "1", False)],
)
def test_the_switch_is_an_option_or_a_variable(monkeypatch, words, variable, want):
    if variable is not None:
        monkeypatch.setenv(DEV_MODE_VARIABLE, variable)
    assert (
        settings_of(build_parser().parse_args(["serve", "tiny", *words.split()])).dev_mode is want
    )


def test_a_switch_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(DEV_MODE_VARIABLE, "yes")
    with pytest.raises(InvalidRequestError, match="write 0 or 1"):
        settings_of(build_parser().parse_args(["serve", "tiny"]))
