"""`bench served`: what engines are asked, and how their answers are compared."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, strategies as st

from spectral_paged.benchmarks.quality.texts import Text
from spectral_paged.benchmarks.served import run
from spectral_paged.benchmarks.served.answers import Answer, Answers, ask, compared, divergence
from spectral_paged.benchmarks.served.requests import ANSWER_TOKENS, Request, requests
from spectral_paged.cli.commands import main
from spectral_paged.errors import InvalidRequestError
from spectral_paged.sampling import SamplingParams
from support import small_world
from support.copying_replay import haystack

PROSE = " ".join(f"Chapter {i} tells of the {i}th day at sea." for i in range(400))


# ---- requests ----------------------------------------------------------------------------


def test_a_needle_lies_in_its_context_and_its_question_follows():
    hay = haystack()
    found = requests(hay, [1024, 2048], needles=11, windows=0, places=4)
    assert [sum(r.length == n for r in found) for n in (1024, 2048)] == [11, 11]
    for request in found:
        text = hay.tokenizer.decode(list(request.prompt_token_ids))
        question = text.rsplit("\n\n", 1)[1]
        assert f"{question} {request.answer}" in text


def test_places_go_on_in_the_text_a_token_at_a_time():
    found = requests(haystack(), [1024], needles=1, windows=3, places=5)
    places = [r for r in found if r.answer is None]
    assert [r.place for r in places] == [1, 2, 3, 4, 5] * 3
    for before, after in zip(places, places[1:], strict=False):
        if before.context == after.context:
            assert after.prompt_token_ids[:-1] == before.prompt_token_ids
    assert {r.num_answer_tokens for r in places} == {1}
    assert {r.num_answer_tokens for r in found if r.answer} == {ANSWER_TOKENS}


# ---- answers -----------------------------------------------------------------------------


class Said:
    def __init__(self, prompt):
        self.token_ids, self.error = [sum(prompt) % 97], None
        entry = type("Entry", (), {"logprob": -0.5})()
        self.logprobs = [{sum(prompt) % 97: entry}]
        self.outputs = [self]


class FakeEngine:
    def __init__(self):
        self.turns = []

    def generate(self, prompts, params, use_tqdm):
        self.turns.append([tuple(p["prompt_token_ids"]) for p in prompts])
        return [Said(turn) for turn in self.turns[-1]]


def test_answers_are_in_order_and_contexts_are_computed_first():
    asked = [Request(c, 1024, "code", (c, i)) for c in (3, 1) for i in range(3)]
    engine = FakeEngine()
    found = ask(engine, SamplingParams, asked)
    assert [a.token_ids for a in found] == [(sum(r.prompt_token_ids) % 97,) for r in asked]
    assert engine.turns == [[(3, 0), (1, 0)], [(3, 1), (3, 2), (1, 1), (1, 2)]]


def test_a_failed_request_ends_the_run_with_its_error():
    engine = FakeEngine()
    engine.generate = lambda prompts, params, use_tqdm: [
        type("Failed", (), {"error": ArithmeticError("NaN"), "outputs": []})() for _ in prompts
    ]
    with pytest.raises(ArithmeticError, match="NaN"):
        ask(engine, SamplingParams, [Request(0, 1024, "code", (1,))])


def logprobs(seed, size):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(3 * torch.randn(size, generator=generator).double(), dim=0)


def top(all_of_them, count):
    values, ids = all_of_them.topk(count)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 20))
def test_a_divergence_over_the_likeliest_tokens_is_a_lower_bound(seed, size, count):
    exact, other = logprobs(seed, size), logprobs(seed + 1, size)
    whole = float((exact.exp() * (exact - other)).sum())
    found = divergence(top(exact, min(count, size)), top(other, min(count, size)))
    assert -1e-9 <= found <= whole + 1e-6
    if count >= size:
        assert math.isclose(found, whole, rel_tol=1e-6, abs_tol=1e-6)


def test_equal_answers_diverge_by_nothing_and_needles_are_counted():
    asked = [
        Request(0, 1024, "code", (1,), answer="1"),
        Request(0, 1024, "code", (2,), answer="2"),
        *(Request(1, 1024, "code", (3,), place=i) for i in (1, 2)),
        Request(2, 1024, "code", (3,), place=1),
    ]

    class Digits:
        def decode(self, ids):
            return "".join(map(str, ids))

    same = [Answer((1,), {1: -0.1, 4: -3.0})] * 5
    other = [*same[:2], *[Answer((1,), {1: -0.4, 4: -2.0})] * 3]
    [row] = compared(asked, Answers("b", other), Answers("a", same), Digits())
    assert (row["needles"], row["recalled"], row["places"]) == (2, 1, 3)
    assert row["kl"] > 0.05 and abs(row["kl_standard_error"]) < 1e-9
    [row] = compared(asked, Answers("a", same), Answers("a", same), Digits())
    assert row["kl"] == 0


# ---- a run -------------------------------------------------------------------------------


def test_a_run_compares_engines_with_the_first_and_writes_all_figures(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(run, "load_model", small_world.load_model)
    monkeypatch.setattr(run, "judged_texts", lambda _: [Text("fiction", "sea", PROSE)])
    line = "bench served --model tiny --backend exact --backend spectral-int8 --length 2048"
    line += f" --needles 2 --windows 1 --places 3 --device cpu --output-dir {tmp_path}"
    assert main(line.split()) == 0
    result = json.loads((tmp_path / "served-tiny.json").read_text())
    exact, pages = result["rows"]
    assert (exact["backend"], pages["backend"]) == ("exact", "spectral-int8")
    assert exact["kl"] == 0 < pages["kl"] < 0.1 and pages["places"] == 3
    assert result["baseline"] == "exact" and result["environment"]["torch"]
    assert result["stats"]["spectral-int8"]["pages_attended"] > 0
    assert "| spectral-int8 | 2048 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": []}, "no --backend"),
        ({"model": "random:llama-3-8b"}, "knows no facts"),
    ],
)
def test_runs_that_judge_nothing_are_refused(options, words):
    with pytest.raises(InvalidRequestError, match=words):
        run.main(run.Options(**options))
