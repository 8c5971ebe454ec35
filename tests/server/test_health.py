"""`/health` reports steps that raised, until a new token shows that the engine works again."""

from __future__ import annotations

import time
import urllib.error
import urllib.request

import openai
import pytest
import torch

from spectral_paged import SamplingParams
from spectral_paged.server.engine_thread import MAX_FAILED_STEPS, EngineThread
from support.served import VALUES, flaky, served_llm, serving, wait_until


def health(served):
    try:
        return urllib.request.urlopen(f"{served.url}/health").status
    except urllib.error.HTTPError as error:
        assert "broken" not in error.read().decode(), "what an exception says is the log's alone"
        return error.code


def test_health_comes_back_without_a_request_once_steps_go_again(monkeypatch):
    """A balancer sends none to a server that /health calls ill: one that waited for a client's step
    to succeed would stay out for ever."""
    monkeypatch.setattr("spectral_paged.server.engine_thread.PROBE_SECONDS", 0.2)
    llm = served_llm()
    with serving(llm) as served, served.client() as client:
        errors = [RuntimeError("broken") for _ in range(2 * MAX_FAILED_STEPS)]
        flaky(llm, monkeypatch, errors)
        with pytest.raises(openai.InternalServerError, match="reference"):
            client.completions.create(prompt="ab", max_tokens=9, **VALUES)
        assert health(served) == 503
        wait_until(lambda: len(errors) < MAX_FAILED_STEPS)
        assert health(served) == 503 or not errors, "a probe that fails is no sign of health"
        wait_until(lambda: health(served) == 200)
        assert not errors
        served.settle()
        steps = llm.stats()["steps"]
        time.sleep(0.5)
        assert llm.stats()["steps"] == steps, "who is well is not probed"
        assert client.completions.create(prompt="ab", max_tokens=9, **VALUES).choices


def test_a_step_that_was_only_queued_is_no_sign_of_health(monkeypatch):
    """Where steps are queued ahead, as on a GPU, what a step raises may come with the next call."""
    llm = served_llm()
    engine = EngineThread(llm)
    flaky(llm, monkeypatch, [RuntimeError("broken")])
    llm.engine.add_request("a", [4, 5], SamplingParams(max_tokens=1))
    engine._step()
    assert "engine steps raise" in engine.problem
    step = llm.engine.step
    monkeypatch.setattr(llm.engine, "step", list)
    engine._step()
    assert "engine steps raise" in engine.problem
    monkeypatch.setattr(llm.engine, "step", step)
    engine._step()
    assert engine.problem is None and not llm.engine.has_unfinished()


def test_a_probe_that_ends_in_an_error_is_no_sign_of_health(monkeypatch):
    """Steps raise no more, but every request fails: who is sent here again gets nothing but 500."""
    monkeypatch.setattr("spectral_paged.server.engine_thread.PROBE_SECONDS", 0.2)
    llm = served_llm()
    forward, errors = llm.engine.runner.forward, [RuntimeError("broken")] * MAX_FAILED_STEPS
    spoils = True

    def spoiled(*args, **kwargs):
        if errors:
            raise errors.pop()
        logits = forward(*args, **kwargs)
        return torch.full_like(logits, float("nan")) if spoils else logits

    monkeypatch.setattr(llm.engine.runner, "forward", spoiled)
    with serving(llm) as served, served.client() as client:
        with pytest.raises(openai.InternalServerError, match="reference"):
            client.completions.create(prompt="ab", max_tokens=9, **VALUES)
        begin = time.monotonic()
        wait_until(lambda: llm.stats()["finished"]["error"] >= 2)
        assert time.monotonic() - begin > 0.2, "probes are not made one after the other"
        assert health(served) == 503
        spoils = False
        wait_until(lambda: health(served) == 200)
        served.settle()
