"""Engine and LLM on a small random model: batching, pressure, prefixes, seeds, refusals."""

from __future__ import annotations

import functools
import gc

import pytest
import torch

from spectral_paged import LLM, SamplingParams
from spectral_paged.errors import (
    CapacityError,
    EmptyPromptError,
    FormatError,
    InvalidRequestError,
    NonFiniteError,
    PoolError,
    PromptTooLongError,
)
from support.tiny_model import VOCAB, raise_once, random_prompts, tiny_format, tiny_llm, tiny_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
LENGTHS = [1, 63, 64, 65, 575, 576, 577, 640, 700, 1087, 1088, 1152, 1217, 1500]


def tokens(outputs):
    return [[c.token_ids for c in o.outputs] for o in outputs]


def generate(llm, prompts, params=GREEDY):
    out = llm.generate(prompts, params, use_tqdm=False)
    llm.cache.check_integrity()
    assert llm.stats()["num_sequences"] == 0
    return out


@pytest.fixture(scope="module")
def alone():
    """Tokens of every prompt of `LENGTHS`, each generated with nobody else."""
    return [tokens(generate(tiny_llm(), [p]))[0] for p in random_prompts(LENGTHS)]


def test_the_tiny_model_says_different_things(alone):
    assert len({tuple(c[0]) for c in alone}) == len(LENGTHS)
    assert all(len(set(c[0])) > 2 for c in alone)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("budget", [64, 512, 8192])
def test_batch_mates_order_and_budget_change_no_token(alone, order, budget):
    llm = tiny_llm(max_num_batched_tokens=budget)
    out = generate(llm, random_prompts(LENGTHS)[::order])
    assert tokens(out)[::order] == alone
    stats = llm.stats()
    assert stats["pages_sealed"] > 0 and stats["pages_attended"] > 0


LONG = (
    random_prompts([300, 600, 650, 700, 400, 620, 900, 560, 610], seed=5),
    SamplingParams(temperature=0.0, max_tokens=90),
)


@functools.cache
def in_a_roomy_pool(format):
    roomy = tiny_llm(tiny_format(format), enable_prefix_caching=False)
    found = tokens(generate(roomy, *LONG))
    assert roomy.stats()["preemptions"] == 0
    return found


@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_full_pool_preempts_and_changes_no_token(format, prefix_caching):
    tight = tiny_llm(
        tiny_format(format),
        kv_cache_bytes=1_100_000 if format == "exact" else 700_000,
        enable_prefix_caching=prefix_caching,
    )
    out = generate(tight, *LONG)
    stats = tight.stats()
    assert stats["preemptions"] > 0 and tokens(out) == in_a_roomy_pool(format)
    assert sum(o.metrics.num_preemptions for o in out) == stats["preemptions"]


@pytest.mark.parametrize("format", ["spectral-int8", "exact"])
def test_a_prefix_hit_changes_no_token(format):
    shared, *ends = random_prompts([1300, 5, 90, 700], seed=9)
    prompts = [shared + e for e in ends] + [shared]
    cold = tiny_llm(tiny_format(format), enable_prefix_caching=False)
    want = tokens(generate(cold, prompts))
    warm = tiny_llm(tiny_format(format))
    generate(warm, [shared])
    out = generate(warm, prompts)
    assert tokens(out) == want
    assert all(o.metrics.num_cached_tokens >= 1280 for o in out)
    assert warm.stats()["prefix_hit_tokens"] >= 4 * 1280
    assert cold.stats()["prefix_hit_tokens"] == 0


def test_seeded_sampling_is_the_same_whatever_else_runs():
    prompts = random_prompts([5, 650, 70], seed=2)
    params = [SamplingParams(temperature=1.0, max_tokens=10, seed=s, top_p=0.95) for s in range(3)]
    together = tokens(generate(tiny_llm(), prompts, params))
    for i in range(3):
        assert tokens(generate(tiny_llm(seed=99), [prompts[i]], [params[i]]))[0] == together[i]
    assert tokens(generate(tiny_llm(), prompts[::-1], params[::-1]))[::-1] == together


def test_unseeded_requests_differ_within_a_run_and_repeat_across_runs():
    prompt = random_prompts([20])[0]
    params = SamplingParams(temperature=1.0, max_tokens=12)
    first = tokens(generate(tiny_llm(seed=1), [prompt] * 3, params))
    assert len({tuple(c[0]) for c in first}) == 3
    assert tokens(generate(tiny_llm(seed=1), [prompt] * 3, params)) == first
    assert tokens(generate(tiny_llm(seed=2), [prompt] * 3, params)) != first


@pytest.mark.parametrize("prompt_length", [10, 639, 1217])
def test_n_completions_share_the_prompt_and_equal_single_ones(prompt_length):
    prompt = random_prompts([prompt_length], seed=4)[0]
    llm = tiny_llm()
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=11)
    out = generate(llm, [prompt], params)[0]
    assert [c.index for c in out.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in out.outputs}) == 3
    # a pool with one seat cannot fork: siblings are computed one after the other
    single = tiny_llm(max_num_seqs=1)
    assert tokens(generate(single, [prompt], params)) == tokens([out])


def test_n_greedy_completions_are_equal():
    out = generate(tiny_llm(), random_prompts([700]), SamplingParams(n=2, temperature=0.0))[0]
    assert out.outputs[0].token_ids == out.outputs[1].token_ids


def test_stop_token_eos_min_tokens_and_ignore_eos():
    prompt = random_prompts([30], seed=8)[0]
    free = tokens(generate(tiny_llm(), [prompt], SamplingParams(temperature=0.0, max_tokens=20)))
    run = free[0][0]
    stop = run[4]
    first = run.index(stop)

    def one(eos=None, **kw):
        llm = tiny_llm()
        llm.engine.eos_token_ids = () if eos is None else (eos,)
        params = SamplingParams(temperature=0.0, max_tokens=20, **kw)
        return generate(llm, [prompt], params)[0].outputs[0]

    out = one(stop_token_ids=[stop])
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert out.token_ids == run[: first + 1]
    out = one(eos=stop)
    assert (out.finish_reason, out.stop_reason, out.token_ids) == ("stop", None, run[: first + 1])
    out = one(eos=stop, ignore_eos=True)
    assert (out.finish_reason, out.token_ids) == ("length", run)
    out = one(stop_token_ids=[stop], min_tokens=first + 2)
    assert len(out.token_ids) >= first + 2 and stop not in out.token_ids[: first + 1]


def test_max_model_len_ends_a_completion_with_length():
    llm = tiny_llm(max_model_len=40)
    out = generate(llm, random_prompts([30]), SamplingParams(temperature=0.0, max_tokens=100))[0]
    assert out.outputs[0].finish_reason == "length" and len(out.outputs[0].token_ids) == 10


def test_logprobs_are_those_of_the_model():
    model, prompt = tiny_model(), random_prompts([50], seed=1)[0]
    with torch.no_grad():
        want = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    out = generate(tiny_llm(), [prompt], SamplingParams(temperature=0.0, logprobs=3))[0].outputs[0]
    first = out.logprobs[0]
    top = want.topk(3)
    assert sorted(first) == sorted(top.indices.tolist())
    for token, value in zip(top.indices.tolist(), top.values.tolist()):
        assert first[token].logprob == pytest.approx(value, abs=1e-4)
    assert first[out.token_ids[0]].rank == 1 and len(out.logprobs) == len(out.token_ids)


def test_abort_frees_and_the_rest_goes_on(alone):
    llm = tiny_llm()
    prompts = random_prompts(LENGTHS)
    for name, i in (("stays", 8), ("goes", 10)):
        llm.engine.add_request(name, prompts[i], GREEDY)
    llm.engine.step()
    llm.engine.abort("goes")
    llm.engine.abort("goes")
    done = {}
    while llm.engine.has_unfinished():
        for output in llm.engine.step():
            done[output.request_id] = output
    assert list(done) == ["stays"] and tokens([done["stays"]])[0] == alone[8]
    llm.cache.check_integrity()
    assert llm.stats()["num_sequences"] == 0


def test_two_streams_take_turns_and_lose_nothing(alone):
    llm = tiny_llm()
    prompts = random_prompts(LENGTHS)
    streams = {i: llm.stream(prompts[i], GREEDY) for i in (2, 8)}
    got = {i: [] for i in streams}
    while streams:
        for i, stream in list(streams.items()):
            delta = next(stream, None)
            if delta is None:
                del streams[i]
            else:
                got[i] += delta.token_ids
    assert got == {i: alone[i][0] for i in got}


def test_closing_a_stream_aborts_its_request():
    llm = tiny_llm()
    stream = llm.stream(random_prompts([700]), SamplingParams(temperature=0.0, max_tokens=500))
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished() and llm.stats()["num_sequences"] == 0


BAD = {
    "empty": ([], EmptyPromptError, "empty"),
    "over max_model_len": ([1] * 1000, PromptTooLongError, "max_model_len 900"),
    "never fits": ([1] * 850, CapacityError, "never fit"),
    "not a token": ([1, "x"], InvalidRequestError, "'x' is not a token id"),
    "outside the vocabulary": ([VOCAB], InvalidRequestError, f"vocabulary of {VOCAB}"),
    "text without a tokenizer": ("hello", InvalidRequestError, "tokenizer"),
    "a mapping without a prompt": ({"text": [1]}, InvalidRequestError, "prompt_token_ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_prompt_is_refused_and_the_others_finish(case):
    prompt, error, message = BAD[case]
    llm = tiny_llm(kv_cache_bytes=380_000, max_model_len=900)
    good = random_prompts([20, 40])
    want = tokens(generate(llm, good))
    with pytest.raises(error, match=message) as caught:
        llm.generate([good[0], prompt, good[1]], GREEDY, use_tqdm=False)
    outputs = caught.value.outputs
    assert outputs[1] is None and tokens([outputs[0], outputs[2]]) == want
    assert llm.stats()["num_sequences"] == 0 and not llm.engine.has_unfinished()


def test_nan_in_the_model_fails_its_request_and_no_other(alone):
    """Token 0 has an infinite embedding: whoever feeds it gets an error, nobody else."""
    prompts = [[t or 1 for t in p] for p in random_prompts([30, 700, 60], seed=6)]
    bad = list(prompts[1])
    bad[100] = 0
    llm = tiny_llm()
    want = tokens(generate(llm, [prompts[0], prompts[2]]))
    with torch.no_grad():
        llm.engine.runner.model.model.embed_tokens.weight[0] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or Inf") as caught:
        llm.generate([prompts[0], bad, prompts[2]], GREEDY, use_tqdm=False)
    outputs = caught.value.outputs
    assert tokens([outputs[0], outputs[2]]) == want
    assert outputs[1].outputs[0].finish_reason == "error"
    with torch.no_grad():
        llm.engine.runner.model.model.embed_tokens.weight[0] = 0.1
    healed = generate(llm, [bad])
    assert healed[0].metrics.num_cached_tokens == 0, "spoiled pages are not found again"


def test_a_failing_forward_leaves_the_engine_usable(alone, monkeypatch):
    llm = tiny_llm()
    prompts = random_prompts(LENGTHS)
    raise_once(monkeypatch, llm.engine.runner, "forward", RuntimeError("out of memory"), 3)
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.generate([prompts[8]], GREEDY, use_tqdm=False)
    llm.cache.check_integrity()
    assert llm.stats()["num_sequences"] == 0
    assert tokens(generate(llm, [prompts[8]]))[0] == alone[8]


def test_a_pool_held_from_outside_is_named_and_not_waited_for():
    llm = tiny_llm(max_num_seqs=1)
    llm.cache.add_sequence("mine", num_prompt_tokens=3)
    with pytest.raises(PoolError, match="no request can run"):
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


def test_options_out_of_range_are_refused_with_the_limit():
    model = tiny_model()
    with pytest.raises(InvalidRequestError, match="4096"):
        LLM.from_model(model, max_model_len=5000)
    with pytest.raises(FormatError, match="no-such"):
        LLM.from_model(model, kv_format="no-such")
    with pytest.raises(InvalidRequestError, match="2 sampling parameters for 1 prompts"):
        tiny_llm().generate([[1]], [GREEDY, GREEDY])


@pytest.mark.parametrize("device", ["foo", "cuda:77", "mps"])
def test_a_device_that_is_not_there_is_refused_before_the_model_loads(device):
    with pytest.raises(InvalidRequestError, match="device is"):
        LLM("smollm2-135m", device=device)


def test_text_that_cannot_be_encoded_is_refused():
    llm = tiny_llm()
    llm.engine.tokenizer = lambda text: pytest.fail("the tokenizer never sees it")
    with pytest.raises(InvalidRequestError, match="not valid text"):
        llm.engine.add_request("x", "a \ud800 b")


def test_sixty_four_requests_leave_nothing_behind():
    """64 more requests add no Python object and no tensor byte; the arenas stay where they are."""
    llm = tiny_llm(kv_cache_bytes=2_000_000, max_num_seqs=4)
    arenas = [g.arena.planes.data_ptr() for g in llm.cache.groups]

    def serve(count, seed):
        lengths = [(37 * i) % 700 + 1 for i in range(count)]
        params = SamplingParams(temperature=0.0, max_tokens=4)
        llm.generate(random_prompts(lengths, seed), params, use_tqdm=False)
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return len(gc.get_objects()), sum(t.untyped_storage().nbytes() for t in tensors)

    serve(24, 1)  # fills the prefix map, which the pool's size bounds
    objects, tensor_bytes = serve(16, 2)
    more_objects, more_tensor_bytes = serve(64, 3)
    assert more_objects - objects < 64, "some object stays behind with every request"
    assert more_tensor_bytes == tensor_bytes
    assert [g.arena.planes.data_ptr() for g in llm.cache.groups] == arenas
    assert llm.stats()["num_sequences"] == 0
