"""What scripts bring (arrays, tensors, columns, encodings, paths) is served, or told a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from transformers import AutoModel, pipeline

from spectral_paged import LLM, SamplingParams, SharedBasis
from spectral_paged.batch.file import OutputFile, read_lines
from spectral_paged.batch.run import BatchRun, serve_lines
from spectral_paged.errors import (
    InvalidRequestError,
    SamplingParamsError,
    SpectralPagedError,
    UnknownModelError,
    UnsupportedModelError,
)
from spectral_paged.openai import COMPLETIONS_URL
from spectral_paged.server.parsing import parse_request
from spectral_paged.server.settings import ServerSettings
from support.page_parts import toy_basis
from support.served import letter_tokenizer, served_llm
from support.tiny_model import tiny_model

PARAMS = SamplingParams(temperature=0.0, max_tokens=2)
IDS = [5, 17, 3, 40]
ROWS = [[5, 17, 3, 40], [9, 8, 7, 6]]
TEXTS = ["Hello", "a b"]
TALK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def llm():
    made = served_llm()
    made.get_tokenizer().pad_token = "~"
    made.get_tokenizer().padding_side = "left"
    return made


def dataset(**columns):
    return datasets.Dataset.from_dict(columns)


# ---- doors: the token ids of the prompts that each serves --------------------------------


def by_generate(llm, prompts):
    return [o.prompt_token_ids for o in llm.generate(prompts, PARAMS, use_tqdm=False)]


def by_stream(llm, prompts):
    seen, add = {}, llm.engine.add_request

    def watched(request_id, prompt, *args, **options):
        add(request_id, prompt, *args, **options)
        seen[request_id] = llm.engine.requests.by_id[request_id].prompt_token_ids

    llm.engine.add_request = watched
    try:
        assert len({delta.prompt_index for delta in llm.stream(prompts, PARAMS)}) == len(seen)
    finally:
        del llm.engine.add_request
    return list(seen.values())


def by_engine(llm, prompt):
    llm.engine.add_request("one", prompt, PARAMS)
    outputs = []
    while llm.engine.has_unfinished():
        outputs = llm.engine.step()
    return [outputs[0].prompt_token_ids]


def by_list(llm, prompt):
    return by_generate(llm, [prompt, prompt])[1:]


def by_mapping(llm, prompt):
    return by_generate(llm, {"prompt_token_ids": prompt})


ONE = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "range": lambda: range(5, 9),
    "generator": lambda: (token for token in IDS),
    "numpy": lambda: np.array(IDS),
    "numpy int32": lambda: np.array(IDS, dtype=np.int32),
    "numpy scalars": lambda: list(np.array(IDS)),
    "numpy 0-d": lambda: [np.array(token) for token in IDS],
    "torch": lambda: torch.tensor(IDS),
    "torch scalars": lambda: list(torch.tensor(IDS)),
    "torch beside int": lambda: [IDS[0], *torch.tensor(IDS[1:], dtype=torch.int32)],
    "pandas": lambda: pd.Series(IDS),
    "pandas Index": lambda: pd.Index(IDS),
    "pyarrow": lambda: pa.array(IDS),
    "pyarrow chunks": lambda: pa.chunked_array([IDS]),
    "datasets": lambda: dataset(ids=IDS)["ids"],
}


@pytest.mark.parametrize("door", [by_generate, by_stream, by_engine, by_list, by_mapping])
@pytest.mark.parametrize("form", ONE)
def test_token_ids_come_in_any_form(llm, door, form):
    if form == "generator" and door is by_list:
        pytest.skip("one generator cannot be two prompts")
    want = list(range(5, 9)) if form == "range" else IDS
    assert door(llm, ONE[form]()) == [want]
    assert all(type(token) is int for token in door(llm, ONE[form]())[0])


MANY_IDS = {
    "lists": lambda: ROWS,
    "tuples": lambda: tuple(map(tuple, ROWS)),
    "generator": lambda: (row for row in ROWS),
    "numpy 2-d": lambda: np.array(ROWS),
    "torch 2-d": lambda: torch.tensor(ROWS),
    "torch rows": lambda: list(torch.tensor(ROWS)),
    "pandas column of arrays": lambda: pd.DataFrame({"ids": list(np.array(ROWS))})["ids"],
    "datasets column": lambda: dataset(ids=ROWS)["ids"],
    "datasets column of tensors": lambda: dataset(ids=ROWS).with_format("torch")["ids"],
    "encoding": lambda: {"input_ids": ROWS, "attention_mask": np.ones((2, 4))},
    "encodings": lambda: [{"input_ids": torch.tensor([row])} for row in ROWS],
}
MANY_TEXTS = {
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "dict keys": lambda: dict.fromkeys(TEXTS).keys(),
    "numpy": lambda: np.array(TEXTS),
    "pandas": lambda: pd.DataFrame({"text": TEXTS})["text"],
    "pandas objects": lambda: pd.Series(TEXTS, dtype=object),
    "pyarrow": lambda: pa.table({"text": TEXTS})["text"],
    "datasets": lambda: dataset(text=TEXTS)["text"],
    "mappings": lambda: [{"prompt": np.str_(text)} for text in TEXTS],
}


@pytest.mark.parametrize("door", [by_generate, by_stream])
@pytest.mark.parametrize("form", MANY_IDS)
def test_many_prompts_of_token_ids_come_in_any_form(llm, door, form):
    assert door(llm, MANY_IDS[form]()) == ROWS


@pytest.mark.parametrize("door", [by_generate, by_stream])
@pytest.mark.parametrize("form", MANY_TEXTS)
def test_many_prompts_of_text_come_in_any_form(llm, door, form):
    assert door(llm, MANY_TEXTS[form]()) == [llm.get_tokenizer()(t)["input_ids"] for t in TEXTS]


@pytest.mark.parametrize("door", [by_generate, by_stream])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_what_a_tokenizer_returned_is_served_without_its_pads(llm, door, tensors):
    tokenizer = llm.get_tokenizer()
    want = [tokenizer(text)["input_ids"] for text in TEXTS]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        encoded = tokenizer(TEXTS, padding=tensors is not None, return_tensors=tensors)
        assert door(llm, encoded) == want
    one = tokenizer(TEXTS[0], return_tensors=tensors)
    assert door(llm, one) == door(llm, [one]) == want[:1]


BAD = {
    "a DataFrame": (lambda: pd.DataFrame({"text": TEXTS, "n": [1, 2]}), r"prompts\['text'\]"),
    "a dataset": (lambda: dataset(question=TEXTS), r"table \(Dataset\).*prompts\['question'\]"),
    "an arrow table": (lambda: pa.table({"text": TEXTS}), r"prompts\['text'\]"),
    "a scalar": (lambda: torch.tensor(3), "give text, token ids"),
    "bytes": (lambda: b"text", "give text, token ids"),
    "a bytearray": (lambda: bytearray(b"text"), "give text, token ids"),
    "a set": (lambda: set(TEXTS), "give text, token ids"),
    "a path": (lambda: Path("prompt.txt"), "give text, token ids"),
    "no memory": (lambda: torch.empty(3, dtype=torch.long, device="meta"), "give a list"),
    "floats": (lambda: torch.tensor([1.0, 2.0]), "text or token ids"),
    "bools": (lambda: np.array([True, False]), "True is not a token id"),
    "NaN in a column": (lambda: pd.Series(["a", None], dtype=object), "text or token ids"),
    "3-d": (lambda: torch.zeros(2, 1, 3, dtype=torch.long), "has one dimension.*tolist"),
    "a row in a list": (lambda: [torch.zeros(1, 3, dtype=torch.long)], "one dimension.*tolist"),
    "encodings of several": (lambda: [{"input_ids": ROWS}], "has 2 prompts where one is asked"),
    "an encoding with labels": (lambda: {"input_ids": IDS, "labels": IDS}, r"has \['labels'\]"),
    "another mask": (lambda: {"input_ids": [1, 2], "attention_mask": [1]}, "different shapes"),
    "ids that are text": (lambda: {"input_ids": "text"}, "must be a list of token ids"),
    "ragged": (lambda: {"input_ids": [1, [2]]}, "mixes numbers and lists"),
    "embeddings": (lambda: {"prompt_embeds": torch.zeros(3, 64)}, r"has \['prompt_embeds'\]"),
    "images": (lambda: {"prompt": "x", "multi_modal_data": {}}, r"has \['multi_modal_data'\]"),
}


@pytest.mark.parametrize("door", [by_generate, by_stream])
@pytest.mark.parametrize("form", BAD)
def test_what_is_no_prompt_is_refused_with_the_remedy(llm, door, form):
    made, says = BAD[form]
    with pytest.raises(InvalidRequestError, match=says):
        door(llm, made())
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": IDS},
        {"prompt_token_ids": IDS},
        {"input_ids": IDS},
        {"input_ids": [[0, *IDS]], "attention_mask": [[0, 1, 1, 1, 1]]},
        {"custom_id": "a", "url": COMPLETIONS_URL, "body": {"prompt": IDS}},
    ],
    ids=str,
)
def test_lines_name_token_ids_as_scripts_do(llm, tmp_path, line):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(line))
    (found,) = read_lines(path, {"max_tokens": 1})
    assert found.error is None and found.prompt == IDS
    (result,) = serve_lines(llm, iter([found]))
    assert result.record["error"] is None


def test_a_line_of_unknown_fields_is_told_the_known_ones(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "x"}\n{"input_ids": [[1], [2]]}\n')
    unknown, several = [line.error for line in read_lines(path, {})]
    assert "unknown fields ['text']: a line takes prompt, prompt_token_ids" in str(unknown)
    assert "has 2 prompts where one is asked for" in str(several)


# ---- conversations -----------------------------------------------------------------------

ONE_TALK = {
    "list": lambda: TALK,
    "tuple": lambda: tuple(TALK),
    "generator": lambda: (message for message in TALK),
    "numpy": lambda: np.array(TALK, dtype=object),
    "content of parts": lambda: [
        {"role": "user", "content": np.array([{"type": "text", "text": "Hi"}], dtype=object)}
    ],
}
MANY_TALKS = {
    "lists": lambda: [TALK, TALK],
    "generator": lambda: (talk for talk in [TALK, TALK]),
    "arrays of parquet": lambda: pd.Series([np.array(TALK, dtype=object)] * 2),
    "datasets": lambda: dataset(messages=[TALK, TALK])["messages"],
}


@pytest.mark.parametrize("form", [*ONE_TALK, *MANY_TALKS])
def test_conversations_come_in_any_form(llm, form):
    for forms, count in ((ONE_TALK, 1), (MANY_TALKS, 2)):
        if made := forms.get(form):
            outputs = llm.chat(made(), PARAMS, use_tqdm=False)
            assert [o.prompt_token_ids for o in outputs] == [llm.chat_tokens(TALK)] * count


@pytest.mark.parametrize("table", [pd.DataFrame, pa.table, lambda d: dataset(**d)])
def test_a_table_of_conversations_is_told_to_name_its_column(llm, table):
    with pytest.raises(InvalidRequestError, match=r"messages is a table.*messages\['talk'\]"):
        llm.chat(table({"talk": [TALK, TALK]}), PARAMS, use_tqdm=False)


# ---- sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize("of", [np.float32, np.float64, torch.tensor])
def test_sampling_values_of_numpy_and_torch_are_pythons(of):
    params = SamplingParams(
        temperature=of(0.5),
        max_tokens=np.int64(7),
        seed=torch.tensor(3),
        ignore_eos=np.bool_(True),
        stop=np.array(["a", "b"]),
        stop_token_ids=torch.tensor([1, 2]),
    )
    stops = {"stop": ["a", "b"], "stop_token_ids": [1, 2]}
    same = SamplingParams(temperature=0.5, max_tokens=7, seed=3, ignore_eos=True, **stops)
    assert params == same and type(params.max_tokens) is int
    assert SamplingParams(stop_token_ids=None) == SamplingParams()
    hash(SamplingParams(max_tokens=np.int64(7), stop_token_ids=(np.int32(2),)))


@pytest.mark.parametrize("value", [np.float32("nan"), torch.tensor([0.5, 0.5]), np.array("x")])
def test_a_sampling_value_of_another_kind_is_refused(value):
    with pytest.raises(SamplingParamsError, match="temperature is "):
        SamplingParams(temperature=value)


@pytest.mark.parametrize("of", [tuple, iter, lambda rows: pd.Series(rows, dtype=object)])
def test_sampling_parameters_come_in_any_sequence(llm, of):
    rows = [SamplingParams(max_tokens=1), None, SamplingParams(max_tokens=3, ignore_eos=True)]
    outputs = llm.generate([IDS] * 3, of(rows), use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs][::2] == [1, 3]


# ---- models and files --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(where)
    letter_tokenizer().save_pretrained(where)
    return where


CPU = {"device": "cpu", "kv_cache_bytes": 16 << 20, "max_num_seqs": 4}


def test_files_are_named_by_paths(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    basis = toy_basis(2, 2, 16)
    for of in (str, Path):
        basis.save(of(tmp_path / "basis.safetensors"))
        assert SharedBasis.load(of(tmp_path / "basis.safetensors")).id == basis.id
        with LLM(of("tiny"), kv_format="exact", **CPU) as llm:
            source, output = tmp_path / "in.jsonl", tmp_path / f"{of.__name__}.jsonl"
            source.write_text('{"prompt": "Hi"}')
            found = OutputFile(of(output))
            assert BatchRun(llm, of(source), found).run({"max_tokens": 1}, quiet=True).done == 1
            found.close()


@pytest.mark.parametrize("name", ["tiny-2", "no/such", "../smollm2-135m"])
def test_a_path_is_never_asked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("spectral_paged.models.hub.get_hf_file_metadata", None)
    with pytest.raises(UnknownModelError, match="there is no folder"):
        LLM(Path(name), device="cpu")


@pytest.mark.parametrize(
    "model, says",
    [
        (tiny_model, r"is a LlamaForCausalLM.*LLM\.from_model\(model, tokenizer\)"),
        (lambda: None, "is a NoneType; give a name or a path"),
        (lambda: b"smollm2-135m", "is a bytes; give a name or a path"),
        (lambda: letter_tokenizer(), "is a .*; give a name or a path"),
    ],
)
def test_a_model_that_is_no_name_is_told_where_it_goes(model, says):
    with pytest.raises(UnknownModelError, match=says):
        LLM(model())


class WithAdapters(torch.nn.Module):
    """A model in adapters, as far as one can see it from outside."""

    def __init__(self):
        super().__init__()
        self.base_model, self.config = tiny_model(), tiny_model().config

    def merge_and_unload(self):
        return self.base_model


def injected():
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    attention.q_proj.base_layer = torch.nn.Linear(2, 2)
    return model


def on_two_devices():
    model = tiny_model()
    model.lm_head = torch.nn.Linear(64, 8, device="meta")
    return model


@pytest.mark.parametrize(
    "model, says",
    [
        (WithAdapters, r"has adapters around it \(WithAdapters\).*merge_and_unload"),
        (injected, "q_proj and 0 other layers have adapters.*merge_and_unload"),
        (lambda: "tiny", r"takes a loaded model; LLM\('tiny'\) loads one"),
        (lambda: Path("tiny"), r"takes a loaded model; LLM\('tiny'\) loads one"),
        (lambda: 3, "this is a int: load one with AutoModelForCausalLM"),
        (lambda: AutoModel.from_config(tiny_model().config), "LlamaModel has no head"),
        (on_two_devices, "lies on cpu, meta; an LLM has one device"),
        (
            lambda: pipeline("text-generation", model=tiny_model(), tokenizer=letter_tokenizer()),
            r"from_model\(pipe.model, pipe.tokenizer\)",
        ),
    ],
    ids=["adapters", "injected", "str", "Path", "int", "no head", "devices", "pipeline"],
)
def test_a_loaded_model_that_cannot_be_served_is_told_a_remedy(model, says):
    with pytest.raises(UnsupportedModelError, match=says):
        LLM.from_model(model())


@pytest.mark.parametrize("of", [lambda t: "t", lambda t: t.backend_tokenizer], ids=["str", "raw"])
def test_a_tokenizer_that_cannot_be_called_is_refused(of):
    with pytest.raises(InvalidRequestError, match=r"tokenizer is a .*AutoTokenizer.*tokenizer_obj"):
        LLM.from_model(tiny_model(), of(letter_tokenizer()))


def test_adapters_of_peft_are_refused_and_merged_ones_served():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model(), config)
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            LLM.from_model(model, kv_format="exact", kv_cache_bytes=16 << 20)
    ids = torch.tensor([IDS])
    want = adapted.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, 4:].tolist()
    llm = LLM.from_model(adapted.merge_and_unload(), kv_format="exact", kv_cache_bytes=16 << 20)
    (output,) = llm.generate(ids, SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)
    assert output.outputs[0].token_ids == want


def test_a_server_takes_json_alone_and_says_so(llm):
    body = json.dumps({"prompt": {"input_ids": IDS}}).encode()
    with pytest.raises(SpectralPagedError, match="prompt must be a string, a list of token ids"):
        parse_request(llm, ServerSettings(("tiny",)), body, chat=False)
