"""The server gives OpenAI's clients the text that the LLM itself generates."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request

import openai
import pytest

from spectral_paged import LLM, SamplingParams
from spectral_paged.engine.token_bytes import TokenBytes
from spectral_paged.metrics.prometheus import parse
from spectral_paged.server.event_stream import _event
from support.served import LETTERS, served_llm, serving
from support.small_tokenizers import byte_fallback
from support.tiny_model import tiny_format, tiny_model

LONG = "".join(LETTERS[(i * 37) % 90] for i in range(700))
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}


def own(llm, prompt, **values):
    values = {"temperature": 0.0, "max_tokens": 12} | values
    return llm.generate([prompt], SamplingParams(**values), use_tqdm=False)[0]


IDS = [[3, 4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    "prompt, each",
    [
        ("The sea", ["The sea"]),
        (LONG, [LONG]),
        (["The sea", "is wide"], ["The sea", "is wide"]),
        (IDS[0], IDS[:1]),
        (IDS, IDS),
    ],
    ids=["text", "long", "texts", "ids", "lists of ids"],
)
def test_completions_say_what_the_llm_says(client, reference, prompt, each):
    answer = client.completions.create(prompt=prompt, **GREEDY)
    want = [own(reference, one) for one in each]
    assert [c.text for c in answer.choices] == [o.outputs[0].text for o in want]
    assert [c.index for c in answer.choices] == list(range(len(each)))
    assert {c.finish_reason for c in answer.choices} == {"length"}
    counted = sum(len(o.prompt_token_ids) for o in want)
    assert answer.usage.prompt_tokens == counted
    assert answer.usage.completion_tokens == 12 * len(each)
    assert answer.usage.total_tokens == counted + 12 * len(each)
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert answer.id.startswith("cmpl-") and answer._request_id in answer.id


def test_tokens_that_the_prefix_cache_had_are_told(client):
    prompt = LONG[::-1]
    first = client.completions.create(prompt=prompt, **GREEDY)
    again = client.completions.create(prompt=prompt, **GREEDY)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == 640
    assert again.choices[0].text == first.choices[0].text
    salted = client.completions.create(prompt=prompt, extra_body={"cache_salt": "me"}, **GREEDY)
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_a_conversation_without_a_limit_fits_a_small_pool():
    llm = served_llm(kv_cache_bytes=300_000)
    with serving(llm) as running, running.client() as client:
        messages = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="tiny", messages=messages)
        assert answer.usage.total_tokens == llm.cache.max_sequence_tokens < 500


@pytest.mark.parametrize(
    "messages, prompt",
    [
        ([{"role": "user", "content": "Hello"}], "<user>Hello<assistant>"),
        (
            [
                {"role": "developer", "content": "Be brief"},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"role": "assistant", "content": "c", "refusal": None},
                {"role": "user", "content": "d"},
            ],
            "<system>Be brief<user>ab<assistant>c<user>d<assistant>",
        ),
    ],
    ids=["one", "several"],
)
def test_a_conversation_goes_through_the_template(client, reference, messages, prompt):
    """The tokenizer here has no line end, so parts that are joined by one stand together."""
    answer = client.chat.completions.create(
        model="alias", messages=messages, temperature=0, max_completion_tokens=9
    )
    want = own(reference, prompt, max_tokens=9)
    assert answer.choices[0].message.content == want.outputs[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 9
    assert (answer.object, answer.model) == ("chat.completion", "alias")


def test_a_conversation_without_a_limit_takes_the_room_there_is():
    with serving(served_llm(max_model_len=80)) as running, running.client() as client:
        messages = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="tiny", messages=messages)
        assert answer.usage.total_tokens == 80
        assert answer.choices[0].finish_reason == "length"
        answer = client.completions.create(model="tiny", prompt="Hello")
        assert answer.usage.completion_tokens == 16, "OpenAI's default"


VALUES = [
    {"n": 3, "temperature": 1.0, "seed": 5},
    {"stop": [LETTERS[40], "zz"], "max_tokens": 60, "seed": 1, "temperature": 1.5},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.7, "seed": 2},
]
EXTRAS = [
    {"top_k": 3, "seed": 3, "temperature": 1.0},
    {"min_p": 0.2, "seed": 4, "temperature": 1.0},
    {"repetition_penalty": 1.4},
    {
        "stop_token_ids": [40, 41, 42, 43, 44, 45, 46],
        "max_tokens": 60,
        "min_tokens": 5,
        "temperature": 1.0,
        "seed": 9,
    },
    {"ignore_eos": True, "skip_special_tokens": False},
]


@pytest.mark.parametrize("values", VALUES + EXTRAS, ids=lambda v: "+".join(v))
def test_sampling_values_mean_what_they_mean_in_a_program(client, reference, values):
    want = own(reference, "The sea", **values)
    body = dict(values)
    extra = {
        k: body.pop(k)
        for k in list(body)
        if any(k in e for e in EXTRAS) and k not in GREEDY and k != "seed"
    }
    answer = client.completions.create(prompt="The sea", extra_body=extra, **(GREEDY | body))
    assert [c.text for c in answer.choices] == [c.text for c in want.outputs]
    assert [c.finish_reason for c in answer.choices] == [c.finish_reason for c in want.outputs]


def test_an_echo_stands_before_each_completion(client, reference):
    answer = client.completions.create(prompt=["ab", "cd"], echo=True, n=2, **GREEDY)
    texts = [own(reference, p, n=2).outputs[0].text for p in ("ab", "cd")]
    assert [c.text for c in answer.choices] == [
        p + t for p, t in zip(("ab", "cd"), texts) for _ in range(2)
    ]
    ids = client.completions.create(prompt=[3, 4], echo=True, **GREEDY)
    assert ids.choices[0].text.startswith(LETTERS[3] + LETTERS[4])
    with client.completions.create(prompt="ab", echo=True, stream=True, **GREEDY) as stream:
        assert "".join(c.choices[0].text for c in stream) == answer.choices[0].text


def test_an_echo_and_its_completion_join_within_a_character():
    """Prompts and completions that begin and end in the middle of one, whole and streamed."""
    tokenizer = byte_fallback(num_bytes=150)
    prompt = tokenizer.convert_tokens_to_ids(["<s>", "▁the", "<0xE6>", "<0x97>"])
    llm = LLM.from_model(tiny_model(), tokenizer, kv_format=tiny_format(), kv_cache_bytes=16 << 20)
    values = {"prompt": prompt, "max_tokens": 40, "temperature": 2.0, "echo": True, "seed": 5}
    params = SamplingParams(max_tokens=40, temperature=2.0, seed=5)
    [own] = llm.generate([prompt], params, use_tqdm=False)[0].outputs
    with serving(llm) as running, running.client() as client:
        whole = client.completions.create(model="tiny", **values).choices[0].text
        with client.completions.create(model="tiny", stream=True, **values) as stream:
            assert "".join(c.choices[0].text for c in stream) == whole
    said = TokenBytes(tokenizer).join([*prompt, *own.token_ids], skip_special_tokens=True)
    assert whole == said.decode(errors="replace") and whole.startswith("the\ufffd")


def test_logprobs_have_openais_shape(client, reference):
    answer = client.completions.create(prompt="ab", logprobs=2, **GREEDY)
    found, want = answer.choices[0].logprobs, own(reference, "ab", logprobs=2).outputs[0]
    tables = [table[t] for table, t in zip(want.logprobs, want.token_ids)]
    assert found.tokens == [t.decoded_token for t in tables]
    assert found.token_logprobs == pytest.approx([t.logprob for t in tables])
    assert found.text_offset == list(range(12)) and {len(t) for t in found.top_logprobs} == {2}
    with client.completions.create(prompt="ab", logprobs=2, stream=True, **GREEDY) as stream:
        pieces = [c.choices[0].logprobs for c in stream]
    assert sum((p.text_offset for p in pieces), []) == found.text_offset
    assert sum((p.token_logprobs for p in pieces), []) == pytest.approx(found.token_logprobs)


@pytest.mark.parametrize("top, temperature", [(None, 0.0), (0, 0.0), (2, 0.0), (3, 9.0)])
def test_chat_logprobs_list_as_many_top_tokens_as_were_asked_for(client, top, temperature):
    values = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 8,
        "logprobs": True,
        "temperature": temperature,
        "seed": 1,
    }
    values |= {} if top is None else {"top_logprobs": top}
    content = client.chat.completions.create(**values).choices[0].logprobs.content
    assert len(content) == 8
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        ordered = [t.logprob for t in entry.top_logprobs]
        assert len(ordered) == (top or 0) and ordered == sorted(ordered, reverse=True)
        assert all(entry.logprob <= best + 1e-6 for best in ordered[:1])
    assert top != 3 or any(e.logprob < e.top_logprobs[-1].logprob for e in content)
    with client.chat.completions.create(stream=True, **values) as stream:
        streamed = [
            e for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content
        ]
    assert [e.token for e in streamed] == [e.token for e in content]


def test_a_stream_adds_up_to_the_whole_answer(client):
    values = {"prompt": ["The sea", LONG], "n": 2, "seed": 3} | GREEDY | {"temperature": 1.0}
    whole = client.completions.create(**values)
    texts, ends = ["", "", "", ""], {}
    options = {"include_usage": True}
    with client.completions.create(stream=True, stream_options=options, **values) as stream:
        chunks = list(stream)
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        assert chunk.usage is None and choice.index not in ends
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == [c.text for c in whole.choices]
    assert ends == dict.fromkeys(range(4), "length")
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 48
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({c.id for c in chunks}) == 1


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_each_chunk_has_the_usage_so_far_if_a_client_asks(client, chat):
    """As vLLM counts: the tokens of the chunk's own choice."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    values = {"n": 2, "seed": 3, "max_tokens": 7, "temperature": 1.0, "model": "tiny"}
    values |= {"stream": True, "stream_options": options}
    talk = [{"role": "user", "content": "x"}]
    if chat:
        create, values = client.chat.completions.create, values | {"messages": talk}
    else:
        create, values = client.completions.create, values | {"prompt": ["The sea", "ab"]}
    with create(**values) as stream:
        *chunks, last = stream
    counted = {}
    for chunk in chunks:
        [choice] = chunk.choices
        usage, before = chunk.usage, counted.get(choice.index)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert before is None or usage.completion_tokens >= before.completion_tokens
        assert before is None or usage.prompt_tokens == before.prompt_tokens
        counted[choice.index] = usage
    assert sorted(counted) == list(range(2 if chat else 4))
    assert chunks[0].usage.completion_tokens == (0 if chat else 1)
    assert [u.completion_tokens for u in counted.values()] == [7] * len(counted)
    assert last.usage.completion_tokens == 7 * len(counted)
    assert last.usage.prompt_tokens == sum(counted[i].prompt_tokens for i in sorted(counted)[::2])


def test_usage_is_left_out_where_only_the_running_one_is_asked_for(client):
    options = {"continuous_usage_stats": True}  # vLLM takes it as a detail of include_usage
    with client.completions.create(
        prompt="x", stream=True, stream_options=options, **GREEDY
    ) as stream:
        assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_an_event_is_one_line_however_its_reader_splits_lines():
    """Clients that split text instead of bytes take more characters for a line end."""
    event = _event({"text": "a\u2028b\u2029c\x85d\x0b\n"}).decode()
    assert len(event.splitlines()) == 2 and event.endswith("\n\n")
    assert json.loads(event.removeprefix("data: "))["text"] == "a\u2028b\u2029c\x85d\x0b\n"


def test_a_chat_stream_begins_with_the_role_and_ends_with_a_reason(client):
    values = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 8,
        "temperature": 0,
        "n": 2,
    }
    whole = client.chat.completions.create(**values)
    with client.chat.completions.create(stream=True, **values) as stream:
        chunks = list(stream)
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and not mine[0].delta.content
        text = "".join(c.delta.content or "" for c in mine)
        assert text == whole.choices[index].message.content
        assert [c.finish_reason for c in mine[-2:]] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_text_that_a_stop_string_takes_back_is_never_streamed(client, reference):
    text = own(reference, "The sea", max_tokens=40).outputs[0].text
    stop = text[10:14]
    values = GREEDY | {"max_tokens": 40}
    with client.completions.create(prompt="The sea", stop=stop, stream=True, **values) as stream:
        chunks = [c.choices[0] for c in stream]
    assert "".join(c.text for c in chunks) == text[: text.find(stop)]
    assert chunks[-1].finish_reason == "stop"


def test_requests_of_an_async_client_share_steps(served):
    async def ask():
        async with served.async_client() as client:
            waiting = [
                client.completions.create(prompt=f"Number {i}", **(GREEDY | {"max_tokens": 64}))
                for i in range(12)
            ]
            return await asyncio.gather(*waiting)

    before = served.service.llm.stats()["steps"]
    answers = asyncio.run(ask())
    steps = served.service.llm.stats()["steps"] - before
    assert all(a.usage.completion_tokens == 64 for a in answers)
    assert steps < 12 * 64 / 3, "they were not batched"


def test_models_and_health(client, served):
    assert [m.id for m in client.models.list()] == ["tiny", "alias"]
    card = client.models.retrieve("alias")
    assert card.object == "model" and card.max_model_len == 4096
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")
    with urllib.request.urlopen(f"{served.url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}


def test_metrics_are_the_llms_and_count_answers(client, served):
    client.completions.create(prompt="ab", **GREEDY)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(prompt="", **GREEDY)
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        text = answer.read().decode()
    [reading] = parse(text)
    assert reading.value("generation_tokens") == served.service.llm.stats()["generated_tokens"]
    assert reading.labels("request_refused").get("EmptyPromptError", 0) >= 1
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="200"}' in text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="400"}' in text


def test_neither_prompts_nor_answers_are_logged(client, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "Qx7 zebra Wv9"
    with served_log() as lines:
        answer = client.completions.create(prompt=secret, **GREEDY)
        messages = [{"role": "user", "content": secret}]
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
        for bad in ({"stop": [secret, ""]}, {"logit_bias": {secret: 1}}, {"seed": secret}):
            with pytest.raises(openai.BadRequestError):
                client.completions.create(prompt=secret, **(GREEDY | bad))
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt=[1, secret], **GREEDY)
    out, err = capfd.readouterr()
    ours = [r for r in lines if not r.name.startswith(("httpx", "httpcore", "openai"))]
    assert [r for r in ours if getattr(r, "event", "") == "http"], "answers leave a line"
    said = out + err + "".join(f"{r.getMessage()} {vars(r)}" for r in ours)
    assert "zebra" not in said and answer.choices[0].text not in said


class served_log(logging.Handler):
    """Every record of the process, those of other threads too."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        self.records.append(record)

    def __enter__(self):
        logging.getLogger().addHandler(self)
        return self.records

    def __exit__(self, *_):
        logging.getLogger().removeHandler(self)
