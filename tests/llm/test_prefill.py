"""Prompts are computed once into a store, all of them, and later runs find them."""

from __future__ import annotations

import errno
import json

import pytest

from spectral_paged import SamplingParams
from spectral_paged.cli import commands, prefill
from spectral_paged.store import folder as folder_module
from support.tiny_model import random_prompts, tiny_format, tiny_llm

PROMPTS = random_prompts([1300, 1700, 1200, 1500, 1250])
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def llm_of(folder=None, **options):
    return tiny_llm(
        tiny_format(), kv_cache_bytes=2 << 20, max_num_seqs=2, kv_store=folder, **options
    )


def test_every_prompt_is_there_afterwards_however_little_host_memory_there_is(tmp_path):
    """A prompt is longer than host memory, and nothing is dropped: writing is waited for."""
    with llm_of() as llm:
        plain = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    with llm_of(tmp_path, kv_host_memory=500_000) as llm:
        outputs = llm.prefill(PROMPTS, use_tqdm=False)
        stats = llm.stats()
        assert len(outputs) == len(PROMPTS) and stats["store_dropped_records"]["disk"] == 0
        assert llm.cache._lower.moves.tiers.disk._queued == 0, "all of it is written"
    with llm_of(tmp_path, kv_host_memory=500_000) as llm:
        found = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert all(o.metrics.num_cached_tokens >= 1088 for o in found)
    assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in plain]


def test_without_a_store_prompts_are_in_the_cache():
    with tiny_llm(tiny_format()) as llm:
        llm.prefill(PROMPTS[:1], use_tqdm=False)
        (again,) = llm.generate(PROMPTS[:1], GREEDY, use_tqdm=False)
        assert again.metrics.num_cached_tokens >= 1088


@pytest.fixture
def small(monkeypatch):
    """`LLM(...)` of the command is the tiny one."""
    import spectral_paged.llm

    def make(model, **options):
        return llm_of(options.pop("kv_store"), **options)

    monkeypatch.setattr(spectral_paged.llm, "LLM", make)


def run(tmp_path, lines, *more):
    source = tmp_path / "docs.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["prefill", "--input", str(source), "--kv-store", str(tmp_path / "s"), *more]
    return commands.main(words)


def test_the_command_computes_a_file_once(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prefill, "LINES_AT_ONCE", 2)
    lines = [{"prompt": p} for p in PROMPTS]
    assert run(tmp_path, lines) == 0
    total = sum(map(len, PROMPTS))
    assert f"{total} tokens computed, 0 kept before" in capsys.readouterr().out
    assert run(tmp_path, lines) == 0
    told = capsys.readouterr().out
    kept = int(told.split(" kept before")[0].split()[-1])
    assert kept >= 1088 * len(PROMPTS), "a second run computes the ends of prompts alone"


def test_bad_lines_are_told_and_others_are_computed(small, tmp_path, capsys):
    lines = [{"prompt": PROMPTS[0]}, {"nonsense": 1}, {"prompt": []}, {"prompt": PROMPTS[1]}]
    assert run(tmp_path, lines) == 1
    told = "".join(capsys.readouterr())
    assert "line 2:" in told and "line 3:" in told and "2 lines are bad" in told
    assert f"{len(PROMPTS[0]) + len(PROMPTS[1])} tokens computed" in told


def test_a_prompt_is_cut_as_generate_cuts_it(small, tmp_path, capsys):
    cut = {"prompt": PROMPTS[1], "sampling_params": {"truncate_prompt_tokens": 1300}}
    assert run(tmp_path, [cut]) == 0
    assert "1300 tokens computed, 0 kept before" in capsys.readouterr().out
    assert run(tmp_path, [{"prompt": PROMPTS[1][-1300:]}]) == 0
    kept = int(capsys.readouterr().out.split(" kept before")[0].split()[-1])
    assert kept >= 1088, "what is kept is the prompt that a later run asks for"


def test_a_folder_that_takes_nothing_ends_with_an_error(small, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module.os, "posix_fallocate", full)
    assert run(tmp_path, [{"prompt": PROMPTS[0]}]) == 1
    told = capsys.readouterr()
    assert f"{len(PROMPTS[0])} tokens computed" in told.out
    assert "not all is kept" in told.err and str(tmp_path / "s") in told.err


def test_what_keeps_nothing_is_refused(tmp_path, capsys):
    source = tmp_path / "docs.jsonl"
    source.write_text('{"prompt": "x"}\n')
    assert commands.main(["prefill", "--input", str(source)]) == 2
    assert "--kv-store" in capsys.readouterr().err
    assert commands.main(["prefill", "--input", str(tmp_path), "--kv-store", "s"]) == 2
    assert "no input file" in capsys.readouterr().err
