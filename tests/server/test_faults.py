"""Each client gets its own answer when others leave, requests or steps fail, or the server ends.

The pool is whole afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import openai
import pytest

from spectral_paged import SamplingParams
from spectral_paged.errors import PoolError
from spectral_paged.server.api_error import ApiError
from spectral_paged.server.engine_thread import MAX_FAILED_STEPS, EngineThread
from support.served import LONG, VALUES, flaky, served_llm, serving, wait_until


def test_random_aborts_under_load_leave_the_pool_whole():
    """64 at once, a third of them leave early; the others get what they get alone."""
    llm = served_llm(kv_cache_bytes=3 << 20)
    chance = random.Random(7)
    prompts = [f"{i} {LONG[: chance.choice([3, 80, 700])]}" for i in range(64)]
    plans = [
        (
            prompt,
            chance.choice(["stream", "whole", "chat"]),
            chance.random() < 0.35,
            chance.randint(1, 40),
            chance.choice([1, 1, 2]),
        )
        for prompt in prompts
    ]

    async def one(client, prompt, kind, leaves, num_tokens, n):
        values = VALUES | {"max_tokens": num_tokens, "n": n}
        if kind == "chat":
            messages = [{"role": "user", "content": prompt}]
            ask = client.chat.completions.create(messages=messages, **values)
        else:
            ask = client.completions.create(prompt=prompt, stream=kind == "stream", **values)
        if leaves and kind != "stream":
            task = asyncio.ensure_future(ask)
            await asyncio.sleep(chance.random())
            return "answered" if task.done() else task.cancel()
        answer = await ask
        if kind != "stream":
            assert len(answer.choices) == n and answer.usage.completion_tokens == n * num_tokens
            return "answered"
        ends = 0
        async for chunk in answer:
            ends += chunk.choices[0].finish_reason == "length"
            if leaves and chance.random() < 0.3:
                await answer.close()
                return "left"
        assert ends == n
        return "answered"

    async def all_of_them(served):
        async with served.async_client() as client:
            return await asyncio.gather(*(one(client, *plan) for plan in plans))

    with serving(llm) as served:
        results = asyncio.run(all_of_them(served))
        assert results.count("answered") >= sum(not leaves for _, _, leaves, _, _ in plans)
        served.settle()
        aborted = llm.stats()["finished"]["abort"]
        assert aborted > 0
        with served.client() as client:
            answer = client.completions.create(prompt=LONG, max_tokens=5, **VALUES)
        alone = served_llm().engine
        alone.add_request("x", LONG, SamplingParams(temperature=0.0, max_tokens=5))
        while alone.has_unfinished():
            outputs = alone.step()
        assert answer.choices[0].text == outputs[0].outputs[0].text
        served.settle()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_gives_its_seats_and_slots_back(stream):
    llm = served_llm(max_num_seqs=2)
    values = VALUES | {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 3000}
    with serving(llm) as served, served.client(timeout=0.7 if not stream else 30) as client:
        if stream:
            answer = client.completions.create(stream=True, **values)
            for _ in range(4):
                next(answer)
            assert served.service.concurrency.taken == 6
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**values)
        served.settle()
        assert llm.stats()["finished"]["abort"] == 6


def spoiling(llm, monkeypatch, victim, kind):
    """Requests whose prompt begins with `victim` get NaN, or no memory, from their sixth token."""
    forward, engine = llm.engine.runner.forward, llm.engine

    def spoil(plan, token_ids, rows, pending=None):
        ends = [e.seq_id for e in plan.entries]
        requests = [engine.requests.by_sequence[seq_id].request for seq_id in ends]
        bad = [r.token_ids[0] == victim and r.num_tokens > 5 for r in requests]
        if any(bad) and kind == "memory":
            raise MemoryError
        logits = forward(plan, token_ids, rows, pending).clone()
        for row in range(len(rows) if len(ends) == len(rows) else 0):
            logits[row, 3] = float("nan") if bad[row] else logits[row, 3]
        return logits

    monkeypatch.setattr(llm.engine.runner, "forward", spoil)


@pytest.mark.parametrize("kind, message", [("nan", "NaN or Inf"), ("memory", "reference")])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_request_that_fails_answers_its_own_client_alone(
    monkeypatch, caplog, stream, kind, message
):
    llm = served_llm()
    spoiling(llm, monkeypatch, victim=9, kind=kind)

    async def both(served):
        async with served.async_client() as client:
            good = client.completions.create(prompt=[4, 5], max_tokens=20, **VALUES)
            bad = client.completions.create(
                prompt=[[9, 5], [6]], max_tokens=20, stream=stream, **VALUES
            )
            if stream:
                bad = drain(await bad)
            return await asyncio.gather(good, bad, return_exceptions=True)

    async def drain(chunks):
        async for _ in chunks:
            pass

    with serving(llm) as served:
        good, bad = asyncio.run(both(served))
        assert good.usage.completion_tokens == 20
        assert isinstance(bad, openai.APIError if stream else openai.InternalServerError)
        assert message in str(bad) and bad.code == "generation_failed"
        if kind == "memory":
            assert "MemoryError" not in str(bad) and "MemoryError" in logged(caplog, bad)
        served.settle()


def test_a_step_that_raises_once_is_taken_again(monkeypatch):
    llm = served_llm()
    with serving(llm) as served, served.client() as client:
        want = client.completions.create(prompt="ab", max_tokens=9, **VALUES)
        flaky(llm, monkeypatch, [RuntimeError("the device is busy"), MemoryError()])
        got = client.completions.create(prompt="ab", max_tokens=9, **VALUES)
        assert got.choices[0].text == want.choices[0].text
        served.settle()


def logged(caplog, error):
    """What the log has under the reference that a client got."""
    [reference] = re.findall("reference ([0-9a-f]{16})", str(error))
    [record] = [r for r in caplog.records if getattr(r, "reference", None) == reference]
    return record.getMessage()


def test_steps_that_keep_raising_answer_500_and_the_server_goes_on(monkeypatch, caplog):
    llm = served_llm()
    with serving(llm) as served, served.client() as client:
        flaky(llm, monkeypatch, [RuntimeError("broken") for _ in range(MAX_FAILED_STEPS)])
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(prompt="ab", max_tokens=9, **VALUES)
        assert "broken" not in str(failed.value) and "broken" in logged(caplog, failed.value)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{served.url}/health")
        problem = json.load(caught.value)["problem"]
        assert caught.value.code == 503
        assert "broken" not in problem and "broken" in logged(caplog, problem)
        assert client.completions.create(prompt="ab", max_tokens=9, **VALUES).choices
        assert urllib.request.urlopen(f"{served.url}/health").status == 200
        served.settle()


def test_a_bug_is_answered_500_and_told_to_the_log_alone(monkeypatch, caplog):
    with serving(served_llm()) as served, served.client() as client:
        monkeypatch.setattr("spectral_paged.server.app.parse_request", broken)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(prompt="ab", **VALUES)
        assert caught.value.code == "internal" and "secret detail" not in str(caught.value)
        assert "secret detail" in logged(caplog, caught.value)
        with urllib.request.urlopen(f"{served.url}/metrics") as answer:
            counted = (
                'http_requests_total{handler="/v1/completions",method="POST",status="500"} 1.0'
            )
            assert counted in answer.read().decode()
        served.settle()


def broken(*_, **__):
    raise RuntimeError("secret detail")


def test_where_the_engines_thread_ends_everybody_hears_of_it(monkeypatch, caplog):
    """Who is served, who is being queued, and who comes after."""
    llm = served_llm()
    with serving(llm) as served, served.client() as client:
        stream = client.completions.create(prompt="ab", max_tokens=4000, stream=True, **VALUES)
        next(stream)
        monkeypatch.setattr(llm.engine, "has_unfinished", raising_pool_error)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert "a slot" not in str(caught.value) and "a slot" in logged(caplog, caught.value)
        assert served.service.engine.died
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            client.completions.create(prompt="ab", **VALUES)
        wait_until(lambda: served.server.should_exit)


def test_an_engine_that_cannot_even_abort_leaves_nobody_waiting(monkeypatch, caplog):
    llm = served_llm()
    engine, stepping, go_on = EngineThread(llm), threading.Event(), threading.Event()

    def broken_step():
        stepping.set()
        assert go_on.wait(30)
        raise RuntimeError("an illegal memory access")

    def broken_abort(request_id):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(llm.engine, "step", broken_step)
    monkeypatch.setattr(llm.engine, "abort", broken_abort)

    async def run():
        engine.start()
        first = await engine.submit("a", [[4, 5]], SamplingParams())
        await asyncio.to_thread(stepping.wait, 30)
        late = asyncio.ensure_future(engine.submit("b", [[4, 5]], SamplingParams()))
        go_on.set()
        with pytest.raises(ApiError) as caught:
            await asyncio.wait_for(first.outputs(), 30)
        assert "illegal" not in str(caught.value) and "illegal" in logged(caplog, caught.value)
        with contextlib.suppress(ApiError):  # queued before the end, or told of it
            await asyncio.wait_for((await late).outputs(), 30)
        await engine.stop()

    asyncio.run(run())
    assert engine.died


def raising_pool_error():
    raise PoolError("a slot was lost")


def test_who_is_being_queued_when_the_engine_stops_gets_an_answer(monkeypatch):
    llm = served_llm()
    engine, step = EngineThread(llm), llm.engine.step
    stepping, go_on = threading.Event(), threading.Event()

    def blocking():
        stepping.set()
        assert go_on.wait(30)
        return step()

    monkeypatch.setattr(llm.engine, "step", blocking)

    async def run():
        engine.start()
        first = await engine.submit("a", [[4, 5]], SamplingParams())
        await asyncio.to_thread(stepping.wait, 30)
        late = asyncio.ensure_future(engine.submit("b", [[4, 5]], SamplingParams()))
        stop = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0.05)
        go_on.set()
        for waiting in (late, first.outputs()):
            with pytest.raises(ApiError) as caught:
                await asyncio.wait_for(waiting, 30)
            assert caught.value.status == 503
        await stop
        with pytest.raises(ApiError, match="shutting down"):
            await engine.submit("c", [[4, 5]], SamplingParams())

    asyncio.run(run())
    assert not llm.engine.has_unfinished()
    llm.cache.check_integrity()


@pytest.mark.parametrize("grace, finishes", [(30.0, True), (0.3, False)])
def test_an_end_lets_requests_finish_while_there_is_grace(grace, finishes):
    llm = served_llm()
    got = {}
    with serving(llm, grace_seconds=grace) as served, served.client() as client:
        stream = client.completions.create(
            prompt="ab", max_tokens=300 if finishes else 4000, stream=True, **VALUES
        )

        def whole():
            try:
                got["whole"] = client.completions.create(
                    prompt="cd", max_tokens=300 if finishes else 4000, **VALUES
                )
            except openai.APIError as error:
                got["whole"] = error

        thread = threading.Thread(target=whole)
        thread.start()
        next(stream)
        wait_until(lambda: served.service.concurrency.taken == 2)
        served.server.should_exit = True
        wait_until(lambda: served.service.stopping)
        with served.client() as late, pytest.raises(openai.APIError):
            late.completions.create(prompt="x", **VALUES)
        if finishes:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        else:
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        thread.join()
        if finishes:
            assert got["whole"].usage.completion_tokens == 300
        else:
            assert got["whole"].status_code == 503
    assert not llm.engine.has_unfinished() and not served.service.engine._thread.is_alive()
    llm.cache.check_integrity()


def test_who_takes_nothing_of_a_stream_gives_its_seats_back():
    """Its connection is open, and the engine has long made all that it asked for."""
    body = json.dumps(
        {"prompt": "ab", "stream": True, "max_tokens": 150, "n": 4, "logprobs": 20}
    ).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    )
    llm = served_llm()
    with serving(llm, max_num_requests=4, send_seconds=0.5) as served, socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
        wait_until(lambda: served.server.server_state.connections)
        for connection in list(served.server.server_state.connections):
            sending = connection.transport.get_extra_info("socket")
            sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        raw.sendall(head + body)
        wait_until(lambda: served.service.concurrency.taken == 4)
        wait_until(lambda: served.service.concurrency.taken == 0)
        assert llm.stats()["generated_tokens"] > 0
        with served.client() as client:
            assert client.completions.create(prompt="ab", max_tokens=1, **VALUES).choices
        served.settle()


@pytest.mark.model
def test_the_command_serves_a_real_model_until_it_is_told_to_stop(tmp_path):
    command = [
        sys.executable,
        "-m",
        "spectral_paged.cli",
        "serve",
        "smollm2-135m",
        "--port",
        "0",
        "--kv-cache-bytes",
        "64MiB",
        "--max-model-len",
        "2048",
        "--served-model-name",
        "small",
        "--log-format",
        "json",
    ]
    env = os.environ | {"SPECTRAL_PAGED_API_KEY": "secret"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    try:
        line = next(line for line in process.stderr if line.startswith("serving small at "))
        with openai.OpenAI(base_url=line.split()[-1], api_key="secret") as client:
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            values = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 12}
            answer = client.chat.completions.create(**values)
            assert "Paris" in answer.choices[0].message.content
            with client.chat.completions.create(stream=True, **values) as stream:
                text = "".join(c.choices[0].delta.content or "" for c in stream)
            assert text == answer.choices[0].message.content
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert '"event": "http"' in log and "France" not in log
