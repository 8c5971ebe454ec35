"""Request bodies have limits of time and total size while they arrive and wait for parsing."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

from spectral_paged.server.parsing import parse_request
from support.served import LONG, VALUES, served_llm, serving, wait_until


def test_a_forgotten_body_is_given_up():
    with serving(served_llm(), body_seconds=0.3) as served:
        port = int(served.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 408")
        served.settle()


def test_a_body_that_comes_a_byte_at_a_time_has_no_more_time_than_others():
    with serving(served_llm(), body_seconds=0.5) as served, upload(served, 100) as raw:
        begin = time.monotonic()
        raw.settimeout(0.05)
        got = b""
        while not got and time.monotonic() < begin + 10:
            raw.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                got = raw.recv(1000)
        assert got.startswith(b"HTTP/1.1 408")
        assert time.monotonic() < begin + 5
        served.settle()


def upload(served, length):
    """A connection whose request has a body of `length`, none of which has been sent."""
    raw = socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])), timeout=30)
    raw.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )
    return raw


def whole_answer(raw):
    """Headers and body of an answer after which the server closes."""
    parts = []
    while part := raw.recv(65536):
        parts.append(part)
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    return head.decode().lower(), json.loads(body)


def test_bodies_on_their_way_share_a_bound_and_give_it_back():
    limits = {"max_body_bytes": 100_000, "max_total_body_bytes": 150_000}
    with serving(served_llm(), **limits) as served, served.client() as client:
        room = served.service.bodies
        with upload(served, 100_000) as first, upload(served, 100_000) as second:
            wait_until(lambda: served.service.concurrency.taken == 2)
            assert room.taken == 0, "what is only announced takes no room"
            first.sendall(b" " * 90_000)
            wait_until(lambda: room.taken == 90_000)
            second.sendall(b" " * 90_000)
            head, answer = whole_answer(second)
            assert head.startswith("http/1.1 429") and "retry-after: 1\r\n" in head
            assert answer["error"]["type"] == "rate_limit_error"
            assert answer["error"]["code"] == "too_many_body_bytes"
            assert room.taken == 90_000, "the one that was refused gave its bytes back"
            assert client.completions.create(prompt="ab", max_tokens=1, **VALUES).choices
            end = json.dumps({"prompt": "ab", "max_tokens": 1}).encode()
            first.sendall(end.rjust(10_000))
            assert first.recv(100).startswith(b"HTTP/1.1 200"), "the first goes on"
        served.settle()
        with upload(served, 100_000) as gone:
            gone.sendall(b" " * 50_000)
            wait_until(lambda: room.taken == 50_000)
        served.settle()


def test_a_body_takes_no_room_while_its_completion_runs():
    with serving(served_llm()) as served, served.client() as client:
        stream = client.completions.create(prompt=LONG, max_tokens=400, stream=True, **VALUES)
        next(stream)
        assert served.service.concurrency.taken == 1 and served.service.bodies.taken == 0
        stream.close()
        served.settle()


def test_a_client_that_goes_while_its_body_waits_for_the_parser_leaves_none_of_it(monkeypatch):
    parsing, go_on, sizes = threading.Event(), threading.Event(), []

    def slow(llm, settings, raw, *, chat):
        sizes.append(len(raw))
        parsing.set()
        assert go_on.wait(30)
        return parse_request(llm, settings, raw, chat=chat)

    monkeypatch.setattr("spectral_paged.server.app.parse_request", slow)
    with serving(served_llm()) as served, upload(served, 1000) as first:
        room = served.service.bodies
        first.sendall(b" " * 1000)
        assert parsing.wait(30)
        with upload(served, 3000) as second:
            second.sendall(b" " * 3000)
            wait_until(lambda: room.taken == 4000)
        wait_until(lambda: room.taken == 1000)
        go_on.set()
        assert first.recv(100).startswith(b"HTTP/1.1 400")
        served.settle()
    assert sizes == [1000], "what nobody waits for is not parsed"
