"""Log-probabilities of prompts over HTTP, in the forms that evaluation harnesses send and read."""

from __future__ import annotations

import pytest

from spectral_paged import LLM, SamplingParams
from support.served import LETTERS, served_llm, serving
from support.small_tokenizers import byte_fallback
from support.tiny_model import tiny_format, tiny_model

GREEDY = {"model": "tiny", "temperature": 0}
LONG = "".join(LETTERS[(i * 37) % 90] for i in range(700))


def own(llm, prompt, **values):
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 1} | values))
    return llm.generate([prompt], params, use_tqdm=False)[0]


# ---- lm-eval's `local-completions` ------------------------------------------------------------


def likelihood(choice, num_context):
    """The log-likelihood of a continuation and whether it is greedy, as lm-eval reads them."""
    assert num_context > 0
    logprobs = choice.logprobs.token_logprobs[num_context:-1]
    tops = choice.logprobs.top_logprobs[num_context:-1]
    greedy = all(own == max(top.values()) for own, top in zip(logprobs, tops))
    return sum(logprobs), greedy


def scored(client, prompts):
    """The body that lm-eval sends for `loglikelihood` and `loglikelihood_rolling`."""
    answer = client.completions.create(
        prompt=prompts, max_tokens=1, logprobs=1, seed=1234, echo=True, **GREEDY
    )
    return sorted(answer.choices, key=lambda choice: choice.index)


def test_multiple_choice_finds_the_continuation_that_the_model_prefers(client, reference):
    context = LETTERS.index("T"), *(LETTERS.index(c) for c in "he sea is")
    best = own(reference, list(context), max_tokens=5).outputs[0].token_ids
    wrong = [best[0], (best[1] + 7) % 90, *best[2:]]
    choices = scored(client, [[*context, *best], [*context, *wrong]])
    found = [likelihood(choice, len(context)) for choice in choices]
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]
    for choice, ids in zip(choices, ([*context, *best], [*context, *wrong])):
        tables = own(reference, ids, prompt_logprobs=1).prompt_logprobs
        want = [None, *(table[t].logprob for t, table in zip(ids[1:], tables[1:]))]
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(want[1:])
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.text_offset == list(range(len(choice.text)))


def test_a_rolling_likelihood_is_that_of_its_windows(client, reference):
    """As for perplexity: windows of a long text behind a token of context each."""
    ids = [LETTERS.index(c) for c in LONG]
    windows = [ids[:300], ids[299:600], ids[599:700]]
    total = sum(likelihood(choice, 1)[0] for choice in scored(client, windows))
    tables = [own(reference, window, prompt_logprobs=0).prompt_logprobs for window in windows]
    want = sum(
        table[token].logprob
        for window, found in zip(windows, tables)
        for token, table in zip(window[1:], found[1:])
    )
    assert total == pytest.approx(want, abs=1e-3)


# ---- forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [LONG, [3, 4, 5], [LONG[:9], "x"]], ids=["text", "ids", "two"])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_an_echo_has_the_log_probabilities_of_all_of_its_text(client, prompt, max_tokens):
    values = GREEDY | {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    whole = client.completions.create(n=2, **values)
    for choice in whole.choices:
        found = choice.logprobs
        assert len(found.tokens) == len(choice.text) == len(found.text_offset)
        assert found.tokens == list(choice.text)
        assert found.token_logprobs[0] is None and None not in found.token_logprobs[1:]
        assert {len(top) for top in found.top_logprobs[1:]} <= {2, 3}
    assert whole.usage.completion_tokens == max_tokens * len(whole.choices)
    with client.completions.create(n=2, stream=True, **values) as stream:
        pieces = {}
        for chunk in stream:
            [choice] = chunk.choices
            pieces.setdefault(choice.index, []).append(choice)
    assert len(pieces) == len(whole.choices)
    for choice in whole.choices:
        mine = pieces[choice.index]
        assert "".join(c.text for c in mine) == choice.text
        logprobs = [c.logprobs for c in mine if c.logprobs]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert sum((getattr(part, name) for part in logprobs), []) == getattr(
                choice.logprobs, name
            )
        assert mine[-1].finish_reason == choice.finish_reason == "length"


def test_a_prompt_alone_is_computed_where_no_token_is_asked_for(client):
    answer = client.completions.create(prompt="abc", max_tokens=0, **GREEDY)
    assert answer.choices[0].text == "" and answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 0)


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_vllms_field_is_a_table_of_each_token_by_its_id(client, reference, chat):
    extra = {"prompt_logprobs": 1}
    if chat:
        talk = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(
            messages=talk, max_tokens=1, extra_body=extra, **GREEDY
        )
        found, prompt = answer.prompt_logprobs, "<user>Hello<assistant>"
    else:
        prompt = "Hello"
        answer = client.completions.create(prompt=prompt, max_tokens=1, extra_body=extra, **GREEDY)
        found = answer.choices[0].prompt_logprobs
    want = own(reference, prompt, prompt_logprobs=1).prompt_logprobs
    assert found[0] is None and len(found) == len(prompt)
    for table, own_table in zip(found[1:], want[1:]):
        assert table.keys() == {str(token) for token in own_table}
        for token, entry in own_table.items():
            told = table[str(token)]
            assert told["logprob"] == pytest.approx(entry.logprob)
            assert (told["rank"], told["decoded_token"]) == (entry.rank, entry.decoded_token)


def test_given_tokens_have_log_probabilities_in_place_of_the_best(client):
    ids = [1, 5, 80]
    extra = {"logprob_token_ids": ids}
    answer = client.completions.create(
        prompt="ab", max_tokens=2, logprobs=1, extra_body=extra, **GREEDY
    )
    for own_token, top in zip(
        answer.choices[0].logprobs.tokens, answer.choices[0].logprobs.top_logprobs
    ):
        assert top.keys() == {own_token, *(LETTERS[i] for i in ids)}
    talk = [{"role": "user", "content": "x"}]
    answer = client.chat.completions.create(
        messages=talk, max_tokens=2, logprobs=True, extra_body=extra, **GREEDY
    )
    for entry in answer.choices[0].logprobs.content:
        found = [top.logprob for top in entry.top_logprobs]
        assert {top.token for top in entry.top_logprobs} == {
            entry.token,
            *(LETTERS[i] for i in ids),
        }
        assert found == sorted(found, reverse=True)


def test_places_of_a_torn_character_are_those_of_the_text():
    """Bytes of one character over several tokens, at the end of the prompt and before it."""
    tokenizer = byte_fallback(num_bytes=150)
    names = ["<s>", "▁the", "<0xE6>", "<0x97>", "<0xA5>", "▁the", "<0xE6>", "<0x97>"]
    prompt = tokenizer.convert_tokens_to_ids(names)
    llm = LLM.from_model(tiny_model(), tokenizer, kv_format=tiny_format(), kv_cache_bytes=16 << 20)
    with serving(llm) as running, running.client() as client:
        answer = client.completions.create(
            model="tiny",
            prompt=prompt,
            echo=True,
            logprobs=0,
            max_tokens=4,
            temperature=2.0,
            seed=1,
        )
    choice = answer.choices[0]
    assert choice.text.startswith("the日 the")
    assert choice.logprobs.text_offset[:8] == [0, 0, 3, 3, 3, 4, 8, 8]
    assert choice.logprobs.tokens[0] == "<s>"
    assert max(choice.logprobs.text_offset) <= len(choice.text)


def test_log_probabilities_of_prompts_count_in_the_size_of_an_answer():
    with serving(served_llm(), max_response_entries=1000) as running, running.client() as client:
        values = GREEDY | {"echo": True, "max_tokens": 0}
        client.completions.create(prompt="a" * 300, logprobs=1, **values)
        for more in ({"prompt": "a" * 340}, {"prompt": "a" * 300, "n": 2}):
            with pytest.raises(Exception, match="entries of prompts") as caught:
                client.completions.create(logprobs=1, **(values | more))
            assert caught.value.status_code == 400 and caught.value.code == "response_too_large"
        talk = [{"role": "user", "content": "a" * 200}]
        answer = client.chat.completions.create(
            model="tiny", messages=talk, extra_body={"prompt_logprobs": 1}
        )
        assert answer.usage.completion_tokens <= 1000 - 3 * answer.usage.prompt_tokens
