"""The sampler against one-row references, and independence from the batch."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged.errors import SamplingParamsError, shown
from spectral_paged.sampling import SampledTokens, SampleRow, SamplingParams, SamplingState
from spectral_paged.sampling.sampler import uniform_noise

VOCAB = 50


@dataclass
class Row:
    """A row of logits, with the tokens before it."""

    params: SamplingParams
    seed: int
    prompt: list[int]
    output: list[int]
    blocked: tuple[int, ...]

    def held(self, key, penalties, logits):
        num, penalty_row = len(self.output), -1
        if self.params.has_penalties:
            penalty_row = penalties.hold(key, self.prompt, self.output, logits)
        return SampleRow(self.params, self.seed, num, self.blocked, penalty_row)


def row(seed=0, prompt=(), output=(), blocked=(), **params):
    params = SamplingParams(**({"max_tokens": 100} | params))
    return Row(params, seed, list(prompt), list(output), blocked)


def sample(logits, rows):
    state = SamplingState()
    held = [r.held(i, state.penalties, logits) for i, r in enumerate(rows)]
    return SampledTokens(logits, held, state).get()


def draw(logits, rows):
    return [r.token_id for r in sample(logits, rows)]


def drawn_set(logits, count=3000, **params):
    """Every token that `count` draws of one row bring."""
    rows = [row(seed=i, **params) for i in range(count)]
    return set(draw(logits.expand(count, -1), rows))


def kept_set(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """What min-p, then top-k, then top-p leave of one row, token by token."""
    logits = logits / temperature
    probs = torch.softmax(logits, -1)
    kept = [t for t in range(len(probs)) if probs[t] >= min_p * probs.max()]
    kept.sort(key=lambda t: -float(probs[t]))
    if top_k > 0:
        kept = kept[:top_k]
    total = sum(float(probs[t]) for t in kept)
    nucleus, mass = [], 0.0
    for t in kept:
        if mass >= top_p * total:
            break
        nucleus.append(t)
        mass += float(probs[t])
    return set(nucleus)


def test_temperature_zero_takes_the_largest():
    logits = torch.randn(9, VOCAB)
    assert draw(logits, [row(temperature=0.0)] * 9) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-39, 1e-300])
def test_temperatures_near_zero_are_greedy_and_do_not_overflow(temperature):
    """1e-39 is 0 or subnormal in fp32: logits over it are Inf, and Inf ties go to token 0."""
    logits = torch.randn(9, VOCAB) * 30
    assert draw(logits, [row(temperature=temperature)] * 9) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 5},
        {"top_p": 0.5},
        {"top_p": 0.9, "temperature": 2.0},
        {"top_p": 1e-6},
        {"top_k": -1, "top_p": 0.7},
        {"top_k": 10 * VOCAB, "min_p": 0.02},
        {"top_k": 4, "top_p": 0.7},  # the nucleus of the four, not of all
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"min_p": 0.1, "temperature": 3.0},
        {"min_p": 0.05, "top_k": 6, "top_p": 0.8, "temperature": 0.7},
    ],
)
def test_filters_leave_what_the_definition_leaves(params):
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    want = kept_set(logits, **params)
    got = drawn_set(logits, **({"temperature": 1.0} | params))
    assert got <= want
    likely = torch.softmax(logits / params.get("temperature", 1.0), -1)
    assert {t for t in want if likely[t] > 0.01} <= got


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_draws_follow_the_softmax(temperature, top_k):
    """Pearson's statistic over 20,000 draws; 5 tokens exceed 23.5 in one of 10,000 seeds."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    count = 20_000
    rows = [row(seed=i, temperature=temperature, top_k=top_k) for i in range(count)]
    got = torch.bincount(torch.tensor(draw(logits.expand(count, -1), rows)), minlength=5)
    kept = logits >= logits.sort(descending=True).values[(top_k or 5) - 1]
    want = torch.softmax((logits / temperature).masked_fill(~kept, float("-inf")), -1) * count
    assert int(got[~kept].sum()) == 0
    assert float(((got - want).square() / want)[kept].sum()) < 23.5


def test_filters_of_one_row_leave_other_rows_alone():
    logits = torch.randn(VOCAB)
    rows = [row(seed=i, temperature=1.0) for i in range(300)]
    alone = draw(logits.expand(300, -1), rows)
    strict = row(seed=1, temperature=1.0, top_k=1, top_p=0.1, min_p=0.5)
    mixed = draw(logits.expand(301, -1), [strict, *rows])
    assert mixed[0] == int(logits.argmax()) and mixed[1:] == alone


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1), step=st.integers(0, 5), place=st.integers(0, 6))
def test_a_rows_token_depends_on_its_own_seed_and_step_only(seed, step, place):
    g = torch.Generator().manual_seed(step)
    logits = torch.randn(7, VOCAB, generator=g)
    mine = row(seed=seed, output=[1] * step, temperature=0.9, top_p=0.95)
    others = [row(seed=i, output=[2] * i, temperature=1.5, top_k=3) for i in range(7)]
    others[place] = mine
    assert draw(logits, others)[place] == draw(logits[place : place + 1], [mine])[0]


def test_every_step_and_every_seed_draws_anew():
    flat = torch.zeros(200, VOCAB)
    by_step = draw(flat, [row(seed=3, output=[0] * i) for i in range(200)])
    by_seed = draw(flat, [row(seed=i) for i in range(200)])
    for tokens in (by_step, by_seed):
        assert len(set(tokens)) > 0.9 * VOCAB
        repeats = sum(a == b for a, b in zip(tokens, tokens[1:]))
        assert repeats < 15, "4 are expected"


def test_noise_is_uniform_and_differs_by_seed_step_and_token():
    noise = uniform_noise(torch.arange(40), torch.zeros(40, dtype=torch.long), 1000)
    assert float(noise.min()) > 0 and float(noise.max()) < 1
    assert abs(float(noise.mean()) - 0.5) < 0.01 and abs(float(noise.var()) - 1 / 12) < 0.002
    steps = uniform_noise(torch.zeros(40, dtype=torch.long), torch.arange(40), 1000)
    for x in (noise, steps):
        correlation = torch.corrcoef(x) - torch.eye(40)
        assert float(correlation.abs().max()) < 0.15


def greedy_order(logits, penalised, count):
    """The tokens that greedy takes first, second, ..., each blocked once it was taken."""
    taken = []
    while len(taken) < count:
        taken += draw(logits, [row(temperature=0.0, blocked=tuple(taken), **penalised)])
    return taken


@pytest.mark.parametrize("repetition", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("presence, frequency", [(0.0, 0.0), (0.4, 0.3), (-0.9, 0.0), (0, -0.45)])
def test_penalties_follow_their_formulas(repetition, presence, frequency):
    logits = torch.linspace(-2, 2, VOCAB)[torch.randperm(VOCAB)]
    prompt, output = [1, 40, 48, 3], [3, 3, 49, 45, 3]
    want = logits.clone()
    for t in {*prompt, *output}:
        want[t] = want[t] / repetition if want[t] > 0 else want[t] * repetition
    for t in set(output):
        want[t] -= presence + frequency * output.count(t)
    penalised = {
        "prompt": prompt,
        "output": output,
        "repetition_penalty": repetition,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
    }
    assert greedy_order(logits[None], penalised, VOCAB) == want.argsort(descending=True).tolist()


def test_penalties_of_one_row_leave_other_rows_alone():
    logits = torch.linspace(-2, 2, VOCAB).expand(3, -1)
    rows = [
        row(temperature=0.0),
        row(output=[VOCAB - 1], temperature=0.0, presence_penalty=1.0),
        row(output=[VOCAB - 2], temperature=0.0, frequency_penalty=1.0),
    ]
    assert draw(logits, rows) == [VOCAB - 1, VOCAB - 2, VOCAB - 1]


def test_presence_and_frequency_ignore_the_prompt():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 1.0
    r = row(prompt=[7] * 9, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)
    assert draw(logits, [r]) == [7]


def test_blocked_tokens_are_never_taken():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 9.0
    assert draw(logits, [row(temperature=0.0, blocked=(7,))]) != [7]
    drawn = draw(logits.expand(500, -1), [row(seed=i, blocked=(7, 9)) for i in range(500)])
    assert not {7, 9} & set(drawn) and len(set(drawn)) > VOCAB // 2
    beside = draw(logits.expand(2, -1), [row(temperature=0.0), row(blocked=(7,))])
    assert beside[0] == 7, "a block is for its own row"


@pytest.mark.parametrize("blocked", [(), (3, 4, 5)])
def test_logprobs_are_of_the_raw_distribution_with_ranks(blocked):
    """Neither temperature, filters, penalties nor blocks show in them."""
    logits = torch.randn(20, VOCAB)
    before = logits.clone()
    rows = [
        row(
            seed=i,
            output=[1, 2],
            blocked=blocked,
            temperature=2.0,
            top_k=40,
            logprobs=i % 5,
            presence_penalty=1.0,
        )
        for i in range(20)
    ]
    results = sample(logits, rows)
    assert torch.equal(logits, before), "the caller's logits stay"
    want = torch.log_softmax(logits, -1)
    for i, result in enumerate(results):
        best = want[i].topk(i % 5).indices.tolist()
        assert set(result.logprobs) == {*best, result.token_id}
        assert result.logprob == result.logprobs[result.token_id][0]
        for t, (value, rank) in result.logprobs.items():
            assert value == pytest.approx(float(want[i, t]), abs=1e-5)
            assert rank == int((want[i] > want[i, t]).sum()) + 1
    assert any(r.token_id not in want[i].topk(i % 5).indices for i, r in enumerate(results))


def test_logprobs_only_where_they_are_asked_for():
    logits = torch.randn(2, VOCAB)
    rows = [row(logprobs=0, temperature=0.0), row(temperature=0.0)]
    asked, plain = sample(logits, rows)
    assert set(asked.logprobs) == {int(logits[0].argmax())} and plain.logprobs is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("n", 0),
        ("n", 10**9),
        ("temperature", 10**400),
        ("temperature", 1e30),
        ("top_k", 10**26),
        ("repetition_penalty", 10**400),
        ("repetition_penalty", 1e-30),
        ("n", True),
        ("n", 1.0),
        ("n", None),
        ("temperature", True),
        ("top_k", True),
        ("top_k", "5"),
        ("top_p", None),
        ("min_p", float("nan")),
        ("min_p", True),
        ("repetition_penalty", float("nan")),
        ("repetition_penalty", float("inf")),
        ("repetition_penalty", -1.0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", "x"),
        ("min_tokens", True),
        ("min_tokens", 1.5),
        ("logprobs", True),
        ("logprobs", 2.0),
        ("seed", True),
        ("seed", "7"),
        ("stop", b"a"),
        ("stop", {"a"}),
        ("stop", [None]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [1.0]),
        ("ignore_eos", "false"),
        ("skip_special_tokens", 1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("max_tokens", -1),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 101),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("prompt_logprobs", True),
        ("logprob_token_ids", []),
        ("logprob_token_ids", [1, -1]),
        ("logprob_token_ids", [1] * 129),
        ("seed", 1.5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["x"]),
        ("stop_token_ids", 3),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    says = re.escape(f"{name} is {shown(value)}; it must be ")
    with pytest.raises(SamplingParamsError, match=says):
        SamplingParams(**({"max_tokens": 100} | {name: value}))


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", 0),
        ("temperature", 5),
        ("top_k", -1),
        ("top_p", 1),
        ("min_p", 1),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("repetition_penalty", 0.01),
        ("min_tokens", 100),
        ("logprobs", 0),
        ("logprobs", 20),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("logprob_token_ids", [0] * 128),
        ("max_tokens", 0),
        ("seed", -5),
        ("seed", 2**70),
        ("stop", "a"),
        ("stop", ["a", "b"]),
        ("stop", ("a",)),
        ("stop", []),
        ("stop_token_ids", [0]),
        ("stop_token_ids", ()),
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(name, value):
    assert getattr(SamplingParams(**({"max_tokens": 100} | {name: value})), name) == value


def test_no_stop_tokens_are_said_with_none():
    """As in vLLM."""
    assert SamplingParams(stop_token_ids=None) == SamplingParams(stop_token_ids=())


@settings(max_examples=40, deadline=None)
@given(
    output=st.lists(st.integers(0, 5), max_size=9),
    drafts=st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 9),
)
def test_a_row_behind_a_draft_is_drawn_as_if_the_draft_were_counted(
    output, drafts, temperature, seed
):
    """Penalties and bad words know the draft, and its tokens are in no table afterwards."""
    params = SamplingParams(
        temperature=temperature,
        frequency_penalty=1.5,
        repetition_penalty=1.2,
        bad_words=["of some tokens"],
    )
    words = [[1, 2, 3], [4, 5], [2, 2], [0]]
    logits = torch.randn(len(drafts), VOCAB, generator=torch.Generator().manual_seed(seed))
    logits[:, :6] += 6

    def row_of(state, key, before, drafted):
        rows = state.hold(key, params, logits, prompt=[7], output=before, bad_words=words)
        number = len(before) + len(drafted)
        return SampleRow(params, seed, number, (), *rows, drafted=drafted)

    state, plain = SamplingState(), SamplingState()
    rows = [row_of(state, "a", output, draft) for draft in drafts]
    got = SampledTokens(logits, rows, state)
    want = SampledTokens(
        logits,
        [row_of(plain, place, [*output, *draft], ()) for place, draft in enumerate(drafts)],
        plain,
    )
    assert got.get() == want.get()
    undrafted = [i for i, draft in enumerate(drafts) if not draft]
    got.count()
    again = SampledTokens(logits[:1], [row_of(state, "a", output, ())], state)
    counted = output + [got.ids[i].item() for i in undrafted]
    if len(undrafted) <= 1:  # a request has one such row
        fresh = SamplingState()
        expected = SampledTokens(logits[:1], [row_of(fresh, "b", counted, ())], fresh)
        torch.testing.assert_close(again._adjusted(logits[:1]), expected._adjusted(logits[:1]))
