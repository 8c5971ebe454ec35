"""Scripts in the manner of vLLM's examples run with vLLM's names, but for what they import.

Each test is a script: it loads a model from a folder, with vLLM's arguments, and prints nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from enum import StrEnum

import numpy as np
import pytest
from pydantic import BaseModel

from spectral_paged import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    LLMEngine,
    RequestOutput,
    SamplingParams,
)
from spectral_paged.metrics import Counter, Gauge, Histogram, Metric, Vector
from spectral_paged.sampling_params import RequestOutputKind, StructuredOutputsParams
from support.served import letter_tokenizer
from support.tiny_model import tiny_model

PROMPTS = ["Hello, my name is", "The president is", "The capital of France is", "The future is"]
# what the scripts of vLLM do not say: a small cache, and a format without calibration
SMALL = {"kv_format": "exact", "kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model=model, enforce_eager=True, tensor_parallel_size=1, **SMALL)


def texts(outputs):
    assert all(isinstance(output, RequestOutput) and output.finished for output in outputs)
    return [output.outputs[0].text for output in outputs]


def test_basic(llm):
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.8, top_p=0.95))
    assert [output.prompt for output in outputs] == PROMPTS
    assert all(len(output.outputs[0].token_ids) == 16 for output in outputs)


@pytest.mark.parametrize("words", ["", "--max-tokens 5 --temperature 0 --top-k 3 --seed 7"])
def test_generate(model, words):
    parser = argparse.ArgumentParser()
    engine_group = parser.add_argument_group("Engine arguments")
    EngineArgs.add_cli_args(engine_group)
    engine_group.set_defaults(model=model)
    sampling_group = parser.add_argument_group("Sampling parameters")
    sampling_group.add_argument("--max-tokens", type=int)
    sampling_group.add_argument("--temperature", type=float)
    sampling_group.add_argument("--top-p", type=float)
    sampling_group.add_argument("--top-k", type=int)
    args = vars(parser.parse_args([*words.split(), "--max-num-seqs", "4"]))
    given = {name: args.pop(name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    llm = LLM(**args | SMALL)
    sampling_params = llm.get_default_sampling_params()
    for name, value in given.items():
        if value is not None:
            setattr(sampling_params, name, value)
    for output in llm.generate(PROMPTS, sampling_params):
        assert len(output.outputs[0].token_ids) == (given["max_tokens"] or 16)


def test_chat(llm):
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I assist you today?"},
        {"role": "user", "content": "Write an essay about education."},
    ]
    sampling_params = SamplingParams(temperature=0, max_tokens=8)
    (alone,) = texts(llm.chat(conversation, sampling_params, use_tqdm=False))
    many = texts(llm.chat([conversation for _ in range(3)], sampling_params, use_tqdm=True))
    assert many == [alone] * 3
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    other = llm.chat(conversation, sampling_params, use_tqdm=False, chat_template=template)
    assert other[0].prompt_token_ids != llm.chat(conversation, sampling_params)[0].prompt_token_ids


def test_prefix_caching(model):
    prefix = "You are an expert school principal, skilled in managing staff. " * 11
    prompts = [prefix + prompt for prompt in PROMPTS]
    sampling_params = SamplingParams(temperature=0.0, max_tokens=8)
    regular = LLM(model=model, enable_prefix_caching=False, gpu_memory_utilization=0.4, **SMALL)
    caching = LLM(model=model, enable_prefix_caching=True, gpu_memory_utilization=0.4, **SMALL)
    want = texts(regular.generate(prompts, sampling_params))
    caching.generate(prompts[0], sampling_params)
    outputs = caching.generate(prompts, sampling_params)
    assert texts(outputs) == want
    assert all(output.num_cached_tokens >= 640 for output in outputs)


def test_automatic_prefix_caching(llm):
    table = "".join(f"| {i} | John {i} | {20 + i} | 5{i} High Street |" for i in range(30))
    sampling_params = SamplingParams(temperature=0, max_tokens=8)
    cached = [
        llm.generate(f"{table} Question: {question}", sampling_params)[0].num_cached_tokens
        for question in ("how old is John 3?", "where does John 7 live?")
    ]
    assert cached[0] == 0 and cached[1] >= 640
    assert llm.reset_prefix_cache()
    (output,) = llm.generate(f"{table} Question: why?", sampling_params)
    assert output.num_cached_tokens == 0


def test_structured_outputs(llm):
    class CarType(StrEnum):
        sedan = "sedan"
        suv = "SUV"

    class Car(BaseModel):
        new: bool
        car_type: CarType

    grammar = """
        root ::= "SELECT " column " from " table
        column ::= "col_1" | "col_2"
        table ::= "table_1" | "table_2"
    """
    forms = {
        "choice": StructuredOutputsParams(choice=["Positive", "Negative"]),
        "regex": StructuredOutputsParams(regex=r"[a-z]{3}@[a-z]{3}\.com"),
        "json": StructuredOutputsParams(json=Car.model_json_schema(), disable_any_whitespace=True),
        "grammar": StructuredOutputsParams(grammar=grammar),
    }
    said = {}
    for kind, form in forms.items():
        params = SamplingParams(structured_outputs=form, max_tokens=80, seed=1)
        (said[kind],) = texts(llm.generate("Classify: vLLM is wonderful!", params))
    assert said["choice"] in ("Positive", "Negative") and said["regex"].endswith(".com")
    assert Car.model_validate_json(said["json"])
    assert said["grammar"].startswith("SELECT col_")


def test_chat_with_tools(llm):
    def get_current_weather(city: str, unit: str) -> str:
        return f"The weather in {city} is 85 degrees {unit}."

    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Dallas"]}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    }
    tools = [
        {"type": "function", "function": {"name": "get_current_weather", "parameters": parameters}}
    ]
    template = (
        "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Can you tell me the temperature in Dallas?"}]
    # a random model calls nothing unasked
    held = StructuredOutputsParams(json=parameters, disable_any_whitespace=True)
    sampling_params = SamplingParams(max_tokens=80, temperature=0.0, structured_outputs=held)
    how = {"sampling_params": sampling_params, "tools": tools, "chat_template": template}
    (outputs,) = llm.chat(messages, use_tqdm=False, **how)
    output = outputs.outputs[0].text.strip()
    messages.append({"role": "assistant", "content": output})
    answer = get_current_weather(**json.loads(output))
    messages.append({"role": "tool", "content": answer, "tool_call_id": "abcdefghi"})
    outputs = llm.chat(
        messages, SamplingParams(temperature=0.0), tools=tools, chat_template=template
    )
    assert len(outputs[0].outputs[0].token_ids) == 16


def test_llm_engine(model):
    parser = EngineArgs.add_cli_args(argparse.ArgumentParser())
    words = ["--model", model, "--kv-format", "exact", "--kv-cache-memory-bytes", "8MiB"]
    engine_args = EngineArgs.from_cli_args(parser.parse_args(words))
    engine = LLMEngine.from_engine_args(engine_args)
    test_prompts = [
        ("A robot may not", SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1)),
        ("To be or not to be,", SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.2)),
        ("What is it?", SamplingParams(n=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1)),
    ]
    finished, request_id = [], 0
    while test_prompts or engine.has_unfinished_requests():
        if test_prompts:
            engine.add_request(str(request_id), *test_prompts.pop(0))
            request_id += 1
        finished += [output for output in engine.step() if output.finished]
    assert sorted(output.request_id for output in finished) == ["0", "1", "2"]
    by_id = {output.request_id: output for output in finished}
    assert len(by_id["0"].prompt_logprobs) == len("A robot may not")
    assert len(by_id["2"].outputs) == 2


def test_reproducibility(model):
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95)
    runs = [
        texts(LLM(model=model, seed=seed, **SMALL).generate(PROMPTS, sampling_params))
        for seed in (42, 42, 43)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_metrics(model):
    llm = LLM(model=model, disable_log_stats=False, **SMALL)
    llm.generate(PROMPTS, SamplingParams(temperature=0.8, top_p=0.95))
    seen = {}
    for metric in llm.get_metrics():
        assert isinstance(metric, Metric) and metric.labels["engine"] == "0"
        if isinstance(metric, Gauge | Counter):
            seen.setdefault(metric.name, []).append(metric.value)
        elif isinstance(metric, Vector):
            seen[metric.name] = metric.values
        else:
            assert isinstance(metric, Histogram)
            assert [*metric.buckets.values()] == sorted(metric.buckets.values())
            assert metric.buckets["+Inf"] == metric.count and metric.sum >= 0
            seen[metric.name] = metric.count
    assert seen["spectral_paged:prompt_tokens"] == [sum(map(len, PROMPTS))]
    assert seen["spectral_paged:generation_tokens"] == [64]
    assert seen["spectral_paged:time_to_first_token_seconds"] == 4


def test_async_llm_streaming(model):
    sampling_params = SamplingParams(
        max_tokens=10, temperature=0.8, top_p=0.95, seed=42, output_kind=RequestOutputKind.DELTA
    )

    async def stream_response(engine, prompt, request_id):
        said = ""
        async for output in engine.generate(
            request_id=request_id, prompt=prompt, sampling_params=sampling_params
        ):
            for completion in output.outputs:
                said += completion.text
            if output.finished:
                break
        return said

    async def main():
        engine_args = AsyncEngineArgs(model=model, enforce_eager=True, **SMALL)
        engine = AsyncLLM.from_engine_args(engine_args)
        try:
            return [
                await stream_response(engine, prompt, f"stream-example-{i}")
                for i, prompt in enumerate(PROMPTS)
            ]
        finally:
            engine.shutdown()

    assert all(len(said) == 10 for said in asyncio.run(main()))


def test_batch_inference_of_ray_data(model):
    """Ray Data makes such an object in each actor, and calls it with columns of a block; whole
    clusters run in the tests of `spectral_paged.integrations.ray`."""

    class LLMPredictor:
        def __init__(self):
            self.llm = LLM(model=model, tensor_parallel_size=1, **SMALL)

        def __call__(self, batch):
            outputs = self.llm.generate(batch["text"], SamplingParams(temperature=0.3))
            return {
                "prompt": [output.prompt for output in outputs],
                "generated_text": [" ".join(o.text for o in output.outputs) for output in outputs],
            }

    found = LLMPredictor()({"text": np.array(PROMPTS)})
    assert found["prompt"] == PROMPTS and all(map(len, found["generated_text"]))
