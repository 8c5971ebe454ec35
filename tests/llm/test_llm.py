"""LLM with the embedded model: text in, text out, through chat, streams and stop strings."""

from __future__ import annotations

import pytest

from spectral_paged import LLM, SamplingParams
from spectral_paged.errors import InvalidRequestError
from support.real_text import text

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm():
    return LLM(kv_cache_bytes=400 << 20, prefill_segment=512, device="cpu", debug_poison=True)


def greedy(max_tokens=24, **kw):
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **kw)


def test_text_is_what_the_tokenizer_makes_of_the_tokens(llm):
    prompts = ["The capital of France is", "Once upon a time", text("alice")[:900]]
    for output in llm.generate(prompts, greedy(), use_tqdm=False):
        done = output.outputs[0]
        want = llm.get_tokenizer().decode(done.token_ids, skip_special_tokens=True)
        assert done.text == want and done.text
        assert output.prompt in prompts


def test_a_long_real_prompt_is_sealed_and_answered_from_its_pages(llm):
    before = llm.stats()
    [output] = llm.generate([text("time_machine")[:6500]], greedy(4), use_tqdm=False)
    after = llm.stats()
    tokens = len(output.prompt_token_ids)
    assert tokens > 1300
    assert output.metrics.num_pages_sealed == 30 * ((tokens - 64 - 64) // 512) > 30
    assert after["pages_attended"] > before["pages_attended"]
    assert output.metrics.compression_ratio > 1.5
    assert output.metrics.bytes_per_token < 23040 / 1.5


def test_a_stop_string_ends_the_text_before_it(llm):
    [free] = llm.generate(["One, two, three,"], greedy(), use_tqdm=False)
    whole = free.outputs[0].text
    stop = whole[5:8]
    [output] = llm.generate(["One, two, three,"], greedy(stop=[stop]), use_tqdm=False)
    done = output.outputs[0]
    assert (done.finish_reason, done.stop_reason) == ("stop", stop)
    assert done.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("stop", [None, [" the"]])
def test_streamed_pieces_join_to_the_text_of_generate(llm, stop):
    prompts = ["The sea is", "A short story:", "1, 2, 3,"]
    params = greedy(16, stop=stop)
    want = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
    pieces, tokens, ends = ["", "", ""], [[], [], []], [None] * 3
    for delta in llm.stream(prompts, params):
        pieces[delta.prompt_index] += delta.text
        tokens[delta.prompt_index] += delta.token_ids
        ends[delta.prompt_index] = delta.finish_reason
    assert pieces == [c.text for c in want]
    assert tokens == [c.token_ids for c in want]
    assert ends == [c.finish_reason for c in want]


def test_chat_uses_the_models_template_for_one_or_many(llm):
    one = [{"role": "user", "content": "What is the capital of France?"}]
    [single] = llm.chat(one, greedy(), use_tqdm=False)
    many = llm.chat([one, one[:1]], greedy(), use_tqdm=False)
    assert "Paris" in single.outputs[0].text
    assert [o.outputs[0].token_ids for o in many] == [single.outputs[0].token_ids] * 2
    with pytest.raises(InvalidRequestError, match="messages.0.content must be"):
        llm.chat([{"role": "user"}], greedy(), use_tqdm=False)


def test_stats_hold_every_figure_that_is_promised(llm):
    stats = llm.stats()
    assert stats["backend"] == "torch" and stats["format"] == "spectral-quality"
    for key in (
        "capacity_tokens",
        "bytes_per_token",
        "compression_ratio",
        "pages_sealed",
        "pages_attended",
        "pages_in_use",
        "pages_cached",
        "prefix_hit_tokens",
        "preemptions",
    ):
        assert isinstance(stats[key], int | float), key
