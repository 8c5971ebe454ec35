"""`bench unsloth` on Unsloth's own code; `test_unsloth.py` runs this file in a new process."""

from __future__ import annotations

from dataclasses import replace

import torch

from spectral_paged.benchmarks.quality.tasks import Probe, Question
from spectral_paged.benchmarks.unsloth.needles import ask, recall
from spectral_paged.benchmarks.unsloth.run import measure
from support.unsloth_on_cpu import model_of

pytest_plugins = ["support.unsloth_on_cpu"]


def test_the_benchmark_times_patched_and_unpatched_alike():
    model = model_of("mistral")
    rows = [
        measure(model, format, 2, 600, short=2, long=6, **options)
        for format, options in (("unpatched", {}), ("exact", {"kv_cache_bytes": 16 << 20}))
    ]
    assert rows[0].first_tokens == rows[1].first_tokens
    assert all(row.decode_tokens_per_second > 0 < row.prompt_seconds for row in rows)
    assert rows[0].bytes_per_token is None and rows[1].bytes_per_token > 0
    assert "forward" not in vars(model)


class Numbers:
    """A tokenizer whose text is the ids."""

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


def test_needles_are_asked_of_patched_and_unpatched_alike_and_judged_by_what_they_say():
    model, rng = model_of("llama"), torch.Generator().manual_seed(0)
    context = tuple(torch.randint(3, 90, (1200,), generator=rng).tolist())
    silent = [Question("mixed", 0.5, 0, 1, (5,) * n, "no such text") for n in (3, 9)]
    probes = [Probe("", "", "", 0, context, tuple(silent))]
    own, attended = ask(model, Numbers(), probes, "unpatched")
    assert attended == 0 and not any(answer.right for answer in own)
    said = [" ".join(map(str, answer.token_ids)) for answer in own]
    known = [Question("mixed", 0.5, 0, 1, q.prompt, text) for q, text in zip(silent, said)]
    probes = [Probe("", "", "", 0, context, tuple(known))]
    own, _ = ask(model, Numbers(), probes, "unpatched")
    found, attended = ask(model, Numbers(), probes, "exact", kv_cache_bytes=16 << 20)
    row = recall("exact", found, own, attended)
    assert (row.asked, row.recalled, row.known, row.recalled_of_known) == (2, 2, 2, 2)
    assert row.same_tokens == 2 and row.pages_attended == 0
    found, attended = ask(model, Numbers(), probes, "spectral-page", kv_cache_bytes=16 << 20)
    assert attended > 0 and "forward" not in vars(model)
    wrong = recall("spectral-page", [replace(a, right=False, token_ids=[]) for a in found], own, 1)
    assert (wrong.recalled, wrong.known, wrong.recalled_of_known, wrong.same_tokens) == (0, 2, 0, 0)
