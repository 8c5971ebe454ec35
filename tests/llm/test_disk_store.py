"""Prompts outlive an LLM on disk, and get the tokens that they would get without it."""

from __future__ import annotations

import functools
import shutil
import threading

import pytest
import torch

from spectral_paged import LLM, SamplingParams
from spectral_paged.errors import CapacityError, FormatError, InvalidRequestError
from spectral_paged.openai.response import usage
from spectral_paged.store import BadRecordError, Folder, host_tier
from support.cache_feed import Feed, drive, fmt, make
from support.late_copies import LateCopier
from support.stored_prompts import ready
from support.tiny_model import random_prompts, tiny_format, tiny_llm, tiny_model

PROMPTS = random_prompts([1300, 1700, 1200])
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)


def run(folder, params=GREEDY, format="spectral-int8", tail=(), **options):
    """Outputs of an LLM of its own, and its figures."""
    given = "exact" if format == "exact" else tiny_format(format)
    size = 1_200_000 if format == "exact" else 2 << 20
    with tiny_llm(given, kv_cache_bytes=size, max_num_seqs=2, kv_store=folder, **options) as llm:
        prompts = [p + list(tail) for p in PROMPTS]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        llm.cache.check_integrity()
        return outputs, llm.stats()


def tokens(outputs):
    return [o.outputs[0].token_ids for o in outputs]


@functools.cache
def plain():
    """What an LLM without a store says to `PROMPTS`."""
    return tokens(run(None)[0])


@pytest.fixture(scope="module")
def first_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "kept"
    run(folder)
    return folder


@pytest.fixture
def kept(first_folder, tmp_path):
    """A folder in which `PROMPTS` are kept."""
    return shutil.copytree(first_folder, tmp_path / "kept")


@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_restart_is_warm_and_says_the_same(tmp_path, format, params):
    plain, _ = run(None, params, format, [7, 8])
    first, figures = run(tmp_path / "s", params, format)
    assert figures["prefix_hit_tokens_by_tier"]["disk"] == 0
    again, figures = run(tmp_path / "s", params, format, [7, 8])
    assert tokens(again) == tokens(plain)
    from_disk = [o.metrics.num_disk_cached_tokens for o in again]
    # a load that gave way finds in host memory what it had read
    below = [o.metrics.num_host_cached_tokens + n for o, n in zip(again, from_disk, strict=True)]
    assert all(n >= 1024 for n in below), "every prompt was kept"
    assert from_disk[0] and figures["prefix_hit_tokens_by_tier"]["disk"] == sum(from_disk)
    assert figures["store_read_bytes"]["disk"] > 0 == figures["store_failures"]["disk"]
    details = usage(again[:1])["prompt_tokens_details"]
    assert details["disk_cached_tokens"] == from_disk[0] <= details["cached_tokens"]


def test_prompts_come_back_through_every_tier(tmp_path):
    """Neither the pool nor host memory holds more than one of the prompts."""
    size = 700 << 10
    with tiny_llm(
        tiny_format(),
        kv_cache_bytes=1 << 20,
        max_num_seqs=1,
        kv_host_memory=size,
        kv_store=tmp_path,
    ) as llm:
        for _ in range(3):
            found = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert tokens(found) == plain()
            llm.cache.reset_prefix_cache()
            llm.cache.check_integrity()
        stats = llm.stats()
    assert stats["store_evicted_records"]["host"] > 0
    assert stats["prefix_hit_tokens_by_tier"]["disk"] > 1000


def test_two_llms_share_a_folder(tmp_path):
    llms = [tiny_llm(tiny_format(), kv_store=tmp_path) for _ in range(2)]
    try:
        for i, prompt in enumerate(PROMPTS * 2):
            (found,) = llms[i % 2].generate([prompt], GREEDY, use_tqdm=False)
            assert found.outputs[0].token_ids == plain()[i % 3]
            for llm in llms:
                llm.cache._lower.moves.tiers.disk.flush()
        hits = [llm.stats()["prefix_hit_tokens_by_tier"]["disk"] for llm in llms]
        assert all(hits), "each found what the other wrote"
    finally:
        for llm in llms:
            llm.close()


def test_other_weights_find_nothing(kept):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[3, 5] += 1e-3
    with LLM.from_model(
        model, kv_format=tiny_format(), kv_cache_bytes=2 << 20, kv_store=kept
    ) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.stats()["prefix_hit_tokens_by_tier"]["disk"] == 0


@pytest.mark.parametrize("change", [{"exempt_layers": (1,)}, {"prefill_segment": 1024}])
def test_another_configuration_finds_nothing(kept, change):
    segment = change.pop("prefill_segment", 512)
    with tiny_llm(
        tiny_format(prefill_segment=segment), kv_cache_bytes=4 << 20, kv_store=kept, **change
    ) as llm:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert llm.stats()["prefix_hit_tokens_by_tier"]["disk"] == 0


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BadRecordError("damaged")])
@pytest.mark.parametrize("call", [1, 3])
def test_requests_finish_where_reads_fail(kept, monkeypatch, error, call):
    from spectral_paged.store import disk_tier

    read, calls = disk_tier.read_record, []

    def failing(*args):
        calls.append(1)
        if len(calls) >= call:
            raise error
        read(*args)

    want = plain()
    monkeypatch.setattr(disk_tier, "read_record", failing)
    found, stats = run(kept)
    assert tokens(found) == want
    assert stats["store_failures"]["disk"] >= 1


def test_a_cache_that_is_closed_while_a_prompt_waits_to_be_written_writes_it(tmp_path, monkeypatch):
    """What may be on its way is less than a prompt."""
    monkeypatch.setattr(host_tier, "MAX_BYTES_ON_WAY", 60_000)
    how = {"kv_store": tmp_path, "model_fingerprint": "x", "kv_store_size": 64 << 20}
    for seq_id in "ab":
        cache = make(fmt(), **how)
        if seq_id == "b":
            break
        cache._lower.tiers[0]._copier = copier = LateCopier()
        copier.random.randint = lambda a, b: 10**9
        drive(cache, {"a": Feed(1, 1800)}, {"a": 1800}, {"a": 1800}, {"a": PROMPTS[1] + [1] * 100})
        assert cache._lower.moves.behind._noted
        cache.close()
    ids = PROMPTS[1] + [1] * 100
    assert ready(cache, "b", 1800, ids)
    assert cache.add_sequence("b", num_prompt_tokens=1800, token_ids=ids) == 1600
    cache.close()


def test_no_step_asks_the_file_system(tmp_path, monkeypatch):
    """A folder may be on a disk that answers late."""
    run(tmp_path)
    asked = set()

    def counted(self, name):
        asked.add(threading.current_thread())
        return size_of(self, name)

    size_of = Folder.size_of
    monkeypatch.setattr(Folder, "size_of", counted)
    _, stats = run(tmp_path)
    assert stats["prefix_hit_tokens_by_tier"]["disk"]
    assert asked and threading.current_thread() not in asked


def test_requests_finish_where_the_folder_is_gone(tmp_path):
    folder = tmp_path / "s"
    with tiny_llm(tiny_format(), kv_cache_bytes=2 << 20, max_num_seqs=2, kv_store=folder) as llm:
        shutil.rmtree(folder)
        found = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        llm.cache._lower.moves.tiers.disk.flush()
        assert tokens(found) == plain()
        assert llm.stats()["store_failures"]["disk"] >= 1


def test_resetting_the_store_empties_the_folder_of_this_model(tmp_path):
    other = tmp_path / f"{'0' * 16}-{'1' * 32}-{'0' * 32}.page"
    other.write_bytes(b"another model's")
    with tiny_llm(tiny_format(), kv_store=tmp_path) as llm:
        llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
        llm.cache.reset_prefix_cache(reset_store=True)
    assert [f.name for f in tmp_path.glob("*.page")] == [other.name]


def test_threads_end_with_the_llm(tmp_path):
    before = threading.active_count()
    run(tmp_path)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "how, error, words",
    [
        ({"kv_store_size": 1000}, CapacityError, "kv_store_size is 1000.*at least"),
        ({"kv_store_size": 0}, InvalidRequestError, "kv_store_size is 0"),
        ({"kv_store": 7}, InvalidRequestError, "kv_store is 7"),
        ({"enable_prefix_caching": False}, InvalidRequestError, "kv_store keeps prefixes"),
        ({"model_fingerprint": None}, InvalidRequestError, "model_fingerprint"),
        ({"kv_store": __file__}, InvalidRequestError, "cannot be a folder"),
        (
            {
                "format": fmt(basis="shared", dim_weighting="none"),
                "calibration": "online",
            },
            FormatError,
            "online",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, how, error, words):
    given = {"kv_store": tmp_path, "model_fingerprint": "mine"} | how
    with pytest.raises(error, match=words):
        make(**given)
