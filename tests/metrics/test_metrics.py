"""Metrics agree with the outputs, cost a step nothing, and distinguish LLMs."""

from __future__ import annotations

import ast
import gc
import importlib
import socket
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from spectral_paged import SamplingParams
from spectral_paged.device import DeviceTimer
from spectral_paged.engine import DURATIONS, METRICS, Distribution, take_snapshot
from spectral_paged.engine.counters import FINISH_REASONS, Durations
from spectral_paged.errors import InvalidRequestError, MissingPackageError, SpectralPagedError
from spectral_paged.metrics import MetricsCollector, serving
from spectral_paged.metrics.prometheus import parse
from support.paths import ROOT
from support.tiny_model import random_prompts, tiny_format, tiny_llm

TOKENS = SamplingParams(temperature=0.0, max_tokens=12)


def scraped(*llms):
    registry = CollectorRegistry()
    MetricsCollector(*llms, registry=registry)
    return parse(generate_latest(registry).decode())


def generate(llm, prompts, params=TOKENS):
    return llm.generate(prompts, params, use_tqdm=False)


@pytest.fixture(scope="module")
def pressed():
    """An LLM that preempted, and all its outputs: shared beginnings, and a request of two."""
    llm = tiny_llm(kv_cache_bytes=700_000, max_num_seqs=8)
    shared, *ends = random_prompts([704, 5, 90, 70, 300, 280, 310], seed=9)
    params = SamplingParams(temperature=0.0, max_tokens=70)
    outputs = generate(llm, [shared], params)
    outputs += generate(llm, [shared + e for e in ends[:3]] + ends, params)
    twice = SamplingParams(temperature=1.0, seed=1, max_tokens=4, n=2)
    return llm, outputs + generate(llm, [ends[1]], twice)


def test_counters_are_what_the_outputs_say(pressed):
    llm, outputs = pressed
    [snapshot] = scraped(llm)
    completions = [c for o in outputs for c in o.outputs]
    want = {
        "prompt_tokens": sum(len(o.prompt_token_ids) for o in outputs),
        "generation_tokens": sum(len(c.token_ids) for c in completions),
        "prefix_cache_queries": sum(len(o.prompt_token_ids) for o in outputs),
        "prefix_cache_hits": sum(o.metrics.num_cached_tokens for o in outputs),
        "num_preemptions": sum(o.metrics.num_preemptions for o in outputs),
        "recomputed_tokens": sum(o.metrics.num_recomputed_tokens for o in outputs),
        "num_requests_running": 0,
        "num_requests_waiting": 0,
    }
    assert {name: snapshot.value(name) for name in want} == want
    assert want["num_preemptions"] and want["recomputed_tokens"] and want["prefix_cache_hits"]
    ended = dict.fromkeys(FINISH_REASONS, 0.0)
    for completion in completions:
        ended[completion.finish_reason] += 1
    assert snapshot.labels("request_success") == ended


def test_pages_and_bytes_are_those_of_stats(pressed):
    llm, outputs = pressed
    [snapshot], stats = scraped(llm), llm.stats()
    for name in ("pages_sealed", "pages_attended", "compression_ratio"):
        assert snapshot.value(name) == stats[name] > 0
    assert snapshot.value("seal_time_seconds") == stats["seal_seconds"] > 0
    assert snapshot.value("pages_sealed") == sum(o.metrics.num_pages_sealed for o in outputs) > 0


def test_forks_count_the_pages_of_their_prompt_once():
    llm = tiny_llm()
    params = SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=3)
    [output] = generate(llm, random_prompts([1700]), params)
    assert output.metrics.num_pages_sealed == llm.stats()["pages_sealed"] == 3 * 2


@pytest.mark.parametrize("aborted", [False, True])
def test_pages_sealed_before_a_preemption_are_counted_with_those_after(aborted):
    llm = tiny_llm(kv_cache_bytes=700_000, enable_prefix_caching=False)
    engine, found = llm.engine, []
    for i, prompt in enumerate(random_prompts([700] * 4)):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=300))
    while engine.has_unfinished():
        found += [o.metrics for o in engine.step() if o.finished]
        waiting = [r for r in engine.scheduler.waiting if r.num_preemptions]
        if aborted and waiting:
            name = waiting[0].request_id.removesuffix("#0")
            found.append(engine.requests.by_id[name].metrics)
            engine.abort(name)
    assert len(found) == 4 and sum(m.num_preemptions for m in found) > 0
    assert all(m.num_pages_sealed for m in found)
    assert sum(m.num_pages_sealed for m in found) == llm.stats()["pages_sealed"]


def test_latencies_are_counted_once_a_request_and_once_a_gap(pressed):
    llm, outputs = pressed
    durations = scraped(llm)[0].durations
    gaps = sum(len(c.token_ids) - 1 for o in outputs for c in o.outputs)
    assert durations["inter_token_latency_seconds"].count == gaps
    first = durations["time_to_first_token_seconds"]
    assert first.count == durations["e2e_request_latency_seconds"].count == len(outputs)
    want = sum(o.metrics.first_token_time - o.metrics.arrival_time for o in outputs)
    assert first.total == pytest.approx(want)


def test_a_resume_that_finds_its_own_pages_is_no_hit_of_a_prompt(pressed):
    llm, outputs = pressed
    hits = sum(o.metrics.num_cached_tokens for o in outputs)
    assert llm.stats()["prefix_hit_tokens"] == hits
    assert llm.stats()["resumed_hit_tokens"] > 0


def test_requests_that_end_badly_are_counted_by_how(monkeypatch):
    llm = tiny_llm()
    with pytest.raises(SpectralPagedError):
        generate(llm, [[], [1] * 9999, [1, 2]])
    llm.engine.add_request("gone", [1, 2, 3], TOKENS)
    llm.engine.abort("gone")
    forward = llm.engine.runner.forward
    monkeypatch.setattr(llm.engine.runner, "forward", lambda *a: forward(*a) * float("nan"))
    with pytest.raises(SpectralPagedError):
        generate(llm, [[1, 2, 3, 4]])
    [snapshot] = scraped(llm)
    assert snapshot.labels("request_refused") == {"EmptyPromptError": 1, "PromptTooLongError": 1}
    ended = snapshot.labels("request_success")
    assert ended == {"stop": 0, "length": 1, "repetition": 0, "abort": 1, "error": 1}
    assert snapshot.value("prompt_tokens") == 2, "only what was served"
    assert snapshot.durations["e2e_request_latency_seconds"].count == 1


@pytest.mark.parametrize("bad", [{"prompt_token_ids": [1], "x": 1}, {"cache_salt": "a"}, "text"])
def test_every_prompt_that_is_refused_is_counted_and_logged(bad, caplog):
    llm = tiny_llm()
    with caplog.at_level("INFO", "spectral_paged"), pytest.raises(InvalidRequestError):
        generate(llm, [bad])
    assert llm.stats()["refused"] == {"InvalidRequestError": 1}
    assert [r.event for r in caplog.records if hasattr(r, "event")] == ["refusal"]


def test_conversations_that_are_refused_are_counted_and_logged(caplog):
    llm = tiny_llm()
    with caplog.at_level("INFO", "spectral_paged"), pytest.raises(InvalidRequestError):
        llm.chat([{"role": "user", "content": "no template"}], use_tqdm=False)
    assert llm.stats()["refused"] == {"InvalidRequestError": 1}
    assert [r.event for r in caplog.records if hasattr(r, "event")] == ["refusal"]


def test_without_prefix_caching_nothing_is_asked_for():
    llm = tiny_llm(enable_prefix_caching=False)
    generate(llm, [[1, 2, 3]])
    [snapshot] = scraped(llm)
    assert snapshot.value("prefix_cache_queries") == 0 and snapshot.value("prompt_tokens") == 3


def test_what_is_scraped_is_what_was_read(pressed):
    llm, _ = pressed
    [found], want = scraped(llm), take_snapshot(llm)
    assert (found.model_name, found.engine, found.values) == (
        want.model_name,
        want.engine,
        want.values,
    )
    assert found.durations == want.durations and set(found.durations) == set(DURATIONS)
    assert {name for name, _ in found.values} == {f.name for f in METRICS} - {"request_refused"}


def test_two_llms_are_told_apart_and_a_dropped_one_is_exported_no_more():
    registry = CollectorRegistry(auto_describe=True)
    one, two = tiny_llm(), tiny_llm(tiny_format("exact"))
    MetricsCollector(one, two, registry=registry)
    generate(one, [[1, 2, 3]])
    first, second = parse(generate_latest(registry).decode())
    assert (first.engine, second.engine) == ("0", "1")
    assert (first.value("prompt_tokens"), second.value("prompt_tokens")) == (3, 0)
    del two
    gc.collect()
    assert [r.engine for r in parse(generate_latest(registry).decode())] == ["0"]


def test_steps_read_no_figure_when_nobody_scrapes(monkeypatch):
    llm = tiny_llm()
    MetricsCollector(llm, registry=CollectorRegistry())
    for owner, name in ((llm.engine, "stats"), (llm.cache, "stats"), (Durations, "distribution")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("read by a step"))
    assert len(generate(llm, [[1, 2, 3]])[0].outputs[0].token_ids) == 12
    assert Durations([1.0]).append.__self__.__class__ is list, "a token pays an append"


def test_another_thread_may_scrape_while_steps_run():
    llm = tiny_llm()
    registry, errors, done = CollectorRegistry(), [], threading.Event()
    MetricsCollector(llm, registry=registry)

    def scrape():
        while not done.wait(0.01):  # at once again, steps would wait for the interpreter
            try:
                generate_latest(registry)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        generate(llm, random_prompts([5] * 40))
    finally:
        done.set()
        thread.join()
    assert errors == []


def test_a_sequence_freed_while_its_bytes_are_read_is_left_out(monkeypatch):
    llm = tiny_llm()
    generate(llm, [[1, 2, 3] * 30])
    want = llm.stats()["compression_ratio"]
    state = llm.cache._sequences.add(
        "gone",
        num_prompt_tokens=1,
        token_ids=None,
        cache_salt="",
        pinned=(),
        resumed=False,
        max_cached_tokens=None,
    )
    llm.cache.free("gone")
    monkeypatch.setattr(llm.cache._sequences, "all", lambda: [state])
    assert llm.stats()["compression_ratio"] == want


@pytest.mark.parametrize("count", [1, 100, 2 * Durations.FOLD_AT + 7])
def test_buckets_hold_every_duration_once(count):
    held, rng = Durations([0.1, 0.5, 1.0]), np.random.default_rng(0)
    seconds = rng.uniform(0, 1.2, count)
    for second in seconds.tolist():
        held.append(second)
        held.fold_if_long()
    assert len(held._fresh) < Durations.FOLD_AT
    found = held.distribution()
    edges = [-1, 0.1, 0.5, 1.0, 9]
    assert found.counts == tuple(np.histogram(seconds, edges)[0].tolist())
    assert found.total == pytest.approx(seconds.sum()) and found.count == count
    assert held.distribution() == found


def test_a_bound_belongs_to_its_bucket():
    held = Durations([0.1, 0.5])
    held.append(0.1)
    assert held.distribution().counts == (1, 0, 0)


def test_quantiles_are_interpolated_in_a_bucket():
    spread = Distribution((1.0, 2.0), (10, 10, 0), 0.0)
    assert (spread.quantile(0.25), spread.quantile(0.75)) == (0.5, 1.5)
    assert Distribution((1.0,), (0, 0), 0.0).quantile(0.5) is None
    assert Distribution((1.0,), (1, 9), 0.0).quantile(0.9) == float("inf")


def test_a_timer_adds_up_what_runs_inside(monkeypatch):
    ticks = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("spectral_paged.device.timing.time.perf_counter", lambda: next(ticks))
    timer = DeviceTimer(torch.device("cpu"))
    for _ in range(2):
        with timer:
            pass
    assert timer.seconds == 2.5


class FakeEvent:
    """Stands in for a CUDA event; has passed when the test says so."""

    passed, threads = False, []

    def __init__(self, **_):
        pass

    def record(self):
        pass

    def query(self):
        self.threads.append(threading.get_ident())
        return self.passed

    def elapsed_time(self, end):
        return 250.0


def test_a_timer_on_cuda_asks_its_events_from_its_own_thread_only(monkeypatch):
    """A query from a scraper's thread would break a graph that is captured meanwhile."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    timer, other = DeviceTimer(torch.device("cuda")), []
    for _ in range(2):
        with timer:
            pass
    assert timer.seconds == 0.0, "not passed: not counted, not waited for"
    monkeypatch.setattr(FakeEvent, "passed", True)
    reader = threading.Thread(target=lambda: other.append(timer.seconds))
    reader.start()
    reader.join()
    assert other == [0.0] and timer.seconds == 0.5
    assert set(FakeEvent.threads) == {threading.get_ident()}


@pytest.mark.parametrize(
    "queued, caught_up, waiting",
    [(0.1, True, 0.1), (3.0, True, 0.25), (0.1, False, 0.0), (3.0, False, 0.0)],
)
def test_a_timer_says_how_long_the_device_may_have_waited(monkeypatch, queued, caught_up, waiting):
    """The device waits where it reached the begin before the host had queued the rest: not longer
    than the host took, nor than the work."""
    ticks = iter([1.0, 1.0 + queued])
    monkeypatch.setattr("spectral_paged.device.timing.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "passed", False)
    timer = DeviceTimer(torch.device("cuda"))
    with timer:
        monkeypatch.setattr(FakeEvent, "passed", caught_up)
    monkeypatch.setattr(FakeEvent, "passed", True)
    assert timer.seconds == 0.25
    assert timer.waiting_seconds == pytest.approx(waiting)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_timer_on_a_gpu_tells_work_from_waiting():
    timer = DeviceTimer(torch.device("cuda"))
    with timer:  # the device has nothing to do but to wait
        time.sleep(0.2)
    torch.cuda.synchronize()
    assert 0.15 < timer.waiting_seconds <= timer.seconds
    before = timer.waiting_seconds
    torch.cuda._sleep(10**9)
    with timer:  # queued while the device is busy
        torch.cuda._sleep(10**8)
    torch.cuda.synchronize()
    assert timer.waiting_seconds == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_timer_on_a_gpu_counts_its_work_and_waits_for_nothing():
    timer = DeviceTimer(torch.device("cuda"))
    with timer:
        torch.cuda._sleep(10**9)
    assert timer.seconds == 0.0, "still running: not counted, not waited for"
    torch.cuda.synchronize()
    assert timer.seconds > 0.05


def test_an_endpoint_answers_while_it_serves_and_is_gone_after():
    llm = tiny_llm()
    with serving(0) as (collector, port):
        collector.add(llm)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert [r.model_name for r in parse(answer.read().decode())] == [llm.model_name]
        with pytest.raises(OSError, match="another --metrics-port"), serving(port):
            pass
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "spectral_paged.metrics.prometheus")
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[metrics\]'"):
        importlib.import_module("spectral_paged.metrics.prometheus")


def test_only_their_own_modules_import_what_an_extra_brings():
    """And what imports those is itself imported only when it is used."""
    folder = ROOT / "spectral_paged"
    want = {
        "prometheus_client": {"prometheus", "app", "access_log"},
        "rich": {"top"},
        "fastapi": {"app", "description", "dev_routes"},
        "starlette": {"app", "access_log", "event_stream"},
        "uvicorn": {"http_server"},
        "ray": {"ray"},
        "pyarrow": {"ray"},
        "spectral_paged.metrics.prometheus": set(),
        "spectral_paged.server.access_log": {"app"},
        "spectral_paged.server.dev_routes": {"app"},
        "spectral_paged.server.event_stream": {"app"},
        "spectral_paged.server.app": {"http_server"},
        "spectral_paged.server.http_server": set(),
        "spectral_paged.integrations.ray": set(),
    }
    users = {package: set() for package in want}
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # what runs when a module is imported
            nodes = ast.walk(node) if isinstance(node, ast.Try) else [node]
            for found in nodes:
                names = [a.name for a in found.names] if isinstance(found, ast.Import) else []
                if isinstance(found, ast.ImportFrom) and found.module:
                    names = [found.module]
                for package, modules in users.items():
                    if any(f"{name}.".startswith(f"{package}.") for name in names):
                        modules.add(path.stem)
    assert users == want
