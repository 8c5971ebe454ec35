"""Speculation is asked for as in vLLM, by every door; what is not served is refused by name."""

from __future__ import annotations

import argparse
import json

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from spectral_paged import LLM, SamplingParams
from spectral_paged.engine import Counter, Vector, metrics_of, take_snapshot
from spectral_paged.errors import InvalidRequestError
from spectral_paged.metrics import MetricsCollector
from spectral_paged.options import EngineArgs, LLMOptions, SpeculativeConfig, with_dashes
from support.tiny_model import random_prompts, tiny_llm

GIVEN = {"method": "ngram", "num_speculative_tokens": 5}
# what a configuration has, and the n-grams that are looked for
NGRAMS = [
    ({}, (5, 5)),
    ({"prompt_lookup_max": 4}, (4, 4)),
    ({"prompt_lookup_min": 2}, (2, 2)),
    ({"prompt_lookup_max": 4, "prompt_lookup_min": 2}, (2, 4)),
    ({"prompt_lookup_max": None, "prompt_lookup_min": 3, "model": None}, (3, 3)),
]
REFUSED = [
    ({"method": "eagle", "model": "x", "num_speculative_tokens": 2}, "method is 'eagle'.*'ngram'"),
    ({"method": "ngram"}, "no num_speculative_tokens.*1 and 15"),
    (GIVEN | {"num_speculative_tokens": 16}, "num_speculative_tokens is 16.*between 1 and 15"),
    (GIVEN | {"num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
    (GIVEN | {"num_speculative_tokens": True}, "num_speculative_tokens is True"),
    (GIVEN | {"prompt_lookup_max": 0}, "prompt_lookup_max is 0"),
    (GIVEN | {"prompt_lookup_min": 3, "prompt_lookup_max": 2}, "prompt_lookup_min is 3.*most"),
    (GIVEN | {"draft_tensor_parallel_size": 2}, "'draft_tensor_parallel_size'.*not served"),
    ("{", "no JSON"),
    ("5", "must be a mapping"),
    (5, "must be a mapping"),
]


@pytest.mark.parametrize("given, bounds", NGRAMS)
def test_n_grams_are_as_long_as_in_vllm(given, bounds):
    for value in (GIVEN | given, json.dumps(GIVEN | given)):
        found = SpeculativeConfig.read(value)
        assert (found.shortest, found.longest) == bounds and found.num_speculative_tokens == 5


@pytest.mark.parametrize("given, says", REFUSED)
def test_what_is_not_served_is_refused_with_its_limit(given, says):
    for door in (LLM, EngineArgs):  # before a model is looked for
        with pytest.raises(InvalidRequestError, match=says):
            door("no such model", speculative_config=given)


def test_a_command_line_has_it_as_json():
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    words = ["--speculative_config", json.dumps(GIVEN)]
    made = EngineArgs.from_cli_args(parser.parse_args(with_dashes(words)))
    assert made.options == LLMOptions(speculative_config=GIVEN)
    assert made.options.speculation == SpeculativeConfig(5)
    assert LLMOptions().speculation is None


@pytest.mark.parametrize(
    "max_num_seqs, tokens, rows", [(1, 5, 6), (8, 7, 64), (8, 2, 24), (16, 7, 64), (256, 15, 256)]
)
def test_a_few_sequences_have_room_for_all_of_their_drafts(max_num_seqs, tokens, rows):
    assert SpeculativeConfig(tokens).num_rows(max_num_seqs) == rows
    options = LLMOptions(max_num_seqs=max_num_seqs, speculative_config=GIVEN)
    assert options.max_decode_rows == SpeculativeConfig(5).num_rows(max_num_seqs)


def test_figures_have_vllms_names():
    llm = tiny_llm(speculative_config=GIVEN | {"prompt_lookup_max": 1})
    prompts = [prompt * 3 for prompt in random_prompts([9, 30, 230], seed=2)]
    llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=120), use_tqdm=False)
    stats = llm.stats()
    found = {m.name.partition(":")[2]: m for m in metrics_of(take_snapshot(llm))}
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        metric = found[f"spec_decode_num_{name}"]
        assert isinstance(metric, Counter) and metric.value == stats[f"spec_decode_num_{name}"] > 0
    per_pos = found["spec_decode_num_accepted_tokens_per_pos"]
    assert isinstance(per_pos, Vector) and len(per_pos.values) == 5
    assert sum(per_pos.values) == stats["spec_decode_num_accepted_tokens"]
    registry = CollectorRegistry()
    MetricsCollector(llm, registry=registry)
    text = generate_latest(registry).decode()
    line = next(s for s in text.splitlines() if "per_pos_total" in s and 'position="0"' in s)
    assert float(line.split()[-1]) == per_pos.values[0]
    (plain,) = (m for m in metrics_of(take_snapshot(tiny_llm())) if isinstance(m, Vector))
    assert plain.values == [0]
