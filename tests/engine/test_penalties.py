"""Requests with penalties: tokens as the definition says, nothing uploaded, no step held up."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.engine import sampled_step
from spectral_paged.sampling import SampledTokens, SampleRow
from support.fault_runs import serve, tokens
from support.tiny_model import VOCAB, raise_once, random_prompts, tiny_format, tiny_llm

REPEATED = SamplingParams(
    temperature=0.0, max_tokens=30, repetition_penalty=1.4, frequency_penalty=0.2, ignore_eos=True
)


class Recorded(SampledTokens):
    """Draws with what they drew from: `(seed, number of tokens before) -> logits, params`."""

    seen: dict[tuple[int, int], torch.Tensor]

    def __init__(self, logits, rows, state):
        super().__init__(logits, rows, state)
        for line, row in zip(logits, rows, strict=True):
            self.seen[row.seed, row.num_output_tokens] = line.clone()


def penalised(logits, prompt, output, params):
    """The definition in fp32, over counts of whole histories."""
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(logits))
    had = counts > 0
    had[prompt] = True
    factor = torch.tensor(params.repetition_penalty)
    scaled = torch.where(had, torch.where(logits > 0, logits / factor, logits * factor), logits)
    once = torch.tensor(params.presence_penalty) * (counts > 0)
    return scaled - once - torch.tensor(params.frequency_penalty) * counts


def check_tokens(group, seen):
    """Every token of a finished request is what its penalised logits give."""
    params = group.params
    plain = SamplingParams(temperature=params.temperature)
    for completion in group.completions:
        output = completion.generated
        for place, token in enumerate(output):
            logits = seen[completion.seed, place].float()
            want = penalised(logits, group.prompt_token_ids, output[:place], params)
            row = SampleRow(plain, completion.seed, place)
            assert SampledTokens(want[None], [row]).get()[0].token_id == token, (place, output)


def run(monkeypatch, prompts, params, *, ahead, **options):
    """Serve the prompts, check every token against the definition, and return the LLM's stats."""
    llm = tiny_llm(**options)
    llm.engine.async_scheduling = ahead
    seen = {}
    with monkeypatch.context() as patch:
        patch.setattr(sampled_step, "SampledTokens", Recorded)
        patch.setattr(Recorded, "seen", seen, raising=False)
        for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
            llm.engine.add_request(str(i), prompt, one)
        groups = dict(llm.engine.requests.by_id)
        done, _ = serve(llm, limit=3000)
    assert len(done) == len(prompts)
    for name, output in done.items():
        assert output.error is None
        check_tokens(groups[name], seen)
    assert llm.stats()["penalty_rows"] == 0
    return llm.stats()


PENALTIES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.7, 1.5]),
        "presence_penalty": st.sampled_from([0.0, 1.0, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
        "temperature": st.sampled_from([0.0, 0.0, 1.0]),
        "n": st.sampled_from([1, 1, 3]),
        "max_tokens": st.sampled_from([1, 7, 25]),
        "min_tokens": st.sampled_from([0, 1]),
    }
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(st.sampled_from([1, 64, 200, 577, 640]), PENALTIES), min_size=1, max_size=6
    ),
    ahead=st.booleans(),
    seats=st.sampled_from([2, 32]),
)
def test_tokens_are_those_of_the_definition(requests, ahead, seats):
    prompts = random_prompts([length for length, _ in requests], seed=3)
    params = [
        SamplingParams(seed=i, ignore_eos=True, **kinds) for i, (_, kinds) in enumerate(requests)
    ]
    with pytest.MonkeyPatch.context() as patch:
        run(patch, prompts, params, ahead=ahead, max_num_seqs=seats)


@pytest.mark.parametrize("ahead", [False, True])
def test_requests_that_gave_way_go_on_with_their_counts(monkeypatch, ahead):
    prompts = random_prompts([300, 600, 650, 700, 400, 620, 900, 560, 610], seed=5)
    params = [
        SamplingParams(
            n=1 + i % 2,
            seed=i,
            temperature=float(i % 3 == 0),
            max_tokens=60,
            repetition_penalty=1.0 + 0.3 * (i % 2),
            frequency_penalty=0.3,
            ignore_eos=True,
        )
        for i in range(len(prompts))
    ]
    options = {"format": tiny_format(), "kv_cache_bytes": 700_000}
    stats = run(monkeypatch, prompts, params, ahead=ahead, **options)
    assert stats["preemptions"] > 0
    held = stats["penalty_bytes"] // (4 * VOCAB)
    assert held <= 16, "rows are of running requests, not of all 14"


@pytest.mark.parametrize("kind", [{"presence_penalty": 1.0}, {"repetition_penalty": 1.3}], ids=str)
def test_steps_stay_queued_ahead_beside_requests_with_penalties(kind):
    """Those that run, and those that wait for a seat."""
    llm = tiny_llm(max_num_seqs=2)
    llm.engine.async_scheduling = True
    params = SamplingParams(temperature=0.0, max_tokens=12, **kind)
    prompts = random_prompts([30, 60, 600, 5], seed=2)
    got = llm.generate(prompts, [SamplingParams(temperature=0.0, max_tokens=20), *[params] * 3])
    assert llm.stats()["lockstep_steps"] == 0
    want = tiny_llm().generate(
        prompts, [SamplingParams(temperature=0.0, max_tokens=20)] + [params] * 3
    )
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]


def uploaded(monkeypatch, package="spectral_paged"):
    """A list of the bytes of each upload that the package makes from now on."""
    found = []
    for module in [m for name, m in sys.modules.items() if name.startswith(package)]:
        before = vars(module).get("upload")
        if before is not None:

            def metered(values, dtype, device, _before=before):
                tensor = _before(values, dtype, device)
                found.append(tensor.nbytes)
                return tensor

            monkeypatch.setattr(module, "upload", metered)
    return found


@pytest.mark.parametrize("ahead", [False, True])
def test_a_steady_step_uploads_no_history(monkeypatch, ahead):
    """Neither the prompt nor the tokens so far: a few numbers a row, however long the request."""
    sizes = []
    for length in (64, 2500):
        llm = tiny_llm()
        llm.engine.async_scheduling = ahead
        for i, prompt in enumerate(random_prompts([length] * 3, seed=1)):
            llm.engine.add_request(str(i), prompt, REPEATED)
        while llm.stats()["generated_tokens"] < 3 * 8:
            llm.engine.step()
        with monkeypatch.context() as patch:
            found = uploaded(patch)
            for _ in range(6):
                llm.engine.step()
        assert found, "the meter sees uploads"
        sizes.append(sum(found) / 6)
        serve(llm)
    assert sizes[0] == pytest.approx(sizes[1], abs=64) and sizes[1] < 3 * 400


def test_a_prompt_is_uploaded_once_for_all_of_its_completions(monkeypatch):
    llm, prompt = tiny_llm(), random_prompts([1000], seed=1)[0]
    found = uploaded(monkeypatch, "spectral_paged.sampling")
    llm.generate([prompt], SamplingParams(n=4, max_tokens=6, repetition_penalty=1.2, seed=1))
    assert [size for size in found if size >= 8 * len(prompt)] == [8 * len(prompt)]
    found.clear()
    llm.generate([prompt], SamplingParams(n=4, max_tokens=6, presence_penalty=1.2, seed=1))
    assert max(found) < 8 * len(prompt), "only repetition_penalty looks at the prompt"


def queued(ahead):
    """An LLM that two requests with penalties wait for."""
    params = SamplingParams(
        n=2, temperature=1.0, seed=3, max_tokens=8, repetition_penalty=1.3, frequency_penalty=2.0
    )
    llm = tiny_llm()
    llm.engine.async_scheduling = ahead
    for i, prompt in enumerate(random_prompts([700, 30], seed=4)):
        llm.engine.add_request(str(i), prompt, params)
    return llm


@functools.cache
def undisturbed(ahead):
    return tokens(serve(queued(ahead))[0])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("where", ["get", "draw", "count", "seal", "end_step", "forward"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no")], ids=repr)
def test_tokens_of_a_step_that_is_taken_again_count_once(monkeypatch, error, where, call, ahead):
    want, llm = undisturbed(ahead), queued(ahead)
    owner, name = {
        "get": (SampledTokens, "get"),
        "draw": (sampled_step, "SampledTokens"),
        "count": (llm.engine.sampling_state.penalties, "count"),
        "seal": (llm.cache.sealer, "seal"),
        "end_step": (llm.cache, "end_step"),
        "forward": (llm.engine.runner, "forward"),
    }[where]
    raise_once(monkeypatch, owner, name, error, call)
    done, _ = serve(llm, type(error))
    assert tokens(done) == want and all(o.error is None for o in done.values())
    assert llm.stats()["penalty_rows"] == 0


def test_requests_that_gave_way_hold_no_row():
    llm = tiny_llm(kv_cache_bytes=700_000)
    lengths = [300, 600, 650, 700, 400, 620, 900, 560, 610]
    for i, prompt in enumerate(random_prompts(lengths, seed=5)):
        llm.engine.add_request(str(i), prompt, replace(REPEATED, max_tokens=90))
    while llm.engine.has_unfinished():
        llm.engine.step()
        stats = llm.stats()
        assert stats["penalty_rows"] <= stats["running"]
    assert stats["preemptions"] > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_requests_that_gave_way_together_and_go_on_together_have_rows(monkeypatch, ahead):
    """What was drawn before names rows that they gave back."""
    prompts = random_prompts([30, 90], seed=6)
    params = replace(REPEATED, frequency_penalty=2.0)
    want = [o.outputs[0].token_ids for o in tiny_llm().generate(prompts, params)]
    llm = tiny_llm()
    llm.engine.async_scheduling = ahead
    for i, prompt in enumerate(prompts):
        llm.engine.add_request(str(i), prompt, params)
    for _ in range(5):
        llm.engine.step()
    progress = llm.cache.progress
    with monkeypatch.context() as patch:  # every next token needs a slot, and finds none
        patch.setattr(llm.cache, "progress", lambda s: (progress(s)[0], [False] * len(s)))
        patch.setattr(llm.cache, "try_reserve", lambda *_: False)
        llm.engine.step()
    stats = llm.stats()
    assert stats["preemptions"] == 2 and stats["penalty_rows"] == stats["running"] == 0
    done = {}
    while llm.engine.has_unfinished():
        done |= {o.request_id: o for o in llm.engine.step() if o.finished}
        stats = llm.stats()
        assert stats["penalty_rows"] == stats["running"]
    assert [done[str(i)].outputs[0].token_ids for i in range(2)] == want


def test_a_row_is_held_while_its_request_runs():
    llm = tiny_llm(max_num_seqs=2)
    prompt = random_prompts([40], seed=1)[0]
    llm.engine.add_request("five", prompt, SamplingParams(n=5, max_tokens=9, presence_penalty=1.0))
    llm.engine.step()
    assert llm.stats()["penalty_rows"] == 2, "three siblings wait for a seat"
    llm.engine.abort("five")
    assert llm.stats()["penalty_rows"] == 0
