"""Other requests finish after NaN, an exception of one request, or an interrupt.

The error names the request that it is about.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from spectral_paged import SamplingParams
from spectral_paged.engine import sampled_step
from spectral_paged.engine.requests import Completion
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.errors import (
    InvalidRequestError,
    NonFiniteError,
    RequestFailedError,
)
from support.cache_feed import Feed, drive, fmt, make
from support.fault_runs import AHEAD, FORMAT, GREEDY, PROMPTS, make_llm, queue, serve, tokens, want
from support.tiny_model import raise_once, random_prompts, tiny_llm

# ---- NaN and Inf -------------------------------------------------------------------------


@AHEAD
@FORMAT
@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("length", [40, 300, 700])
def test_what_nan_has_touched_is_found_by_nobody(format, ahead, value, length):
    """In K and V, then in the logits: one request fails; healed, its prompt starts anew."""
    good, bad = ([t or 1 for t in p] for p in random_prompts([650, length], seed=6))
    bad[20] = 0
    llm = make_llm(ahead, format)
    embedding = llm.engine.runner.model.model.embed_tokens.weight
    healthy = embedding[0].clone()
    with torch.no_grad():
        embedding[0] = float(value)
    queue(llm, [good, bad])
    done, _ = serve(llm)
    assert done["0"].error is None and isinstance(done["1"].error, NonFiniteError)
    assert "'1" in str(done["1"].error) and done["1"].error.request_id == "1"
    with torch.no_grad():
        embedding[0] = healthy
    queue(llm, [good, bad])
    again, _ = serve(llm)
    assert tokens(again) == want(format, prompts=[good, bad])
    assert again["1"].metrics.num_cached_tokens == 0
    assert again["0"].metrics.num_cached_tokens == 640


@AHEAD
def test_nan_in_the_logits_of_one_request_fails_it_alone(monkeypatch, ahead):
    llm = make_llm(ahead)
    forward, calls = llm.engine.runner.forward, []

    def spoil(plan, token_ids, rows, pending=None):
        logits = forward(plan, token_ids, rows, pending).clone()
        calls.append(1)
        ends = [e.seq_id for e in plan.entries]
        if len(calls) == 3 and "1#0" in ends and len(ends) == len(rows):
            logits[ends.index("1#0"), 7] = float("nan")
        return logits

    monkeypatch.setattr(llm.engine.runner, "forward", spoil)
    expected = want(prompts=PROMPTS[:2])
    queue(llm, PROMPTS[:2])
    done, _ = serve(llm)
    assert tokens(done)["0"] == expected["0"]
    assert isinstance(done["1"].error, NonFiniteError) and "'1'" in str(done["1"].error)
    assert done["1"].outputs[0].token_ids == expected["1"][0][:2], "what came before is kept"


def test_what_pages_replaced_is_forgotten_with_them():
    """As on CUDA, where NaN is known late: the exact pages that went are found by nobody."""
    cache, ids = make(fmt()), list(range(1900))
    drive(cache, {"a": Feed(1, 1900)}, {"a": 1900}, {"a": 1900}, {"a": ids})
    cache.free("a", forget=True)
    for count in (1900, 700, 65):
        assert cache.add_sequence("b", num_prompt_tokens=count, token_ids=ids[:count]) == 0
        cache.free("b")
    stats = cache.stats()
    assert stats["exact_pages_cached"] == stats["pages_cached"] == 0


def test_nan_that_a_retry_of_a_seal_finds_fails_its_request_and_no_other(monkeypatch):
    """The step that found it raised before it could tell: nobody may be scheduled with it."""
    llm = make_llm(False)
    good, bad = ([t or 1 for t in p] for p in random_prompts([1300, 1900], seed=6))
    bad[20] = 0
    with torch.no_grad():
        llm.engine.runner.model.model.embed_tokens.weight[0] = float("nan")
    raise_once(monkeypatch, llm.cache.sealer, "seal", RuntimeError("no"), 1)
    raise_once(monkeypatch, llm.engine.runner, "forward", RuntimeError("no"), 2)
    params = SamplingParams(temperature=0.0, max_tokens=10)
    for name, prompt in (("good", good), ("bad", bad)):
        llm.engine.add_request(name, prompt, params)
    done, _ = serve(llm, RuntimeError)
    assert isinstance(done["bad"].error, NonFiniteError)
    assert done["good"].error is None and len(done["good"].outputs[0].token_ids) == 10


# ---- one request's own processing --------------------------------------------------------


def word_tokenizer():
    """Token ids as words, through the same classes as a real tokenizer."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(199)}, unk_token="w0"))
    backend.decoder = decoders.Fuse()

    class Words:
        backend_tokenizer = backend

        def decode(self, ids):
            return "".join(f"w{i}" for i in ids)

    return Words()


class Panic(BaseException):
    """What a tokenizer written in Rust raises is no Exception."""


@AHEAD
@pytest.mark.parametrize("error", [RuntimeError("bad text"), Panic("bad text")], ids=repr)
@pytest.mark.parametrize("where", ["text", "logprobs"])
def test_a_detokenizer_that_raises_fails_its_request_alone(monkeypatch, where, error, ahead):
    llm = make_llm(ahead)
    params = SamplingParams(temperature=0.0, max_tokens=10, logprobs=1, stop=["nothing"])
    expected = want(params=params)
    llm.engine.tokenizer = tokenizer = word_tokenizer()
    llm.engine.token_bytes = TokenBytes(tokenizer)
    queue(llm, params=params)
    victim = llm.engine.requests.by_id["2"].completions[0].text
    if where == "text":
        raise_once(monkeypatch, victim, "append", error, 4)
    else:
        take = Completion.take

        def only_two(self, result, eos):
            if self.owner.request_id == "2" and len(self.output.token_ids) == 3:
                raise error
            return take(self, result, eos)

        monkeypatch.setattr(Completion, "take", only_two)
    done, _ = serve(llm)
    failed = done.pop("2")
    assert failed.error.request_id == "2" and "bad text" in str(failed.error)
    assert "request '2' failed while its output was processed" in str(failed.error)
    del expected["2"]
    assert tokens(done) == expected
    assert done["0"].outputs[0].text == tokenizer.decode(done["0"].outputs[0].token_ids)


@AHEAD
@pytest.mark.parametrize("count", [1, 4])
def test_a_row_that_cannot_be_sampled_fails_its_request_alone(monkeypatch, count, ahead):
    llm, draw = make_llm(ahead), sampled_step.SampledTokens

    def picky(logits, rows, penalties):
        if any(r.seed == 666 and r.num_output_tokens == 2 for r in rows):
            raise IndexError("logits processor")
        return draw(logits, rows, penalties)

    monkeypatch.setattr(sampled_step, "SampledTokens", picky)
    expected = want(prompts=PROMPTS[:count])
    queue(llm, PROMPTS[:count])
    llm.engine.requests.by_id["0"].completions[0].seed = 666
    done, _ = serve(llm)
    failed = done.pop("0")
    assert isinstance(failed.error, RequestFailedError)
    assert isinstance(failed.error.__cause__, IndexError)
    assert "request '0' failed while its token was sampled" in str(failed.error)
    assert "logits processor" in str(failed.error)
    # queued ahead, the token on its way is dropped
    assert failed.outputs[0].token_ids == expected.pop("0")[0][: 1 if ahead else 2]
    assert tokens(done) == expected


def test_a_prompt_that_the_tokenizer_refuses_is_refused_alone():
    llm = tiny_llm()

    def tokenizer(text):
        if text == "bad":
            raise RuntimeError("cannot read this")
        return {"input_ids": [len(text)]}

    llm.engine.tokenizer = tokenizer
    with pytest.raises(InvalidRequestError, match="cannot read this"):
        llm.engine.add_request("0", "bad", GREEDY)
    assert not llm.engine.has_unfinished()


# ---- interrupts --------------------------------------------------------------------------


@AHEAD
@pytest.mark.parametrize("call", [1, 5, 9])
def test_an_interrupt_while_tokens_are_given_out_loses_no_other_token(monkeypatch, call, ahead):
    llm = make_llm(ahead)
    params = SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=6)
    expected = want(params=params)
    take, calls, struck = Completion.take, [], []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == call:
            struck.append(self.owner.request_id)
            raise KeyboardInterrupt
        return take(self, *args)

    monkeypatch.setattr(Completion, "take", interrupted)
    queue(llm, params=params)
    done, raised = serve(llm, KeyboardInterrupt)
    assert raised == 1 and "KeyboardInterrupt" in str(done[struck[0]].error)
    del done[struck[0]], expected[struck[0]]
    assert tokens(done) == expected and len(done) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("device lost")], ids=repr)
def test_what_finished_before_generate_was_ended_is_kept(monkeypatch, error):
    llm = tiny_llm(max_num_seqs=2)
    raise_once(monkeypatch, llm.engine.runner, "forward", error, 15)
    with pytest.raises(type(error)) as caught:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    outputs = caught.value.outputs
    assert [o is not None for o in outputs] == [True, True, False, False]
    assert outputs[0].outputs[0].token_ids == want()["0"][0]
    assert "2 finished: their outputs are in error.outputs" in caught.value.__notes__[0]
    assert llm.stats()["num_sequences"] == 0 and not llm.engine.has_unfinished()
    llm.cache.check_integrity()


@AHEAD
def test_a_name_may_be_used_again_after_an_abort_behind_a_step_that_raised(monkeypatch, ahead):
    llm = make_llm(ahead)
    params = SamplingParams(temperature=0.0, max_tokens=8)
    llm.engine.add_request("0", [1, 2, 3], params)
    for _ in range(3):
        llm.engine.step()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        raise_once(patch, llm.cache, "end_step", RuntimeError("no"), 1)
        llm.engine.step()
    llm.engine.abort("0")
    llm.engine.add_request("0", [4, 5, 6], params)
    done, _ = serve(llm)
    [output] = done.values()
    assert output.prompt_token_ids == [4, 5, 6] and len(output.outputs[0].token_ids) == 8
    assert llm.engine.counters.request_latency.distribution().count == 1
