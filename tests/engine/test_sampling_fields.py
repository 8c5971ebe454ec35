"""Fields of requests that concern text, lengths and outputs have vLLM's meaning."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from spectral_paged import SamplingParams
from spectral_paged.engine.text import OutputText
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import CapacityError, PromptTooLongError, SamplingParamsError
from spectral_paged.outputs import RequestOutputKind
from support.served import LETTERS, served_llm
from support.small_tokenizers import byte_fallback
from support.tiny_model import random_prompts, tiny_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


@pytest.fixture(scope="module")
def llm():
    return served_llm()


def one(llm, prompt="tell me", **values):
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 12} | values))
    return llm.generate([prompt], params, use_tqdm=False)[0]


def test_a_stop_string_stays_in_the_text_where_asked(llm):
    free = one(llm).outputs[0].text
    stop = free[4:6]
    without, kept = (one(llm, stop=stop, include_stop_str_in_output=keep) for keep in (False, True))
    end = free.index(stop)
    assert without.outputs[0].text == free[:end]
    assert kept.outputs[0].text == free[: end + len(stop)]
    assert kept.outputs[0].stop_reason == without.outputs[0].stop_reason == stop


def test_the_text_of_a_stop_token_stays_where_asked(llm):
    free = one(llm).outputs[0]
    token = free.token_ids[5]
    end = free.token_ids.index(token)
    for keep in (False, True):
        got = one(llm, stop_token_ids=[token], include_stop_str_in_output=keep).outputs[0]
        assert got.text == free.text[: end + keep] and got.stop_reason == token
        assert got.token_ids == free.token_ids[: end + 1]


def test_a_kept_stop_string_holds_nothing_back(llm):
    free = one(llm).outputs[0].text
    text = OutputText(TokenBytes(llm.get_tokenizer()), stop=[f"{free[0]}never"], keep_stop=True)
    text.append(LETTERS.index(free[0]))
    assert text.settled() == free[0]


def test_without_detokenization_there_is_no_text(llm):
    got, free = one(llm, detokenize=False, logprobs=1).outputs[0], one(llm).outputs[0]
    assert got.text == "" and got.token_ids == free.token_ids
    assert {entry.decoded_token for table in got.logprobs for entry in table.values()} == {""}


@pytest.mark.parametrize("spaces", [True, False])
def test_special_tokens_behind_each_other_are_joined_where_asked(spaces):
    tokenizer = byte_fallback("metaspace")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.add_special_tokens({"additional_special_tokens": ["▁<a>", "<b>"]})
    a, b = tokenizer.convert_tokens_to_ids(["▁<a>", "<b>"])
    text = OutputText(
        TokenBytes(tokenizer), skip_special_tokens=False, spaces_between_special_tokens=spaces
    )
    for token in (b, a, b):
        text.append(token)
    assert text.text == ("<b> <a><b>" if spaces else "<b>▁<a><b>")


def test_no_max_tokens_is_the_room_there_is():
    llm = tiny_llm(max_model_len=100)
    (prompt,) = random_prompts([30], seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
    (got,) = llm.generate([prompt], params, use_tqdm=False)
    assert len(got.outputs[0].token_ids) == 70 and got.outputs[0].finish_reason == "length"
    small = tiny_llm(kv_cache_bytes=700_000)
    most = small.cache.max_sequence_tokens
    assert most < small.cache.max_model_len, "the pool is the limit"
    (prompt,) = random_prompts([most - 20], seed=1)
    (got,) = small.generate([prompt], params, use_tqdm=False)
    assert len(got.outputs[0].token_ids) == 20
    with pytest.raises((CapacityError, PromptTooLongError)):
        small.generate([[1] * most], params, use_tqdm=False)


@pytest.mark.parametrize("keep, left", [(1, 1), (5, 5), (64, 50), (-1, 50)])
def test_a_prompt_keeps_its_end(llm, keep, left):
    text = "".join(LETTERS[:50])
    got = one(llm, text, truncate_prompt_tokens=keep)
    assert got.prompt_token_ids == list(range(50))[-left:]
    ids = one(llm, list(range(50)), truncate_prompt_tokens=keep)
    assert ids.prompt_token_ids == got.prompt_token_ids


def test_a_prompt_that_is_too_long_is_cut_to_what_fits(llm):
    long = "x" * (llm.cache.max_model_len + 5)
    with pytest.raises(PromptTooLongError):
        one(llm, long)
    assert len(one(llm, long, truncate_prompt_tokens=-1, max_tokens=1).prompt_token_ids) == (
        llm.cache.max_model_len - 1
    )
    talk = [{"role": "user", "content": long}]
    params = SamplingParams(max_tokens=1, truncate_prompt_tokens=20)
    (got,) = llm.chat(talk, params, use_tqdm=False)
    assert got.prompt_token_ids == llm.get_tokenizer()("xxxxxxxxx<assistant>")["input_ids"]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_completion_that_repeats_itself_ends(ahead):
    llm = tiny_llm()
    llm.engine.async_scheduling = ahead
    rule = {"max_pattern_size": 2, "min_count": 4}
    params = SamplingParams(
        temperature=0.0, max_tokens=40, logit_bias={5: 1000.0}, repetition_detection=rule
    )
    (got,) = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    (made,) = got.outputs
    assert made.token_ids == [5] * 4
    assert (made.finish_reason, made.stop_reason) == ("repetition", "repetition_detected")
    assert llm.stats()["finished"]["repetition"] == 1


def steps(llm, kind, **values):
    """The outputs of every step for one request of two completions."""
    params = SamplingParams(n=2, temperature=1.0, seed=4, max_tokens=9, output_kind=kind, **values)
    llm.engine.add_request("a", "tell me", params)
    found = []
    while llm.engine.has_unfinished():
        found += llm.engine.step()
    return found


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("stop", [None, "qq"])
def test_outputs_come_whole_in_pieces_or_at_the_end(ahead, stop):
    llm = served_llm()
    llm.engine.async_scheduling = ahead
    kinds = RequestOutputKind
    *_, whole = steps(llm, kinds.CUMULATIVE, logprobs=1, stop=stop)
    (final,) = steps(llm, kinds.FINAL_ONLY, logprobs=1, stop=stop)
    assert final.finished and final.outputs == whole.outputs
    pieces = steps(llm, kinds.DELTA, logprobs=1, stop=stop)
    assert len(pieces) > 5 and [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]
    for want in whole.outputs:
        mine = [c for p in pieces for c in p.outputs if c.index == want.index]
        assert "".join(c.text for c in mine) == want.text
        assert sum((c.token_ids for c in mine), []) == want.token_ids
        assert sum((c.logprobs for c in mine), []) == want.logprobs
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + [want.finish_reason]


def test_the_offline_api_returns_whole_outputs_whatever_the_kind(llm):
    want = one(llm)
    for kind in RequestOutputKind:
        assert one(llm, output_kind=kind).outputs == want.outputs


def test_what_is_assigned_later_changes_no_running_request(llm):
    params = GREEDY.clone()
    llm.engine.add_request("a", "tell me", params)
    params.max_tokens = 1
    found = []
    while llm.engine.has_unfinished():
        found += llm.engine.step()
    assert len(found[-1].outputs[0].token_ids) == 12


def test_assigned_values_that_do_not_go_together_are_refused_and_counted(llm):
    params = GREEDY.clone()
    params.min_tokens = 13
    with pytest.raises(SamplingParamsError, match="between 0 and max_tokens"):
        llm.engine.add_request("a", "tell me", params)
    assert llm.stats()["refused"]["SamplingParamsError"] == 1


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_stop_string_ends_with_a_token_after_the_first_min_tokens(llm, place, keep):
    """As in vLLM, whose detokenizer looks for them once there are more than `min_tokens`."""
    (free,) = llm.generate(["tell me"], GREEDY, use_tqdm=False)
    text = free.outputs[0].text
    stop = text[place]
    for least in range(12):
        params = GREEDY.clone()
        params.stop, params.min_tokens, params.include_stop_str_in_output = stop, least, keep
        (out,) = llm.generate(["tell me"], params, use_tqdm=False)
        at = text.find(stop, least)  # a token is a character here
        ended = at >= 0
        assert out.outputs[0].finish_reason == ("stop" if ended else "length")
        assert out.outputs[0].text == (text[: at + keep] if ended else text)
