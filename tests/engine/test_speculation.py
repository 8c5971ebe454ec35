"""Drafts change how many steps an output takes, and no token of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.engine import sampled_step
from spectral_paged.engine.speculation import MAX_PAUSE, NgramDrafter, NgramLookup
from spectral_paged.options import SpeculativeConfig
from spectral_paged.sampling import RepetitionDetectionParams, SampledTokens
from support.fault_runs import serve, tokens
from support.foretold_drafts import SPECULATION, foretell
from support.served import LETTERS, served_llm
from support.tiny_model import VOCAB, raise_once, random_prompts, tiny_format, tiny_llm

AHEAD = pytest.mark.parametrize("ahead", [False, True])
# a page is sealed, a block ends, an exact page ends, and a prompt of one token
PROMPTS = random_prompts([1, 60, 575, 630, 700, 1217], seed=9)
REPEATING = [prompt * 3 for prompt in random_prompts([9, 30, 230], seed=2)]
NGRAMS = SPECULATION | {"prompt_lookup_min": 1, "prompt_lookup_max": 3}


SAID = {}


def said(prompts, params, **options):
    """What is said without drafts, once for all tests that ask for the same."""
    asked = repr((prompts, params, options))
    if asked not in SAID:
        SAID[asked] = tiny_llm(**options).generate(prompts, params, use_tqdm=False)
    return SAID[asked]


def drafting(llm, prompts, found, ahead):
    """`llm` with drafts of what another LLM has said in `found`."""
    whole = {}
    for prompt, output in zip(prompts, found):
        for c in output.outputs:
            whole[tuple(prompt), c.index] = [*prompt, *c.token_ids]
    llm.engine.async_scheduling = ahead
    foretell(
        llm.engine,
        lambda c, count: whole[tuple(c.owner.prompt_token_ids), c.output.index],
        VOCAB,
    )
    return llm


def ends(outputs):
    return [[(c.token_ids, c.finish_reason, c.stop_reason) for c in o.outputs] for o in outputs]


def accepted(llm):
    """Accepted tokens; some are rejected too, and all are counted."""
    stats = llm.stats()
    found = stats["spec_decode_num_accepted_tokens"]
    assert 0 < stats["spec_decode_num_drafts"] < stats["spec_decode_num_draft_tokens"]
    assert 0 < found < stats["spec_decode_num_draft_tokens"]
    places = list(stats["spec_decode_num_accepted_tokens_per_pos"].values())
    assert sum(places) == found and places == sorted(places, reverse=True)
    return found


def same(params, ahead, prompts=PROMPTS, **options):
    """Outputs without and with drafts, which say the same, and the LLM that drafted."""
    want = said(prompts, params, **options)
    llm = drafting(tiny_llm(speculative_config=NGRAMS, **options), prompts, want, ahead)
    got = llm.generate(prompts, params, use_tqdm=False)
    assert ends(got) == ends(want)
    llm.cache.check_integrity()
    stats = llm.stats()
    assert stats["num_sequences"] == stats["penalty_rows"] == stats["token_rule_rows"] == 0
    accepted(llm)
    return want, got, llm


@AHEAD
@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_outputs_are_those_without_drafts(format, ahead):
    params = [
        SamplingParams(temperature=0.0, max_tokens=80),
        SamplingParams(temperature=1.0, seed=3, max_tokens=70, top_p=0.9, top_k=30),
        SamplingParams(temperature=0.7, max_tokens=80, min_p=0.01),
        SamplingParams(temperature=1.0, seed=-4, max_tokens=60, frequency_penalty=1.0),
        SamplingParams(
            temperature=0.0, max_tokens=80, repetition_penalty=1.3, presence_penalty=0.4
        ),
        SamplingParams(temperature=0.9, seed=8, max_tokens=75, logit_bias={7: 4.0}),
    ]
    _, _, llm = same(params, ahead, format=tiny_format(format))
    assert llm.stats()["steps"] < 80 + 15


@AHEAD
def test_log_probabilities_are_those_without_drafts(ahead):
    params = SamplingParams(temperature=0.0, max_tokens=30, logprobs=3)
    for ours, theirs in zip(*same(params, ahead)[:2]):
        ours, theirs = ours.outputs[0], theirs.outputs[0]
        assert ours.cumulative_logprob == pytest.approx(theirs.cumulative_logprob, rel=1e-4)
        assert len(ours.logprobs) == 30
        for one, other in zip(ours.logprobs, theirs.logprobs):
            assert {t: p.rank for t, p in one.items()} == {t: p.rank for t, p in other.items()}


@AHEAD
def test_every_kind_of_ending_comes_at_the_same_token(ahead):
    free = said(PROMPTS, SamplingParams(temperature=0.0, max_tokens=20))
    first = [o.outputs[0].token_ids for o in free]
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, stop_token_ids=[first[0][4]]),
        SamplingParams(temperature=0.0, max_tokens=20, min_tokens=9, stop_token_ids=[first[1][2]]),
        SamplingParams(temperature=0.0, max_tokens=1),
        SamplingParams(temperature=0.0, max_tokens=2),
        SamplingParams(
            temperature=0.0,
            max_tokens=40,
            repetition_detection=RepetitionDetectionParams(
                max_pattern_size=8, min_pattern_size=1, min_count=2
            ),
        ),
        SamplingParams(temperature=1.0, seed=2, max_tokens=None),
    ]
    _, got, _ = same(params, ahead, max_model_len=1290)
    reasons = {c.finish_reason for o in got for c in o.outputs}
    assert reasons >= {"stop", "length"}
    assert len(got[5].prompt_token_ids) + len(got[5].outputs[0].token_ids) == 1290


@AHEAD
def test_forks_and_seats_that_are_taken_keep_their_tokens(ahead):
    params = SamplingParams(n=3, temperature=1.0, max_tokens=40, seed=11)
    for seats in (2, 32):
        same(params, ahead, prompts=PROMPTS[1:4], max_num_seqs=seats)


@pytest.mark.parametrize("format, ahead", [("spectral-int8", True), ("exact", False)])
def test_a_full_pool_preempts_and_changes_no_token(format, ahead):
    prompts = random_prompts([300, 600, 650, 700, 400, 620, 900, 560], seed=5)
    params = SamplingParams(temperature=0.0, max_tokens=70)
    small = 950_000 if format == "exact" else 700_000
    _, _, llm = same(params, ahead, prompts, format=tiny_format(format), kv_cache_bytes=small)
    assert llm.stats()["preemptions"] > 0


@AHEAD
@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_what_was_said_with_drafts_is_found_as_a_prefix(format, ahead):
    """Only accepted tokens are in the pages that a next turn finds."""
    params = SamplingParams(temperature=0.0, max_tokens=90)
    prompts, options = PROMPTS[:3], {"format": tiny_format(format)}
    _, got, llm = same(params, ahead, prompts, **options)
    turns = [o.prompt_token_ids + o.outputs[0].token_ids + [5, 6] for o in got]
    fresh = said(turns, params, **options)
    drafting(llm, turns, fresh, ahead)
    again = llm.generate(turns, params, use_tqdm=False)
    assert ends(again) == ends(fresh)
    least = [64, 128, 640] if format == "exact" else [0, 0, 512]
    assert all(o.metrics.num_cached_tokens >= n for o, n in zip(again, least))


@AHEAD
@pytest.mark.parametrize("budget", [5, 64])
def test_prompts_and_drafts_share_steps(budget, ahead):
    params = SamplingParams(temperature=0.0, max_tokens=40)
    same(params, ahead, max_num_batched_tokens=budget, prompts=PROMPTS[:4])


@AHEAD
def test_drafts_are_looked_up_where_text_repeats(ahead):
    params = SamplingParams(temperature=0.0, max_tokens=120, logit_bias={3: 0.1})
    want = said(REPEATING, params)
    llm = tiny_llm(speculative_config=NGRAMS)
    llm.engine.async_scheduling = ahead
    assert ends(llm.generate(REPEATING, params, use_tqdm=False)) == ends(want)
    accepted(llm)


def test_text_stops_where_it_does_without_drafts():
    """Stop strings that end inside a draft, bad words over one, and log-probabilities beside."""
    free = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    (one,) = served_llm().generate(["tell me"], free, use_tqdm=False)
    text = one.outputs[0].text
    params = [free.clone() for _ in range(3)]
    params[0].stop = text[7:9]
    params[1].bad_words = [text[5:8]]
    params[2].logprobs, params[2].stop, params[2].include_stop_str_in_output = 1, text[4:7], True
    want = served_llm().generate(["tell me"] * 3, params, use_tqdm=False)
    llm = served_llm(speculative_config=SPECULATION)
    spoken = [o.prompt_token_ids + o.outputs[0].token_ids for o in want]
    rest = [w + [0] * 40 for w in spoken]
    foretell(llm.engine, lambda c, count: rest[int(c.owner.request_id[-1]) % 3], len(LETTERS))
    for i, p in enumerate(params):
        llm.engine.add_request(str(i), "tell me", p)
    got, _ = serve(llm)
    for i, output in enumerate(want):
        ours = got[str(i)].outputs[0]
        assert (ours.text, ours.token_ids) == (output.outputs[0].text, output.outputs[0].token_ids)
        assert ours.stop_reason == output.outputs[0].stop_reason
    assert llm.stats()["spec_decode_num_accepted_tokens"] > 0


def test_requests_that_read_their_output_get_no_drafts_and_are_counted():
    llm = tiny_llm(speculative_config=NGRAMS)
    reading = SamplingParams(
        n=2, temperature=0.0, max_tokens=30, logits_processors=[lambda ids, logits: logits]
    )
    prompt = REPEATING[0]
    want = tiny_llm().generate([prompt] * 2, SamplingParams(temperature=0.0, max_tokens=30))
    got = llm.generate([prompt], reading, use_tqdm=False)
    assert [c.token_ids for c in got[0].outputs] == [want[0].outputs[0].token_ids] * 2
    stats = llm.stats()
    assert stats["spec_decode_num_drafts"] == 0
    assert stats["spec_decode_num_excluded_requests"] == 1
    llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=30), use_tqdm=False)
    stats = llm.stats()
    assert stats["spec_decode_num_drafts"] > 0
    assert stats["spec_decode_num_excluded_requests"] == 1


@AHEAD
def test_an_aborted_request_leaves_nothing_behind(ahead):
    params = SamplingParams(temperature=0.0, max_tokens=60, frequency_penalty=0.1)
    want = said(PROMPTS, params)
    llm = drafting(tiny_llm(speculative_config=NGRAMS), PROMPTS, want, ahead)
    for i, prompt in enumerate(PROMPTS):
        llm.engine.add_request(str(i), prompt, params)
    for _ in range(9):
        llm.engine.step()
        llm.cache.check_integrity()
    llm.engine.abort("1")
    llm.engine.abort("4")
    done, _ = serve(llm)
    assert tokens(done) == {str(i): [want[i].outputs[0].token_ids] for i in (0, 2, 3, 5)}
    assert llm.stats()["penalty_rows"] == 0


@AHEAD
@pytest.mark.parametrize(
    "owner, name, error",
    [
        (SampledTokens, "get", KeyboardInterrupt()),
        (SampledTokens, "count", MemoryError()),
        (sampled_step.SampledStep, "rejected", KeyboardInterrupt()),
    ],
    ids=["interrupt", "memory", "late interrupt"],
)
@pytest.mark.parametrize("call", [2, 5, 8])
def test_a_step_that_is_interrupted_is_taken_again(monkeypatch, ahead, owner, name, error, call):
    params = SamplingParams(temperature=0.0, max_tokens=40, frequency_penalty=0.1)
    prompts = PROMPTS[:4]
    want = said(prompts, params)
    llm = drafting(tiny_llm(speculative_config=NGRAMS), prompts, want, ahead)
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    raise_once(monkeypatch, owner, name, error, call)
    done, raised = serve(llm, tolerate=KeyboardInterrupt)
    assert tokens(done) == {str(i): [o.outputs[0].token_ids] for i, o in enumerate(want)}
    assert raised == (not isinstance(error, MemoryError))


@AHEAD
def test_a_draw_that_raises_fails_its_request_alone(monkeypatch, ahead):
    params = SamplingParams(temperature=0.0, max_tokens=30)
    prompts = PROMPTS[:3]
    want = said(prompts, params)
    llm = drafting(tiny_llm(speculative_config=NGRAMS), prompts, want, ahead)
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    sample_row = sampled_step.sample_row

    def failing(completion, *rest):
        if completion.owner.request_id == "1" and len(completion.generated) > 8:
            raise ValueError("of this request")
        return sample_row(completion, *rest)

    monkeypatch.setattr(sampled_step, "sample_row", failing)
    done, _ = serve(llm)
    assert "of this request" in str(done["1"].error)
    for i in (0, 2):
        assert tokens(done)[str(i)] == [want[i].outputs[0].token_ids]


# ---- look-up -----------------------------------------------------------------------------


def looked_up(tokens, shortest, longest):
    """The definition: the earliest place of the longest n-gram at the end, and what followed it."""
    for n in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                return start + n
    return None


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=6),
    bounds=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
)
def test_the_longest_n_gram_is_found_where_it_was_first(parts, bounds):
    lookup, tokens = NgramLookup(*bounds), []
    for part in parts:
        tokens += part
        assert lookup.find(tokens) == looked_up(tokens, *bounds)


def test_a_draft_is_what_followed_and_as_long_as_asked_for():
    drafter = NgramDrafter(SpeculativeConfig(4, prompt_lookup_max=2))
    assert drafter.draft([1, 2, 3, 4, 5, 6, 1, 2], 4) == [3, 4, 5, 6]
    assert drafter.draft([1, 2, 3, 4, 5, 6, 1, 2], 2) == [3, 4]
    assert drafter.draft([1, 2, 3, 4, 5, 6, 1, 2], 0) == []
    assert drafter.draft([1, 2, 3, 4, 5, 6, 1, 2, 6], 4) == []


def test_drafts_that_never_come_true_become_rare():
    drafter, tokens, drafted = NgramDrafter(SpeculativeConfig(4, prompt_lookup_max=1)), [7], []
    for _ in range(400):
        tokens.append(7)
        if drafter.draft(tokens, 4):
            drafted.append(len(tokens))
            drafter.learn(len(tokens) + 1, 0)
    pauses = [b - a for a, b in zip(drafted, drafted[1:])]
    assert pauses == sorted(pauses) and pauses[0] <= 3 and pauses[-1] == MAX_PAUSE + 1
    drafter.learn(len(tokens), 1)
    assert drafter.draft(tokens, 4)
