"""Refusals of cache, engine and LLM name a remedy, and integrity checks notice corruption."""

from __future__ import annotations

import pytest
import torch

from spectral_paged import PageFormat, SamplingParams, SpectralKVCache
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import (
    CapacityError,
    FormatError,
    InvalidRequestError,
    NonFiniteError,
    PoolError,
    RequestFailedError,
)
from spectral_paged.kernels.page.layout import EXACT_PAGE_TOKENS
from support.cache_feed import HQ, LAYERS, ROPE, D, H, fmt, make, slots_of
from support.tiny_model import tiny_llm

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


def cache_of(**changes):
    fields = {
        "num_layers": LAYERS,
        "num_q_heads": HQ,
        "num_kv_heads": H,
        "head_dim": D,
        "rope": ROPE,
        "format": fmt(),
        "kv_cache_bytes": 12 << 20,
    }
    return SpectralKVCache(**fields | changes)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"head_dim": 32}, "is for 2 KV heads of width 16; the model has 2 of 32"),
        ({"num_kv_heads": 3}, "the model has 3 of 16"),
        ({"num_q_heads": 3}, "3 query heads do not divide over 2 KV heads"),
        ({"exempt_layers": (0, LAYERS, -1)}, rf"\[{LAYERS}, -1\] do not exist"),
        ({"rope": None}, "pass the model's RotaryTable"),
        ({"rope": None, "format": fmt("exact")}, "max_model_len must be given"),
        ({"max_model_len": ROPE.max_positions + 1}, "lower max_model_len"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(changes, says):
    with pytest.raises(FormatError, match=says):
        cache_of(**changes)


def test_a_pool_of_less_than_two_slabs_says_how_much_it_takes():
    with pytest.raises(CapacityError, match="at least 2 are needed: give kv_cache_bytes >= ") as e:
        cache_of(kv_cache_bytes=1000)
    need = int(str(e.value).rsplit(">= ", 1)[1])
    assert cache_of(kv_cache_bytes=need, max_model_len=512).capacity_tokens > 0
    with pytest.raises(CapacityError):
        cache_of(kv_cache_bytes=need - LAYERS, max_model_len=512)


def test_attend_says_which_shapes_it_takes():
    cache = make()
    cache.begin_step(cache.reserve({"a": 3}))
    q, k = torch.zeros(3, HQ, D), torch.zeros(3, H, D)
    for wrong in ((q[:2], k, k), (q, k[:, :1], k), (q, k, k.repeat(1, 3, 1))):
        with pytest.raises(FormatError, match=r"takes q \[3, 6, 16\], k and v \[3, 2, 16\]; got"):
            cache.attend(0, *wrong)
    with pytest.raises(FormatError, match="got q None"):
        cache.append(0, k[:2], k)
    cache.attend(0, q, k, k)


def test_steps_out_of_order_are_refused():
    cache = make()
    for call in (cache.end_step, lambda: cache.attend(0, *torch.zeros(3, 1, H, D))):
        with pytest.raises(PoolError, match="outside begin_step / end_step"):
            call()
    plan = cache.reserve({"a": 3})
    cache.begin_step(plan)
    with pytest.raises(PoolError, match="before end_step of the step before"):
        cache.begin_step(plan)
    cache.abort_step()
    cache.abort_step()  # nothing is open: nothing to forget
    cache.check_integrity()


def test_tokens_that_cannot_be_stored_are_refused():
    cache = make(max_model_len=700)
    cache.add_sequence("a", num_prompt_tokens=640)
    with pytest.raises(ValueError, match="0 new tokens for 'a': at least 1"):
        cache.try_reserve("a", 0)
    with pytest.raises(CapacityError, match="'a' would hold 701 tokens; max_model_len is 700"):
        cache.try_reserve("a", 701)
    most = cache.chunk_limit("a")
    with pytest.raises(ValueError, match=rf"at most {most} now \(chunk_limit\)"):
        cache.try_reserve("a", most + 1)
    with pytest.raises(PoolError, match="'b' is not held"):
        cache.try_reserve("b", 1)
    with pytest.raises(PoolError, match="'b' is not held: double free"):
        cache.free("b")
    with pytest.raises(PoolError, match="'a' is held already"):
        cache.add_sequence("a", num_prompt_tokens=1)
    cache.check_integrity()


def test_a_step_that_is_refused_holds_nothing():
    cache = make(max_model_len=700)
    cache.add_sequence("b", num_prompt_tokens=70)
    with pytest.raises(CapacityError, match="'c' would hold 701 tokens"):
        cache.reserve({"a": 3, "b": 70, "c": 701})
    assert "a" not in cache and "b" in cache and "c" not in cache
    assert cache.stats()["exact_pages_in_use"] == 0
    cache.check_integrity()


def test_a_sequence_that_failed_takes_no_more_tokens():
    cache = make()
    cache.add_sequence("a", num_prompt_tokens=640)
    while (left := 640 - cache.num_tokens("a")) > 0:
        new = min(left, cache.chunk_limit("a"))
        cache.begin_step(cache.reserve({"a": new}))
        k = torch.full((new, H, D), float("nan"))
        for layer in range(LAYERS):
            cache.append(layer, k, k)
        report = cache.end_step()
    assert isinstance(report.failed["a"], NonFiniteError)
    with pytest.raises(PoolError, match="'a' failed: K of sequence 'a' has NaN or Inf in layer 0"):
        cache.try_reserve("a", 1)
    cache.free("a")
    cache.check_integrity()


# ---- integrity of the façade -------------------------------------------------------------


def held():
    cache = make(max_num_seqs=3)
    cache.begin_step(cache.reserve({"a": 2 * EXACT_PAGE_TOKENS + 3}))
    cache.end_step()
    cache.check_integrity()
    return cache, cache.groups[0], slots_of(cache, "a")


CORRUPTIONS = {
    "the EXACT table row of 'a' is stale": lambda c, g, s: g.exact_table.host[s.row].fill_(7),
    "the PAGE table row of 'a' is stale": lambda c, g, s: g.page_table.host[s.row].fill_(7),
    "reference counts differ": lambda c, g, s: g.arena.slots.acquire(s.exact[0]),
    "differ from what sequences hold": lambda c, g, s: g.arena.slots.allocate(0),
    "a table row is lost": lambda c, g, s: c._sequences._free_rows.pop(),
    "hold different sequences": lambda c, g, s: g.take_row(2),
}


@pytest.mark.parametrize("says", CORRUPTIONS)
def test_integrity_notices_what_is_not_whole(says):
    cache, group, slots = held()
    CORRUPTIONS[says](cache, group, slots)
    with pytest.raises(PoolError, match=says):
        cache.check_integrity()


# ---- requests ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, says",
    [
        ({"prompt_token_ids": [1], "image": 3}, r"has \['image'\]; it takes"),
        ({"cache_salt": "x"}, r"needs 'prompt' or 'prompt_token_ids'; got \['cache_salt'\]"),
        ({"prompt_token_ids": [1, 2], "pinned_spans": [(0, 3)]}, "does not lie in the prompt of 2"),
        ([1, 5000], "5000"),
    ],
)
def test_a_prompt_that_is_refused_takes_others_of_a_stream_with_it(prompt, says):
    llm = tiny_llm()
    with pytest.raises(InvalidRequestError, match=says):
        next(llm.stream([[1, 2, 3], prompt], GREEDY))
    assert not llm.engine.has_unfinished() and llm.stats()["num_sequences"] == 0


def test_names_and_stop_tokens_are_checked_before_anything_is_queued():
    engine = tiny_llm().engine
    engine.add_request("a", [1, 2], GREEDY)
    with pytest.raises(InvalidRequestError, match="request id 'a' is running already"):
        engine.add_request("a", [1], GREEDY)
    with pytest.raises(InvalidRequestError, match=r"stop_token_ids \[900\] are outside"):
        engine.add_request("b", [1], SamplingParams(stop_token_ids=[3, 900]))
    engine.abort("b")  # unknown: ignored
    assert engine.stats()["waiting"] == 1


def test_one_parameter_or_as_many_as_prompts():
    with pytest.raises(InvalidRequestError, match="2 sampling parameters for 3 prompts"):
        tiny_llm().generate([[1], [2], [3]], [GREEDY, GREEDY], use_tqdm=False)


def test_a_tokenizer_that_raises_fails_its_own_request_only(monkeypatch):
    llm = tiny_llm()
    engine = llm.engine

    class Tokenizer:
        all_special_ids = ()

        def __len__(self):
            return 900

        def convert_ids_to_tokens(self, token_id):
            return "a"

        def decode(self, ids, **_):
            raise KeyError("no such piece")

    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1)
    engine.add_request("good", [1, 2, 3], GREEDY)
    engine.token_bytes = TokenBytes(Tokenizer())  # of requests from now on
    engine.add_request("bad", [4, 5, 6], params)
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    assert done["good"].error is None and len(done["good"].outputs[0].token_ids) == 4
    assert isinstance(done["bad"].error, RequestFailedError)
    assert "'bad' failed while its output was processed" in str(done["bad"].error)
    assert "KeyError" in str(done["bad"].error)
    assert done["bad"].outputs[0].finish_reason == "error"
    llm.cache.check_integrity()


def test_an_engine_whose_pool_another_holds_says_so():
    llm = tiny_llm(PageFormat.preset("exact", num_kv_heads=2, head_dim=16), kv_cache_bytes=200_000)
    cache = llm.cache
    cache.add_sequence("other", num_prompt_tokens=1)
    while cache.try_reserve("other", cache.groups[0].arena.slots.num_in_use[0] * 64 + 1):
        pass
    llm.engine.add_request("a", [1] * 10, GREEDY)
    with pytest.raises(PoolError, match="0 running, 1 waiting; every sequence may hold slots"):
        llm.engine.step()
    cache.free("other")
    while llm.engine.has_unfinished():
        outputs = llm.engine.step()
    assert outputs[0].outputs[0].finish_reason == "length"
