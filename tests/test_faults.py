"""Faults: whatever fails, the rest finishes or goes on, the pool is whole, and the error names
the request that it is about."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cache_feed import Feed, drive, fmt, make
from page_parts import toy_basis
from safetensors.torch import load_file, save_file
from tiny_model import raise_once, random_prompts, tiny_format, tiny_llm, tiny_model
from tokenizers import Tokenizer, decoders, models

from spectral_paged import LLM, SamplingParams, sampled_step
from spectral_paged.batch_file import OutputFile
from spectral_paged.calibration import model_fingerprint
from spectral_paged.errors import (
    CorruptFileError,
    FormatError,
    InvalidRequestError,
    NonFiniteError,
)
from spectral_paged.request_group import Completion

GREEDY = SamplingParams(temperature=0.0, max_tokens=10)
PROMPTS = random_prompts([700, 30, 1217, 575], seed=4)
AHEAD = pytest.mark.parametrize("ahead", [False, True])
FORMAT = pytest.mark.parametrize("format", ["spectral-int8", "exact"])


def queue(llm, prompts=PROMPTS, params=GREEDY):
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)


def serve(llm, tolerate=(), limit=600):
    """Finished outputs by request; steps that raise `tolerate` are taken again."""
    done, raised = {}, 0
    for _ in range(limit):
        if not llm.engine.has_unfinished():
            break
        try:
            done |= {o.request_id: o for o in llm.engine.step() if o.finished}
        except tolerate:
            raised += 1
        llm.cache.check_integrity()
    assert not llm.engine.has_unfinished(), "some request never ends"
    assert llm.stats()["num_sequences"] == 0
    return done, raised


def tokens(done):
    return {i: [c.token_ids for c in o.outputs] for i, o in sorted(done.items())}


def want(format="spectral-int8", params=GREEDY, prompts=PROMPTS):
    llm = tiny_llm(tiny_format(format))
    queue(llm, prompts, params)
    return tokens(serve(llm)[0])


def make_llm(ahead, format="spectral-int8", **options):
    llm = tiny_llm(tiny_format(format), **options)
    llm.engine.async_scheduling = ahead
    return llm


# ---- allocation failures -----------------------------------------------------------------

OUT_OF_MEMORY = [MemoryError("host"), torch.cuda.OutOfMemoryError("CUDA out of memory")]


@AHEAD
@FORMAT
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["forward", "draw", "seal", "begin_step", "end_step", "append"])
def test_a_step_that_runs_out_of_memory_is_taken_again_with_fewer_tokens(
    monkeypatch, where, error, format, ahead
):
    llm = make_llm(ahead, format)
    owner, name = {
        "forward": (llm.engine.runner, "forward"),
        "draw": (sampled_step, "Drawn"),
        "seal": (llm.cache.sealer, "seal"),
        "begin_step": (llm.cache, "begin_step"),
        "end_step": (llm.cache, "end_step"),
        "append": (llm.cache._attention, "run"),
    }[where]
    expected = want(format)
    raise_once(monkeypatch, owner, name, error, 2)
    queue(llm)
    done, _ = serve(llm)
    assert tokens(done) == expected and all(o.error is None for o in done.values())
    assert llm.stats()["steps_out_of_memory"] == 1


@FORMAT
def test_an_allocation_may_fail_at_any_call(monkeypatch, format):
    """The k-th slot, for every k in turn; among them forks, seals and resumes under pressure."""
    params = SamplingParams(n=2, temperature=1.0, seed=5, max_tokens=6)
    prompts = random_prompts([575, 630], seed=8)
    expected = want(format, params, prompts)
    failed = 0
    for call in (*range(1, 42, 4), 11, 12, 13, 24, 26):
        with monkeypatch.context() as patch:
            llm = make_llm(False, format, kv_cache_bytes=900_000)
            raise_once(patch, llm.cache.groups[0].pool.blocks, "allocate", MemoryError("k"), call)
            queue(llm, prompts, params)
            done, _ = serve(llm)
            assert tokens(done) == expected
            failed += llm.stats()["steps_out_of_memory"]
    assert failed > 5


def test_a_seal_that_failed_is_made_up_for_before_its_page_is_wanted(monkeypatch):
    """Queries see the page whenever the rule says so, also after a step that could not seal."""
    counts = []
    for fail in (False, True):
        llm = make_llm(False)
        if fail:
            raise_once(monkeypatch, llm.cache.sealer, "seal", RuntimeError("oom"), 1)
        queue(llm, PROMPTS[:1])
        serve(llm, RuntimeError)
        counts.append(llm.stats()["pages_attended"])
    assert counts[0] == counts[1] > 0


@AHEAD
def test_memory_for_so_many_tokens_and_no_more_is_found_out(monkeypatch, ahead):
    """A device that holds 100 tokens a step: the budget comes down to that, and nobody fails."""
    llm = make_llm(ahead)
    forward = llm.engine.runner.forward

    def small(plan, *args):
        if plan.num_tokens > 100:
            raise torch.cuda.OutOfMemoryError(f"{plan.num_tokens} tokens")
        return forward(plan, *args)

    monkeypatch.setattr(llm.engine.runner, "forward", small)
    expected = want()
    queue(llm)
    done, _ = serve(llm)
    assert tokens(done) == expected
    assert 0 < llm.stats()["steps_out_of_memory"] < 20


@AHEAD
def test_a_request_that_runs_out_of_memory_alone_fails_by_name(monkeypatch, ahead):
    """Nothing helps request 2: it fails in a bounded number of steps, and the rest finish."""
    llm = make_llm(ahead)
    forward = llm.engine.runner.forward

    def greedy_one(plan, *args):
        if any(e.seq_id == "2#0" for e in plan.entries):
            raise MemoryError("no room for this one")
        return forward(plan, *args)

    monkeypatch.setattr(llm.engine.runner, "forward", greedy_one)
    expected = want()
    queue(llm)
    done, _ = serve(llm)
    error = done["2"].error
    assert error.request_id == "2" and "request '2'" in str(error)
    assert "no room for this one" in str(error)
    del done["2"], expected["2"]
    assert tokens(done) == expected


def test_memory_that_is_gone_for_good_ends_every_request_by_name(monkeypatch):
    llm = make_llm(False)
    monkeypatch.setattr(
        llm.engine.runner, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("gone"))
    )
    with pytest.raises(InvalidRequestError, match="4 of 4|request-0") as caught:
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    errors = [o.error for o in caught.value.outputs]
    assert [e.request_id for e in errors] == [f"request-{i}" for i in range(4)]
    assert llm.stats()["steps"] < 60
    llm.cache.check_integrity()


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
    queue(llm, params=params)
    victim = llm.engine._groups["2"].completions[0].text
    if where == "text":
        raise_once(monkeypatch, victim, "append", error, 4)
    else:
        take = Completion.take

        def only_two(self, result, eos, longest, tokenizer):
            if self.owner.request_id == "2" and len(self.output.token_ids) == 3:
                raise error
            return take(self, result, eos, longest, tokenizer)

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
    llm, draw = make_llm(ahead), sampled_step.Drawn

    def picky(logits, rows):
        if any(r.seed == 666 and r.num_output_tokens == 2 for r in rows):
            raise IndexError("logits processor")
        return draw(logits, rows)

    monkeypatch.setattr(sampled_step, "Drawn", picky)
    expected = want(prompts=PROMPTS[:count])
    queue(llm, PROMPTS[:count])
    llm.engine._groups["0"].completions[0].seed = 666
    done, _ = serve(llm)
    failed = done.pop("0")
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


# ---- JSONL -------------------------------------------------------------------------------


def test_an_output_cut_at_any_byte_is_resumed(tmp_path):
    whole = tmp_path / "whole.jsonl"
    file = OutputFile(whole)
    for i, text in enumerate(("one", "zwölf", "\n"), start=1):
        file.write({"line": i, "line_hash": str(i), "text": text})
    file.close()
    data, cut = whole.read_bytes(), tmp_path / "cut.jsonl"
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        file = OutputFile(cut)
        kept = data[:size].count(b"\n")
        assert sorted(file.finished) == list(range(1, kept + 1))
        for i in range(kept + 1, 4):
            file.write(json.loads(data.splitlines()[i - 1]))
        file.close()
        assert cut.read_bytes() == data


WRITER = """
import sys
from pathlib import Path
from spectral_paged.batch_file import OutputFile
file = OutputFile(Path(sys.argv[1]))
print("ready", flush=True)
line = max(file.finished, default=0)
while True:
    line += 1
    file.write({"line": line, "line_hash": "x" * 5000})
"""


def test_a_writer_killed_at_any_moment_leaves_whole_records(tmp_path):
    out = tmp_path / "out.jsonl"
    finished = 0
    for pause in (0.0, 0.02):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while out.stat().st_size < 6000 * (finished + 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        file = OutputFile(out)
        file.close()
        assert sorted(file.finished) == list(range(1, len(file.finished) + 1))
        assert len(file.finished) > finished
        finished = len(file.finished)


# ---- files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of width 32, its calibration, and the folder that both lie in."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(head_dim=32)
    model.save_pretrained(folder)
    basis = toy_basis(2, 2, 32, model=model_fingerprint(model))
    basis.save(folder / "spectral_basis.safetensors")
    return folder


@pytest.mark.parametrize("cut", [0, 7, 200, 0.5, -1, "bit"])
def test_an_llm_refuses_a_damaged_calibration_by_name(saved, tmp_path, cut):
    data = bytearray((saved / "spectral_basis.safetensors").read_bytes())
    if cut == "bit":
        data[-1001] ^= 4
    else:
        del data[int(len(data) * cut) if isinstance(cut, float) else cut :]
    path = tmp_path / "spectral_basis.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"spectral_basis\.safetensors.*calibrate"):
        LLM.from_model(tiny_model(head_dim=32), kv_cache_bytes=8 << 20, calibration=path)


def test_a_model_that_was_altered_refuses_the_calibration_of_the_one_before(saved):
    model = tiny_model(head_dim=32)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    path = saved / "spectral_basis.safetensors"
    with pytest.raises(FormatError, match="was calibrated on a model with fingerprint"):
        LLM.from_model(model, kv_cache_bytes=8 << 20, calibration=path)


@pytest.mark.parametrize("how", [0, 7, 300, 0.5, -1, "header", "missing", "shape"])
def test_a_damaged_model_file_is_refused_by_name(saved, tmp_path, how):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    source, path = saved / "model.safetensors", tmp_path / "model.safetensors"
    data = bytearray(source.read_bytes())
    if how in ("missing", "shape"):
        tensors = load_file(source)
        name = "model.layers.1.self_attn.v_proj.weight"
        if how == "missing":
            del tensors[name]
        else:
            tensors[name] = tensors[name][:8].contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        if how == "header":
            data[20] ^= 0xFF
        else:
            del data[int(len(data) * how) if isinstance(how, float) else how :]
        path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=f"{tmp_path}.*cannot be loaded"):
        LLM(str(tmp_path), device="cpu")


# ---- what a fresh reader found -----------------------------------------------------------


@AHEAD
@pytest.mark.parametrize("error", [RuntimeError("no"), MemoryError("no")], ids=repr)
@pytest.mark.parametrize("length, call", [(1088, 1), (1600, 2)])
def test_forks_of_a_prompt_whose_seal_raised_see_its_pages(
    monkeypatch, length, call, error, ahead
):
    """The prompt ends where a block does, so that its seal is due when the others fork."""
    [prompt] = random_prompts([length], seed=4)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
    found = []
    for fail in (False, True):
        llm = make_llm(ahead)
        with monkeypatch.context() as patch:
            if fail:
                raise_once(patch, llm.cache.sealer, "seal", error, call)
            llm.engine.add_request("0", prompt, params)
            done, _ = serve(llm, RuntimeError)
        found.append(([o.token_ids for o in done["0"].outputs], llm.stats()["pages_attended"]))
        llm.cache.check_integrity()
    assert found[0] == found[1]


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


def test_a_request_that_has_ended_is_not_failed_by_what_its_step_runs_into(monkeypatch):
    """Its last token is there; the memory that its step lacks then is nobody's."""
    [prompt] = random_prompts([30])
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    [said] = make_llm(True).generate([prompt], greedy, use_tqdm=False)
    stop = said.outputs[0].token_ids[4]
    for call in range(1, 10):
        llm = make_llm(True)
        params = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=[stop])
        llm.engine.add_request("0", prompt, params)
        with monkeypatch.context() as patch:
            raise_once(patch, llm.cache, "end_step", MemoryError("no"), call)
            done, _ = serve(llm)
        output, finished = done["0"], llm.stats()["finished"]
        ended = output.outputs[0].finish_reason
        assert (output.error is None) == (ended == "stop")
        assert finished == dict.fromkeys(finished, 0) | {ended: 1}
