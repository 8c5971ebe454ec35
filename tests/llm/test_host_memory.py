"""Prompts that come back from host memory get the tokens that they would get without it."""

from __future__ import annotations

import pytest

from spectral_paged import SamplingParams
from spectral_paged.engine import METRICS, take_snapshot
from spectral_paged.metrics.prometheus import parse
from spectral_paged.openai.response import usage
from support.late_copies import LateCopier
from support.tiny_model import random_prompts, tiny_format, tiny_llm

PROMPTS = random_prompts([1300, 1700, 1200, 1500])
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)


def small(format, **options):
    """An LLM whose cache holds two of the prompts at a time."""
    given = "exact" if format == "exact" else tiny_format(format)
    size = 1_200_000 if format == "exact" else 2 << 20
    return tiny_llm(given, kv_cache_bytes=size, max_num_seqs=2, **options)


def rounds(llm, params):
    """The outputs of two rounds of the prompts, the second with longer ones."""
    outputs = []
    for tail in ([], [7, 8, 9]):
        outputs += llm.generate([p + tail for p in PROMPTS], params, use_tqdm=False)
        llm.cache.check_integrity()
    return outputs


@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
@pytest.mark.parametrize("late", [False, True])
def test_tokens_are_the_same_with_and_without_host_memory(format, late):
    params = SEEDED if late else GREEDY
    with small(format) as llm:
        plain = rounds(llm, params)
    with small(format, kv_host_memory="16MiB") as llm:
        if late:
            llm.cache._lower.tiers[0]._copier = LateCopier(seed=1)
        stored = rounds(llm, params)
        figures = llm.stats()
    tokens = [[o.outputs[0].token_ids for o in run] for run in (plain, stored)]
    assert tokens[0] == tokens[1]
    found = [o.metrics for o in stored]
    assert all(m.num_host_cached_tokens <= m.num_cached_tokens for m in found)
    assert sum(m.num_host_cached_tokens for m in found[4:]) > 2000, "most came from the pool"
    by_tier = figures["prefix_hit_tokens_by_tier"]
    assert sum(by_tier.values()) == figures["prefix_hit_tokens"]
    assert by_tier["host"] == sum(m.num_host_cached_tokens for m in found)
    assert figures["store_read_bytes"]["host"] > 0 == figures["store_failures"]["host"]
    assert not sum(o.metrics.num_host_cached_tokens for o in plain)


def test_usage_says_what_came_from_host_memory():
    with small("spectral-int8", kv_host_memory="16MiB") as llm:
        outputs = rounds(llm, GREEDY)
    hosts = [o.metrics.num_host_cached_tokens for o in outputs]
    warm = outputs[hosts.index(max(hosts))]
    details = usage([warm])["prompt_tokens_details"]
    assert details == {
        "cached_tokens": warm.metrics.num_cached_tokens,
        "host_cached_tokens": max(hosts),
    }
    assert usage(outputs[:1])["prompt_tokens_details"] == {"cached_tokens": 0}


def test_figures_by_tier_are_exported_and_shown():
    from prometheus_client import CollectorRegistry, generate_latest

    from spectral_paged.metrics import MetricsCollector
    from spectral_paged.metrics.top import View

    registry = CollectorRegistry()
    with small("spectral-int8", kv_host_memory="16MiB") as llm:
        MetricsCollector(llm, registry=registry)
        rounds(llm, GREEDY)
        stats = llm.stats()
        (read,) = parse(generate_latest(registry).decode())
        for spec in METRICS:
            if spec.label == "tier":
                assert read.labels(spec.name) == stats[spec.key], spec.name
        assert "host 1" in str_of(View().draw([take_snapshot(llm)]))
    with small("spectral-int8") as llm:
        assert "store" not in str_of(View().draw([take_snapshot(llm)]))


def str_of(drawn):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as text:
        console.print(drawn)
    return text.get()


def test_aborted_requests_leave_nothing_on_its_way():
    with small("spectral-int8", kv_host_memory="16MiB") as llm:
        rounds(llm, GREEDY)
        llm.cache.reset_prefix_cache()
        copier = llm.cache._lower.tiers[0]._copier = LateCopier()
        copier.random.randint = lambda a, b: 10**9
        llm.engine.add_request("a", PROMPTS[1], GREEDY)
        for _ in range(3):
            assert llm.engine.step() == []  # nothing runs, and nothing is stalled
        assert llm.cache._lower.moves.ahead._loads
        llm.engine.abort("a")
        assert not llm.cache._lower.moves.ahead._loads and not llm.engine.has_unfinished()
        llm.cache.check_integrity()


def mapped():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096


def test_close_gives_host_memory_back():
    size = 8 << 30  # mapped, hardly touched
    llm = small("spectral-int8", kv_host_memory=size, debug_poison=False)
    before = mapped()
    llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    llm.close()
    assert before - mapped() > 0.9 * size
