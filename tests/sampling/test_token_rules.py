"""Biases, allowed tokens and bad words change logits as a plain definition says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.sampling import SamplingParams
from spectral_paged.sampling.token_rules import TokenRules

VOCAB = 7
TOKEN = st.integers(0, VOCAB - 1)
WORDS = st.lists(st.lists(TOKEN, min_size=1, max_size=4), max_size=4)
PARAMS = st.builds(
    SamplingParams,
    logit_bias=st.none() | st.dictionaries(TOKEN, st.sampled_from([-3.0, 0.5, 100.0])),
    allowed_token_ids=st.none() | st.lists(TOKEN, min_size=1, max_size=5),
)


def ruled(logits, params, words, output):
    """The definition, token by token."""
    want = logits.clone()
    for token in range(VOCAB):
        want[token] += (params.logit_bias or {}).get(token, 0.0)
        allowed = params.allowed_token_ids
        bad = any([*output, token][-len(word) :] == word for word in words)
        if bad or (allowed is not None and token not in allowed):
            want[token] = float("-inf")
    return want


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(PARAMS, WORDS, st.lists(TOKEN, max_size=9), st.integers(0, 9)),
        min_size=1,
        max_size=10,
    ),
    retaken=st.booleans(),
)
def test_logits_are_those_of_the_definition(rows, retaken):
    """Whether tokens were known when the row was made, or counted as they were sampled; rows with
    longer words come later; every step may be taken back once."""
    rules = TokenRules()
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
    held = []
    for i, (params, words, output, known) in enumerate(rows):
        row = rules.hold(i, params, words, output[:known], logits)
        held.append(row)
        for token in output[known:]:
            if retaken:
                rules.count([row], torch.tensor([(token + 1) % VOCAB]))
                rules.count([row], torch.tensor([(token + 1) % VOCAB]), -1)
            rules.count([row], torch.tensor([token]))
    got = rules.apply(logits, held)
    for line, before, (params, words, output, _) in zip(got, logits, rows, strict=True):
        torch.testing.assert_close(line, ruled(before, params, words, output))


def test_a_row_is_copied_from_a_sibling_with_tokens_of_its_own():
    rules, logits = TokenRules(), torch.zeros(2, VOCAB)
    params = SamplingParams(logit_bias={1: 2.0})
    rows = [rules.hold("a", params, [[3, 4]], [3], logits)]
    rows.append(rules.hold("b", params, [[3, 4]], [5], logits, siblings=["x", "a"]))
    got = rules.apply(logits, rows)
    assert got[:, 1].tolist() == [2.0, 2.0]
    assert got[:, 4].tolist() == [float("-inf"), 0.0]


def test_rows_are_taken_back_and_the_next_ones_are_clean():
    rules, logits = TokenRules(), torch.zeros(1, VOCAB)
    for i in range(20):
        rules.hold(i, SamplingParams(logit_bias={1: 2.0}), [[3, 4]], [3], logits)
        rules.release(i)
        rules.release(i)
    assert rules.stats()["token_rule_rows"] == 0
    row = rules.hold("z", SamplingParams(logit_bias={2: 1.0}), [], [], logits)
    assert rules.apply(logits, [row]).tolist() == [[0, 0, 1, 0, 0, 0, 0]]
    assert rules.stats()["token_rule_bytes"] == 4 * 8 * (VOCAB + 2 + 2)


@pytest.mark.parametrize("outside", [False, True])
def test_rows_made_in_inference_mode_are_written_outside_of_it(outside):
    rules, logits = TokenRules(), torch.zeros(1, VOCAB)
    with torch.inference_mode(outside):
        row = rules.hold("a", SamplingParams(), [[3, 4]], [], logits)
    rules.count([row], torch.tensor([3]))
    assert rules.apply(logits, [row])[0, 4] == float("-inf")
