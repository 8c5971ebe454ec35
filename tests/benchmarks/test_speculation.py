"""`spectral-paged bench speculation`: the same tokens first, then speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from spectral_paged.benchmarks import speculation
from spectral_paged.cli.commands import main
from spectral_paged.errors import SpectralPagedError
from support.served import served_llm

CONFIG = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 1}


@pytest.mark.parametrize("task", speculation.PROMPTS)
def test_prompts_differ_and_have_real_text(task):
    prompts = speculation.prompts_of(task, 8)
    assert len(set(prompts)) == 8 and all(50 < len(prompt) < 2000 for prompt in prompts)


def test_tokens_are_compared_and_counted(monkeypatch):
    monkeypatch.setattr(speculation, "TEXT_CHARACTERS", 300)
    plain, drafting = served_llm(), served_llm(speculative_config=CONFIG)
    row = speculation.measure(plain, drafting, "quote", 2, 16, exactly=True)
    assert row.same == row.batch == 2 and row.gain > 0
    assert 1 <= row.tokens_per_step <= 4 and 0 <= row.acceptance <= 1
    assert speculation.line(row)[0] == "quote" and len(speculation.line(row)) == 8


def test_tokens_that_differ_are_told_or_fail_the_run(monkeypatch):
    plain = served_llm()
    decode = speculation.decode
    runs = []

    def other(*asked):
        runs.append(decode(*asked))
        return (
            replace(runs[-1], outputs=[[0], *runs[-1].outputs[1:]]) if len(runs) == 2 else runs[-1]
        )

    monkeypatch.setattr(speculation, "decode", other)
    with pytest.raises(SpectralPagedError, match="1 of 2 outputs of story differ"):
        speculation.measure(plain, plain, "story", 2, 4, exactly=True)
    runs.clear()
    row = speculation.measure(plain, plain, "story", 2, 4, exactly=False)
    assert row.same == 1 and row.acceptance is None


def test_the_command_hands_its_options_over(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(speculation, "main", lambda **options: asked.append(options) or 0)
    line = "bench speculation --task edit --batch 4 --output-len 32 --output-dir out"
    config = '{"method": "ngram", "num_speculative_tokens": 7}'
    assert main([*line.split(), "-sc", config, "--device", "cpu"]) == 0
    assert main(["bench", "speculation"]) == 0
    assert asked[0]["tasks"] == ["edit"] and asked[0]["batches"] == [4]
    assert asked[0]["speculative_config"] == config and asked[0]["num_tokens"] == 32
    assert asked[0]["output_dir"] == Path("out") and asked[0]["device"] == "cpu"
    assert asked[1]["tasks"] == list(speculation.PROMPTS) and asked[1]["batches"] == (1, 8)
    assert main(["bench", "speculation", "--task", "dance"]) != 0
    assert "there are quote, edit, summary, story" in capsys.readouterr().err
