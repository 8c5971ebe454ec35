"""The demo prints answers as they end, what `exact` says beside each, and what the cache saves."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from spectral_paged.outputs import CompletionOutput, RequestMetrics, RequestOutput
from support import small_world
from support.tiny_model import random_prompts, tiny_llm

NUM_PROMPTS = 18


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """The demo over a small model, with half of each text: some 1,300 tokens, a page or two."""
    (tmp_path / "work").mkdir()
    small_world.enter(monkeypatch, tmp_path / "work")
    module = small_world.example(monkeypatch, "demo")
    halves = [(file, start, n // 2, asked) for file, start, n, asked in module.READINGS]
    monkeypatch.setattr(module, "READINGS", halves)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return module


def test_a_run(demo, tmp_path, monkeypatch, capsys):
    options = ["--max-tokens", "4", "--kv-cache-mib", "256", "--kv-format", "spectral-page"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *options])
    at, flushed, answer_text = [], [], demo.answer_text

    def noting(title, spectral, exact, name):
        at.append(len(spectral.held_bytes))
        return answer_text(title, spectral, exact, name)

    monkeypatch.setattr(demo, "answer_text", noting)
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append(len(at)))
    demo.main()
    said = capsys.readouterr().out
    lines = said.strip().splitlines()

    assert at[0] < at[-1] and set(flushed) >= set(range(1, NUM_PROMPTS + 1)), "each as it ends"
    assert [int(n) for n in re.findall(r"^\[(\d+)/18, \d+ s\]", said, re.M)] == [*range(1, 19)]
    assert len(re.findall(r"^  spectral-page: ", said, re.M)) == NUM_PROMPTS
    assert len(re.findall(r"^  exact: the same \d+ tokens", said, re.M)) == NUM_PROMPTS
    assert re.search(r"[1-9]\d* pages sealed, [1-9]\d* page reads", said)
    assert (tmp_path / "work/build/demo/bytes_in_use.png").stat().st_size > 10_000
    assert re.match(r"Shown: .* 18 prompts from [1-9]\d* sealed pages, .* It took \d+ s", lines[-1])

    ratios = [(float(r), line) for line in lines for r in re.findall(r"(\d+\.\d\d)x", line)]
    assert min(ratios)[0] < 1 < max(ratios)[0]
    assert all("exact pages free" in line for ratio, line in ratios if ratio < 1), (
        "why it is below 1"
    )
    bars = re.findall(r"(bf16|spectral-page) +(\d+\.\d) MiB (#*)", said)
    assert len(bars) >= 20
    lengths = [len(bar) for *_, bar in sorted(bars, key=lambda found: float(found[1]))]
    assert all(before <= after + 1 for before, after in zip(lengths, lengths[1:])), "to scale"
    assert lengths[0] < demo.BAR // 2 < lengths[-1]


def output(name, token_ids):
    return RequestOutput(
        name, None, [1], [CompletionOutput(0, "mine", token_ids)], True, RequestMetrics(0.0)
    )


@pytest.mark.parametrize(
    "mine, other, says",
    [
        ([5, 6, 7], [5, 6, 7], "the same 3 tokens"),
        ([], [], "the same 0 tokens"),
        ([5, 6, 7], [5, 6, 8, 9], "the same 2 tokens of 3, then '<8> <9>'"),
        ([5, 6, 7], [4, 6, 7], "the same 0 tokens of 3, then '<4> <6> <7>'"),
        ([5, 6, 7], [5, 6], "the same 2 tokens of 3, then the end of the answer"),
        ([5, 6], [5, 6, 7], "the same 2 tokens of 2, then '<7>'"),
    ],
)
def test_the_first_token_that_differs_from_exact_is_named(demo, mine, other, says):
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(f"<{i}>" for i in ids))
    llm = SimpleNamespace(
        cache=SimpleNamespace(format=SimpleNamespace(name="some-format")),
        get_tokenizer=lambda: tokenizer,
    )
    runs = [demo.Run(llm, {"a": output("a", token_ids)}) for token_ids in (mine, other)]
    text = demo.answer_text("[1/1, 0 s] Why?", *runs, "a")
    assert text.splitlines()[-1] == f"  exact: {says}"
    assert "  some-format: mine" in text.splitlines()


def test_bytes_of_bf16_are_those_of_the_tokens_and_a_shared_prefix_counts_once(demo):
    """In `exact` they are what is held, but for the free places of each sequence's last page."""
    llm = tiny_llm("exact", max_num_batched_tokens=320)
    first, second = random_prompts([300, 77], seed=3)
    run = demo.Run(llm)
    run.serve({"a": first, "b": second, "c": first[:290] + second}, 9, demo.SimpleQueue())
    assert llm.stats()["prefix_hit_tokens"] == 256
    page = len(llm.cache.layers) * llm.cache.format.exact_page_bytes(2)
    assert len(run.held_bytes) == len(run.bf16_bytes) > 9
    for held, plain in zip(run.held_bytes, run.bf16_bytes):
        assert held - 3 * page < plain <= held
    assert max(run.bf16_bytes) > 6 * page and run.pool_bytes >= max(run.held_bytes)
