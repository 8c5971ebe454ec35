"""End tokens, sampling defaults, lengths and names that several files give are one fact."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import GenerationConfig, LlamaConfig

from spectral_paged import LLM, SamplingParams
from spectral_paged.batch.file import read_lines
from spectral_paged.batch.run import serve_lines
from spectral_paged.cli.commands import main
from spectral_paged.errors import CorruptFileError, InvalidRequestError, SpectralPagedError
from spectral_paged.metrics.prometheus import parse
from spectral_paged.models.generation import end_tokens
from spectral_paged.models.geometry import ModelGeometry
from spectral_paged.openai import CHAT_URL, COMPLETIONS_URL
from spectral_paged.server.app import Service
from spectral_paged.server.parsing import parse_request
from spectral_paged.server.settings import ServerSettings
from support.served import letter_tokenizer
from support.tiny_model import VOCAB, tiny_model

OPTIONS = {"kv_format": "exact", "kv_cache_bytes": 16 << 20, "device": "cpu"}
ASKED = {"do_sample": True, "temperature": 0.25, "top_k": 1, "top_p": 0.5, "max_new_tokens": 7}
TAKEN = {"temperature": 0.25, "top_k": 1, "top_p": 0.5, "max_tokens": 7}
SETTINGS = ServerSettings(("tiny",))
TALK = [{"role": "user", "content": "Hello"}]


def folder_of(path, asked=None, **changes):
    model = tiny_model(**changes)
    model.save_pretrained(path)
    letter_tokenizer().save_pretrained(path)
    if asked is not None:
        text = asked if isinstance(asked, str) else json.dumps(asked)
        (path / "generation_config.json").write_text(text)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("asks"), ASKED)


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(str(folder), **OPTIONS)


# ---- end tokens --------------------------------------------------------------------------


def ends(config_eos, generation_eos, tokenizer_eos, *, special=(), derived=False):
    config = LlamaConfig(eos_token_id=config_eos)
    generation = GenerationConfig(eos_token_id=generation_eos)
    generation._from_model_config = derived
    model = SimpleNamespace(config=config, generation_config=generation)
    tokenizer = SimpleNamespace(eos_token_id=tokenizer_eos, all_special_ids=list(special))
    return end_tokens(model, tokenizer, 100)


one_or_many = st.none() | st.integers(3, 99) | st.lists(st.integers(3, 99), max_size=3)


@settings(max_examples=60, deadline=None)
@given(one_or_many, one_or_many, st.none() | st.integers(3, 99))
def test_ends_are_all_that_config_generation_config_and_tokenizer_name(config, generation, own):
    want = {t for x in (config, generation, own) for t in (x if isinstance(x, list) else [x])}
    found = ends(config, generation, own)
    assert set(found) == want - {None} and len(set(found)) == len(found)


@pytest.mark.parametrize("value", [-1, 100, [100, -1]])
def test_an_end_that_cannot_be_generated_is_none(value):
    assert ends(value, value, None) == () and set(ends(value, 7, 8)) == {7, 8}


def test_the_default_of_a_config_without_an_end_is_one_only_where_it_can_be_meant():
    assert LlamaConfig().eos_token_id == 2
    assert ends(2, 2, None, derived=True) == (2,)
    assert ends(2, 7, None) == (7,) and ends(2, 2, 9, derived=True) == (9,)
    assert set(ends(2, 7, None, special=[2])) == {2, 7}
    assert set(ends(2, 2, 9)) == {2, 9}, "its generation config names it"


@pytest.mark.parametrize("value", ["</s>", [1, "x"], True, 1.5])
def test_an_end_that_is_no_token_id_is_refused(value):
    with pytest.raises(CorruptFileError, match="eos_token_id of the generation config is"):
        ends(3, value, None)


def test_a_text_ends_at_the_tokenizers_end(tmp_path):
    """Which neither config.json nor generation_config.json names."""
    model, tokenizer = tiny_model(), letter_tokenizer()
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    whole = LLM.from_model(tiny_model(), tokenizer, kv_format="exact", kv_cache_bytes=16 << 20)
    [tokens] = [o.outputs[0].token_ids for o in whole.generate(["a b"], greedy, use_tqdm=False)]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[2])
    llm = LLM.from_model(model, tokenizer, kv_format="exact", kv_cache_bytes=16 << 20)
    assert llm.engine.eos_token_ids == (tokens[2],)
    [found] = [o.outputs[0] for o in llm.generate(["a b"], greedy, use_tqdm=False)]
    stop = tokens.index(tokens[2]) + 1
    assert (found.token_ids, found.finish_reason) == (tokens[:stop], "stop")


# ---- sampling defaults -------------------------------------------------------------------


def values(params):
    return {name: getattr(params, name) for name in TAKEN}


def test_defaults_are_the_generation_configs(llm):
    assert values(llm.get_default_sampling_params()) == TAKEN


def test_generation_config_none_leaves_it_alone(folder, tmp_path):
    for llm in (LLM(str(folder), generation_config="none", **OPTIONS),):
        assert llm.get_default_sampling_params() == SamplingParams()
    plain = LLM(str(folder_of(tmp_path / "plain")), **OPTIONS)
    assert plain.get_default_sampling_params() == SamplingParams()


@pytest.mark.parametrize("choice", ["vLLM", "", None, 3])
def test_another_choice_is_refused(folder, choice):
    with pytest.raises(InvalidRequestError, match="it must be 'auto' .* or 'none'"):
        LLM(str(folder), generation_config=choice, **OPTIONS)


def of_generate(llm, *params):
    return [len(o.outputs[0].token_ids) for o in llm.generate("ab", *params, use_tqdm=False)]


def test_calls_without_params_use_the_defaults_and_others_do_not(llm):
    four = llm.generate(["Hello"] * 4, use_tqdm=False)
    assert len({tuple(o.outputs[0].token_ids) for o in four}) == 1
    assert {len(o.outputs[0].token_ids) for o in four} == {7}
    assert [len(o.outputs[0].token_ids) for o in llm.chat(TALK, use_tqdm=False)] == [7]
    assert sum(len(delta.token_ids) for delta in llm.stream("Hello")) == 7
    assert of_generate(llm, SamplingParams()) == [16]
    rows = llm.generate(["a", "b"], [None, SamplingParams(max_tokens=2)], use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in rows] == [7, 2]


@pytest.fixture
def seen(llm, monkeypatch):
    """The sampling parameters of the requests that reach the engine."""
    found, add = [], llm.engine.add_request

    def spy(request_id, prompt, params=None, **options):
        found.append(params)
        return add(request_id, prompt, params, **options)

    monkeypatch.setattr(llm.engine, "add_request", spy)
    return found


LINES = [
    ({"prompt": "ab"}, {}),
    ({"prompt": "ab", "top_k": 3, "max_tokens": 2}, {"top_k": 3, "max_tokens": 2}),
    ({"messages": TALK, "sampling_params": {"temperature": 1.0}}, {"temperature": 1.0}),
    ({"custom_id": "a", "url": COMPLETIONS_URL, "body": {"prompt": "ab"}}, {}),
    ({"custom_id": "b", "url": CHAT_URL, "body": {"messages": TALK, "top_p": 1}}, {"top_p": 1}),
]


@pytest.mark.parametrize("defaults", [{}, {"temperature": 0.5, "max_tokens": 3}])
def test_a_line_has_its_own_values_then_the_runs_then_the_models(llm, tmp_path, seen, defaults):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line, _ in LINES))
    results = list(serve_lines(llm, read_lines(path, defaults)))
    assert not any(result.failed for result in results)
    assert [values(params) for params in seen] == [TAKEN | defaults | own for _, own in LINES]


@pytest.mark.parametrize("chat", [False, True])
def test_a_body_has_its_own_values_then_the_models(llm, chat):
    base = {"messages": TALK} if chat else {"prompt": "ab"}
    for own in ({}, {"top_k": 5}, {"max_tokens": 30}, {"temperature": 1}):
        raw = json.dumps(base | own).encode()
        assert values(parse_request(llm, SETTINGS, raw, chat=chat).params) == TAKEN | own


def test_a_conversation_of_a_model_that_names_no_length_has_all_the_room(tmp_path):
    plain = LLM(str(folder_of(tmp_path, {"top_k": 2})), **OPTIONS)
    raw = json.dumps({"messages": TALK}).encode()
    parsed = parse_request(plain, SETTINGS, raw, chat=True)
    assert parsed.params.top_k == 2 and parsed.params.max_tokens > 1000


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"top_p": 0.0}, "top_p is 0.0; it must be"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be"),
        ({"repetition_penalty": -1}, "repetition_penalty is -1; it must be"),
        ("{", "cannot be read"),
        ("[]", "holds no JSON object"),
        ({"eos_token_id": "</s>"}, "eos_token_id of the generation config"),
    ],
    ids=str,
)
def test_a_generation_config_that_cannot_be_used_is_refused_by_name(tmp_path, asked, says):
    with pytest.raises(SpectralPagedError, match=says):
        LLM(str(folder_of(tmp_path, asked)), **OPTIONS)


def test_the_command_line_switches_it_off(folder, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "ab"}\n')
    lengths = {}
    for choice in ("auto", "none"):
        output = tmp_path / choice
        command = ["generate", "--input", str(source), "--output", str(output), "--quiet"]
        command += ["--model", str(folder), "--kv-format", "exact", "--kv-cache-bytes", "16MiB"]
        assert main([*command, "--device", "cpu", "--generation-config", choice]) == 0
        [record] = map(json.loads, output.read_text().splitlines())
        lengths[choice] = record["usage"]["completion_tokens"]
    assert lengths == {"auto": 7, "none": 16}


# ---- lengths and names -------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope, longest",
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "linear", "factor": 2.5}, 2560),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            1024,
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_the_longest_sequence_is_what_rope_scaling_makes_it(rope, longest):
    rope = {"rope_theta": 10000.0} | rope
    model = tiny_model(max_position_embeddings=1024, rope_parameters=rope)
    assert ModelGeometry.from_config(model.config).max_position_embeddings == longest
    made = LLM.from_model(model, kv_format="exact", kv_cache_bytes=16 << 20)
    assert made.cache.max_model_len == longest
    with pytest.raises(InvalidRequestError, match=f"this model takes 2 to {longest}"):
        LLM.from_model(model, kv_format="exact", max_model_len=longest + 1)


def test_past_its_original_length_a_scaled_model_gives_what_transformers_gives():
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    changes = {"max_position_embeddings": 64, "rope_parameters": rope}
    prompt = [(7 * i) % VOCAB for i in range(150)]
    model = tiny_model(**changes)
    ids = torch.tensor([prompt])
    want = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    llm = LLM.from_model(tiny_model(**changes), kv_format="exact", kv_cache_bytes=16 << 20)
    params = SamplingParams(temperature=0.0, max_tokens=6)
    [found] = llm.generate([prompt], params, use_tqdm=False)
    assert found.outputs[0].token_ids == want


def test_a_window_counts_where_scaling_makes_sequences_longer_than_it():
    from transformers import MistralConfig

    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    changes = {"max_position_embeddings": 1024, "sliding_window": 2048}
    assert set(ModelGeometry.from_config(MistralConfig(**changes)).windows) == {None}
    scaled = MistralConfig(**changes, rope_parameters=rope)
    assert set(ModelGeometry.from_config(scaled).windows) == {2048}


def test_metrics_call_the_model_by_its_first_served_name(folder):
    llm = LLM(str(folder), **OPTIONS)
    service = Service(llm, ServerSettings(("my-model", "another")))
    text = service._metrics().decode()
    assert [snapshot.model_name for snapshot in parse(text)] == ["my-model"]
    assert str(folder) not in text
