"""What one request may ask for, and that a large one holds up nobody else."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request

import pytest

from spectral_paged import SamplingParams
from spectral_paged.openai import chat_choice, text_choice, text_logprobs, usage
from spectral_paged.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from spectral_paged.server import app
from spectral_paged.server.echo import Echo
from spectral_paged.server.response import TOKENS_AT_ONCE, OpenAIResponse
from support.served import served_llm, serving, wait_until

TALK = {"messages": [{"role": "user", "content": "x"}]}
TEXT = {"prompt": "x"}


@pytest.fixture(scope="module")
def served():
    with serving(served_llm(), max_response_entries=6000, max_num_requests=512) as running:
        yield running


def post(served, url, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{served.url}/v1/{url}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    "url, body, param",
    [
        ("completions", TEXT | {"n": 6, "max_tokens": 1001}, "max_tokens"),
        ("completions", {"prompt": ["x", "y"], "n": 3, "max_tokens": 1001}, "max_tokens"),
        ("completions", TEXT | {"max_tokens": 601, "logprobs": 8}, "logprobs"),
        ("completions", TEXT | {"max_tokens": 3001, "logprobs": 0, "stream": True}, "logprobs"),
        (
            "chat/completions",
            TALK | {"n": 2, "max_tokens": 400, "logprobs": True, "top_logprobs": 20},
            "logprobs",
        ),
    ],
)
def test_more_entries_than_a_response_may_have_are_refused(served, url, body, param):
    status, answer = post(served, url, body)
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "response_too_large", param)
    assert error["type"] == "invalid_request_error"
    assert "this server allows 6000" in error["message"]
    assert "raise --max-response-entries" in error["message"]
    served.settle()


def test_what_a_response_may_have_is_served(served):
    body = TEXT | {"n": 5, "max_tokens": 60, "logprobs": 18, "temperature": 0}
    status, answer = post(served, "completions", body)
    assert status == 200 and answer["usage"]["completion_tokens"] == 300
    # as long as the model's length lets it be
    short = {"prompt": "x" * 4090, "max_tokens": 100_000}
    assert post(served, "completions", short)[1]["usage"]["completion_tokens"] == 6


def test_a_conversation_without_a_limit_gets_as_much_as_a_response_may_have(served):
    body = TALK | {"n": 3, "logprobs": True, "top_logprobs": 18, "temperature": 0}
    status, answer = post(served, "chat/completions", body)
    assert status == 200 and answer["usage"]["completion_tokens"] == 6000 // 20 // 3 * 3


# ---- what is sent ------------------------------------------------------------------------


def completion(index, num_tokens, num_candidates=3):
    """A completion with few tables, which its tokens share, so that it is quickly made."""
    texts = [f'é"{token}' for token in range(num_candidates + 5)]
    entries = [Logprob(-0.5, t + 1, text, text.encode()) for t, text in enumerate(texts)]
    tables = [{t: entries[t] for t in range(first, first + num_candidates)} for first in range(5)]
    ids = [place % 5 for place in range(num_tokens)]
    return CompletionOutput(
        index,
        'é"\u2028' * num_tokens,
        ids,
        logprobs=[tables[token] for token in ids],
        finish_reason="length",
        text_offsets=list(range(num_tokens)),
    )


def output_of(*completions):
    return RequestOutput("r", None, [1, 2], list(completions), True, RequestMetrics(0.0))


ECHOES = [Echo("first ", [1, 2], [0, 4], "firs"), Echo("second ", [3, 2], [0, 5], "secon")]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize("echoes", [None, ECHOES], ids=["", "echo"])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_pieces_are_the_json_of_the_choices(chat, echoes, logprobs):
    params = SamplingParams(n=3, logprobs=logprobs, prompt_logprobs=echoes and logprobs)
    sizes = [[0, 1, TOKENS_AT_ONCE], [TOKENS_AT_ONCE - 1, TOKENS_AT_ONCE + 1, 5 * TOKENS_AT_ONCE]]
    outputs = [output_of(*(completion(i, size) for i, size in enumerate(row))) for row in sizes]
    if logprobs is None:
        for done in outputs:
            for one in done.outputs:
                one.logprobs = None
    if chat and echoes:
        return
    for done in outputs:
        done.prompt_logprobs = [None, {2: Logprob(-1.5, 3, "x")}]
    response = OpenAIResponse(
        "id", "tiny", chat=chat, params=params, num_prompt_tokens=[2, 2], echoes=echoes
    )
    got = json.loads(b"".join(response.pieces(outputs)))
    want = []
    for place, done in enumerate(outputs):
        for one in done.outputs:
            choice = {"logprobs": None} | (chat_choice(one, params) if chat else text_choice(one))
            choice["index"] += 3 * place
            if echoes:
                choice["text"] = echoes[place].text + choice["text"]
            if echoes and logprobs is not None:
                echo, shift = echoes[place], len(echoes[place].text)
                choice["logprobs"] = text_logprobs(
                    [*echo.token_ids, *one.token_ids],
                    [*done.prompt_logprobs, *one.logprobs],
                    [*echo.offsets, *(shift + offset for offset in one.text_offsets)],
                    first=echo.first,
                )
            want.append(choice)
    assert got["choices"] == want
    assert got["usage"] == usage(outputs)
    assert (got["model"], got["object"]) == (
        "tiny",
        "chat.completion" if chat else "text_completion",
    )


class Finished:
    """A generation whose outputs are there."""

    def __init__(self, outputs):
        self._outputs = outputs

    async def outputs(self):
        return self._outputs

    def close(self):
        pass


def longest_wait(served, meanwhile):
    """The longest time that `/health` took while a thread does something, and how many came."""
    worker, waits = threading.Thread(target=meanwhile), []
    worker.start()
    while worker.is_alive():
        begin = time.monotonic()
        urllib.request.urlopen(f"{served.url}/health").read()
        waits.append(time.monotonic() - begin)
    worker.join()
    return max(waits), len(waits)


@pytest.mark.parametrize("url, body", [("chat/completions", TALK), ("completions", TEXT)])
def test_health_answers_while_a_large_answer_is_built(monkeypatch, url, body):
    """25,000 tokens with 20 candidates each were built in 1.5 s, on the event loop."""
    outputs = [output_of(completion(0, 25_000, 20))]
    wish = {"logprobs": True, "top_logprobs": 20} if "chat" in url else {"logprobs": 20}
    sizes = []

    async def submit(*args, **kwargs):
        return Finished(outputs)

    with serving(served_llm()) as served:
        monkeypatch.setattr(served.service.engine, "submit", submit)

        def ask():
            data = json.dumps(body | wish | {"max_tokens": 9}).encode()
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{served.url}/v1/{url}", data, headers)
            with urllib.request.urlopen(request) as answer:
                assert answer.headers["Content-Length"]
                sizes.append(len(answer.read()))

        for _ in range(3):  # others have work on this machine too
            longest, count = longest_wait(served, ask)
            if longest < 0.1:
                break
        assert longest < 0.1 and count > 10 and sizes[-1] > 5_000_000


def test_a_long_body_holds_up_no_short_one(monkeypatch):
    parse, go_on = app.parse_request, threading.Event()

    def slow(llm, settings, raw, *, chat):
        if len(raw) > app.LONG_BODY_BYTES:
            assert go_on.wait(30)
        return parse(llm, settings, raw, chat=chat)

    monkeypatch.setattr(app, "parse_request", slow)
    with serving(served_llm()) as served:
        found = []
        long = threading.Thread(
            target=lambda: found.append(post(served, "completions", {"prompt": "a" * 100_000}))
        )
        long.start()
        wait_until(lambda: served.service.concurrency.taken == 1)
        assert post(served, "completions", TEXT)[0] == 200
        assert not found
        go_on.set()
        long.join()
        assert found[0][0] == 400
