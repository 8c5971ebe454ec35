"""The capacity of a cache: predicted tokens, stored tokens, and the GPU memory left for it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.cache import HISTORY_TOKENS
from spectral_paged.cache.index import Chunk, chunk_batches
from spectral_paged.cache.token_places import TokenRun
from spectral_paged.cli.commands import main
from spectral_paged.device import choose_cache_bytes
from spectral_paged.errors import CapacityError
from spectral_paged.kernels.page.layout import BLOCK_TOKENS, EXACT_PAGE_TOKENS
from support.tiny_model import random_prompts, tiny_format, tiny_llm


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4000))
def test_one_sequence_more_than_predicted_does_not_fit(num_tokens):
    llm = tiny_llm(kv_cache_bytes=2_000_000)
    cache = llm.cache
    count = cache.concurrency(num_tokens)
    for group in cache.groups:
        pages = cache.visibility.visible_blocks(num_tokens, 0)
        exact = -(-(num_tokens - pages * BLOCK_TOKENS) // EXACT_PAGE_TOKENS)
        need = [group.arena.slots.slabs_needed(n * exact, n * pages) for n in (count, count + 1)]
        assert need[0] <= group.arena.slots.num_slabs < need[1]


def test_as_many_as_predicted_decode_together():
    format = tiny_format()
    llm = tiny_llm(format, kv_cache_bytes=1_500_000, max_num_seqs=64)
    count = llm.cache.concurrency(720)
    prompts = random_prompts([700] * count)
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20), use_tqdm=False)
    assert 1 < count < 64 and llm.stats()["preemptions"] == 0


def test_bench_capacity_stores_what_it_predicts(tmp_path, capsys):
    assert (
        main(
            [
                "bench",
                "capacity",
                "--model",
                "random:tiny",
                "--context",
                "1800",
                "--device",
                "cpu",
                "--kv-cache-bytes",
                "16MiB",
                "--format",
                "exact",
                "--format",
                "spectral-int8",
                "--output-dir",
                str(tmp_path),
            ]
        )
        == 0
    )
    exact, pages = json.loads((tmp_path / "capacity-random-tiny.json").read_text())["rows"]
    assert exact["stored_sequences"] == exact["predicted_sequences"] > 1
    assert pages["predicted_sequences"] * 0.8 <= pages["stored_sequences"]
    assert pages["capacity_tokens"] > 3 * exact["capacity_tokens"]
    assert pages["stored_sequences"] > 1.5 * exact["stored_sequences"]
    assert "sequences: predicted" in capsys.readouterr().out


def test_what_a_step_needs_is_left_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 10**9, 100 * 10**9))
    device = torch.device("cuda")
    assert choose_cache_bytes(None, 0.9, device, 5 * 10**9) == pytest.approx(45 * 10**9, abs=2)
    assert choose_cache_bytes(7, 0.9, device, 5 * 10**9) == 7
    with pytest.raises(CapacityError, match=r"40\.0 GB are taken and a step needs 11\.0 GB"):
        choose_cache_bytes(None, 0.5, device, 11 * 10**9)


@given(st.lists(st.tuples(st.integers(2, 3000), st.integers(0, 90)), min_size=1, max_size=30))
def test_chunks_that_attend_together_fit_the_history_buffer(sizes):
    chunks, flat = [], 3  # three decoding sequences come first
    for num_new, num_pages in sizes:
        pages = TokenRun(True, 0, num_pages, num_pages * BLOCK_TOKENS)
        chunks.append(Chunk(flat, num_new, 0, (pages, TokenRun(False, 0, 1, num_new))))
        flat += num_new
    batches = chunk_batches(chunks, flat, torch.device("cpu"))
    assert [c for b in batches for c in b.chunks] == chunks
    for batch in batches:
        keys = sum(c.num_new + c.num_pages * BLOCK_TOKENS for c in batch.chunks)
        assert batch.spans.k_ends[-1] == keys
        assert keys <= HISTORY_TOKENS or len(batch.chunks) == 1
        first = batch.chunks[0].flat_start
        assert batch.tokens.tolist() == list(range(first, first + batch.spans.q_ends[-1]))
