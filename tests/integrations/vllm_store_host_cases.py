"""Prompts that left the pages inside vLLM come back from host memory; `make vllm` runs this."""

from __future__ import annotations

import pytest

from spectral_paged.errors import InvalidRequestError
from spectral_paged.integrations.vllm.limits import check_limits
from support.late_copies import LateCopier
from support.vllm_host import Host, engine_config, tokens

pytest_plugins = ["support.vllm_host"]


def lose_the_pool(host):
    """Have every prefix in host memory alone, and its copies late."""
    assert host.scheduler.reset_prefix_cache()
    copier = host.cache._lower.tiers[0]._copier = LateCopier()
    return copier


def hits(host):
    return host.runtime.stats()["prefix_hit_tokens_by_tier"]


def test_a_prompt_comes_back_from_host_memory_while_others_run(folder):
    host = Host(folder, megabytes=64, kv_host_memory=64 << 20)
    host.add(host.request("first", tokens(3000), 5))
    host.finish()
    copier = lose_the_pool(host)
    copier.random.randint = lambda a, b: 12  # questions, one a step and copy
    running = host.request("running", tokens(40, 7), 60)
    host.add(running)
    host.step()
    again = host.request("again", tokens(3000), 5)
    host.add(again)
    for _ in range(3):
        host.step()
    assert again.num_computed_tokens == 0 and again not in host.scheduler.running
    assert running in host.scheduler.running and len(running.output_token_ids) >= 2
    host.finish()
    assert len(again.output_token_ids) == 5 and len(running.output_token_ids) == 60
    assert hits(host)["host"] >= 576


def test_a_prompt_is_loaded_where_nothing_runs(folder):
    host = Host(folder, megabytes=64, kv_host_memory=64 << 20)
    host.add(host.request("first", tokens(3000), 5))
    host.finish()
    lose_the_pool(host)
    host.add(*(host.request(f"r{i}", tokens(3000), 5) for i in range(3)))
    host.finish()
    assert hits(host)["host"] >= 576


def test_a_request_that_is_aborted_while_its_prompt_comes_leaves_nothing(folder):
    host = Host(folder, megabytes=64, kv_host_memory=64 << 20)
    host.add(host.request("first", tokens(3000), 5))
    host.finish()
    lose_the_pool(host).random.randint = lambda a, b: 10**9
    host.add(host.request("again", tokens(3000), 5))
    for _ in range(3):
        host.step()
    assert any(group.borrowed for group in host.cache.groups)
    host.abort("again")
    host.finish()
    assert not any(group.borrowed for group in host.cache.groups)


def test_requests_that_read_no_prefix_load_none(folder):
    host = Host(folder, megabytes=64, kv_host_memory=64 << 20)
    host.add(host.request("first", tokens(3000), 5))
    host.finish()
    lose_the_pool(host)
    host.add(host.request("all", tokens(3000), 5, prompt_logprobs=1))
    host.finish()
    assert hits(host)["host"] == 0


def test_adapters_are_refused_beside_a_folder_and_served_beside_host_memory(folder, tmp_path):
    config = engine_config(folder, kv_host_memory="1GiB", enable_lora=True)
    check_limits(config)
    config = engine_config(folder, kv_store=str(tmp_path), enable_lora=True)
    with pytest.raises(InvalidRequestError, match="kv_store.*adapter"):
        check_limits(config)
