"""Penalties count tokens on the device, and change logits as a count of the tokens says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.sampling import Penalties, SamplingParams

VOCAB = 19
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=30)


def penalised(logits, prompt, output, params):
    """The definition, token by token, in fp32."""
    want = logits.clone()
    for t in {*prompt, *output}:
        factor = torch.tensor(params.repetition_penalty)
        want[t] = want[t] / factor if want[t] > 0 else want[t] * factor
    for t in set(output):
        want[t] -= torch.tensor(params.presence_penalty)
        want[t] -= torch.tensor(params.frequency_penalty) * output.count(t)
    return want


def counted(penalties, row):
    """How often each token is in the output of `row`, read off with a frequency penalty of 1."""
    params = SamplingParams(frequency_penalty=1.0)
    return (-penalties.apply(torch.zeros(1, VOCAB), [row], [params]))[0].int().tolist()


@settings(max_examples=60, deadline=None)
@given(
    prompt=TOKENS,
    output=TOKENS,
    known=st.integers(0, 30),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 7.0]),
    presence=st.sampled_from([0.0, 2.0, -0.7]),
    frequency=st.sampled_from([0.0, 0.3, -2.0]),
    seed=st.integers(0, 5),
)
def test_logits_are_those_of_the_definition(
    prompt, output, known, repetition, presence, frequency, seed
):
    """Whether tokens were known when the row was made, or were counted as they were sampled."""
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    penalties = Penalties()
    row = penalties.hold("a", prompt, output[:known], logits)
    for token in output[known:]:
        penalties.count([row], torch.tensor([token]))
    got = penalties.apply(logits, [row], [params])
    torch.testing.assert_close(got[0], penalised(logits[0], prompt, output, params))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_keys=st.sampled_from([1, 8, 9, 20]))
def test_rows_keep_their_own_counts(data, num_keys):
    """Through growth, releases, rows that change hands, siblings, and tokens taken back."""
    penalties, logits = Penalties(), torch.zeros(1, VOCAB)
    held = {}  # key to (row, prompt, output)
    families = [data.draw(TOKENS), data.draw(TOKENS)]
    steps = data.draw(st.lists(st.sampled_from("hhhcccrb"), min_size=20, max_size=40))
    for step in steps:
        key = data.draw(st.integers(0, num_keys - 1))
        if step == "h" and key not in held:
            prompt, output = families[key % 2], data.draw(TOKENS)
            siblings = [k for k in range(num_keys) if k % 2 == key % 2]
            row = penalties.hold(key, prompt, output, logits, siblings=siblings)
            held[key] = row, prompt, list(output)
        elif step == "h":
            assert penalties.hold(key, [], [], logits) == held[key][0], "a row is made once"
        elif step == "r":
            penalties.release(key)
            held.pop(key, None)
        elif held:
            ids = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(held)))[: len(held)]
            rows = [row for row, _, _ in held.values()]
            penalties.count(rows, torch.tensor(ids))
            if step == "b":
                penalties.count(rows, torch.tensor(ids), -1)
                continue
            for (_, _, output), token in zip(held.values(), ids, strict=True):
                output.append(token)
    assert (
        len({row for row, _, _ in held.values()}) == len(held) == penalties.stats()["penalty_rows"]
    )
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    some = torch.linspace(-3, 5, VOCAB).expand(len(held), -1)
    if held:
        rows = [row for row, _, _ in held.values()]
        got = penalties.apply(some, rows, [params] * len(rows))
        for line, (_, prompt, output) in zip(got, held.values(), strict=True):
            torch.testing.assert_close(line, penalised(some[0], prompt, output, params))


def test_the_table_grows_with_the_rows_that_are_held_and_not_with_requests():
    penalties, logits = Penalties(), torch.zeros(1, VOCAB)
    assert penalties.stats() == {"penalty_rows": 0, "penalty_bytes": 0}
    for key in range(50):
        penalties.hold(key, [1], [], logits)
        penalties.release(key)
    penalties.release("nobody")
    assert penalties.stats() == {"penalty_rows": 0, "penalty_bytes": 8 * VOCAB * 4}
    for key in range(9):
        penalties.hold(key, [1], [], logits)
    assert penalties.stats() == {"penalty_rows": 9, "penalty_bytes": 16 * VOCAB * 4}


def test_a_row_that_could_not_be_made_is_made_anew():
    """As of a prompt with a token that the model does not have: its row is nobody's."""
    penalties, logits = Penalties(), torch.zeros(1, VOCAB)
    with pytest.raises((IndexError, RuntimeError)):
        penalties.hold("a", [1, VOCAB + 5], [2], logits)
    assert penalties.stats()["penalty_rows"] == 0
    row = penalties.hold("a", [1], [2, 2], logits)
    assert counted(penalties, row) == [0, 0, 2] + [0] * (VOCAB - 3)
    assert penalties.stats() == {"penalty_rows": 1, "penalty_bytes": 8 * VOCAB * 4}


def test_rows_made_in_inference_mode_count_outside_of_it():
    penalties, logits = Penalties(), torch.zeros(1, VOCAB)
    with torch.inference_mode():
        row = penalties.hold("a", [1], [2], logits)
        penalties.count([row], torch.tensor([2]))
    penalties.count([row], torch.tensor([3]))
    assert counted(penalties, row)[:4] == [0, 0, 2, 1]


def test_counts_stay_exact_where_fp16_would_not():
    penalties, logits = Penalties(), torch.zeros(1, VOCAB)
    row = penalties.hold("a", [], [4] * 5000, logits)
    penalties.count([row], torch.tensor([4]))
    assert counted(penalties, row)[4] == 5001
