"""A request names its adapter as its model; adapters are loaded and unloaded while others run."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request

import openai
import pytest

from spectral_paged import AsyncLLM, LoRARequest, SamplingParams
from spectral_paged.batch.file import LINE_FIELDS, read_lines
from spectral_paged.batch.run import lora_of, serve_lines
from spectral_paged.cli.commands import build_parser
from spectral_paged.errors import AdapterError, InvalidRequestError
from spectral_paged.options import LLMOptions, given_options
from spectral_paged.server.app import Service
from spectral_paged.server.command import serve, settings_of
from spectral_paged.server.parsing import parse_request
from spectral_paged.server.settings import ServerSettings
from support.lora_adapters import KINDS, save_kinds
from support.served import served_llm, serving

PARAMS = SamplingParams(temperature=0.0, max_tokens=6)
PROMPT = "Tell me of the sea"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return save_kinds(tmp_path_factory.mktemp("adapters"))


def lora_llm(paths, *names, **options):
    modules = [f"{name}={paths[name]}" for name in names]
    return served_llm(**{"enable_lora": True, "max_loras": 3, "lora_modules": modules} | options)


@pytest.fixture(scope="module")
def said(paths):
    """What each adapter says to the prompt, by the library."""
    with lora_llm(paths, *KINDS) as llm:
        asked = [None, *llm.list_loras()]
        outputs = llm.generate([PROMPT] * 4, PARAMS, use_tqdm=False, lora_request=asked)
        texts = [output.outputs[0].text for output in outputs]
    found = dict(zip(["tiny", *KINDS], texts))
    assert len(set(texts)) == 4
    return found


@pytest.fixture(scope="module")
def running(paths):
    llm = lora_llm(paths, "low", "all")
    with serving(llm, allow_runtime_lora_updating=True) as served:
        yield served
        served.settle()


def post(served, path, body):
    """Status and text of an answer."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(served.url + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def complete(client, model):
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=6, temperature=0)
    assert answer.model == model
    return answer.choices[0].text


def test_adapters_are_models_of_completions_chats_responses_and_tokens(running, said):
    with running.client() as client:
        for model in ("tiny", "low", "all"):
            assert complete(client, model) == said[model]
            pieces = client.completions.create(
                model=model, prompt=PROMPT, max_tokens=6, temperature=0, stream=True
            )
            assert "".join(piece.choices[0].text for piece in pieces) == said[model]
        talk = [{"role": "user", "content": PROMPT}]
        chats = {
            model: client.chat.completions.create(
                model=model, messages=talk, max_tokens=6, temperature=0
            )
            for model in ("tiny", "low")
        }
        texts = {model: chat.choices[0].message.content for model, chat in chats.items()}
        assert chats["low"].model == "low" and texts["low"] != texts["tiny"]
        response = client.responses.create(
            model="low", input=PROMPT, max_output_tokens=6, temperature=0
        )
        assert response.model == "low" and response.output_text == texts["low"]
    body = {"model": "low", "prompt": "ab"}
    assert post(running, "/tokenize", body)[0] == 200
    assert post(running, "/tokenize", body | {"model": "lowe"})[0] == 404


def test_models_are_listed_with_their_parent(running):
    with running.client() as client:
        cards = {card.id: card for card in client.models.list()}
        assert list(cards)[:4] == ["tiny", "alias", "low", "all"]
        assert cards["low"].parent == "tiny" and not hasattr(cards["tiny"], "parent")
        assert client.models.retrieve("all").id == "all"
        for name in ("root", "nothing"):
            with pytest.raises(openai.NotFoundError, match="'tiny', 'alias', 'low', 'all'"):
                client.models.retrieve(name)
            with pytest.raises(openai.NotFoundError, match=f"'{name}' is not served here"):
                complete(client, name)


def test_an_adapter_is_loaded_served_and_unloaded(running, paths, said):
    body = {"lora_name": "new", "lora_path": paths["root"]}
    status, text = post(running, LOAD, body)
    assert (status, text) == (200, "Success: LoRA adapter 'new' added successfully.")
    status, text = post(running, LOAD, body)
    assert status == 400 and "is loaded: give another name and id, or unload" in text
    status, text = post(running, LOAD, body | {"lora_name": "fourth"})
    assert status == 400 and "max_loras is 3" in text
    with running.client() as client:
        assert complete(client, "new") == said["root"]
        status, text = post(running, UNLOAD, {"lora_name": "new"})
        assert (status, text) == (200, "Success: LoRA adapter 'new' removed successfully.")
        with pytest.raises(openai.NotFoundError):
            complete(client, "new")
    assert post(running, UNLOAD, {"lora_name": "new"})[0] == 404


@pytest.mark.parametrize(
    "path, body, says",
    [
        (LOAD, {"lora_name": "tiny", "lora_path": "x"}, "has a name of the model"),
        (LOAD, {"lora_name": "x", "lora_path": "no/such"}, "there is no folder 'no/such'"),
        (LOAD, {"lora_name": "x"}, "lora_path"),
        (LOAD, {"lora_name": "", "lora_path": "x"}, "lora_name"),
        (LOAD, {"lora_name": "x", "lora_path": "y", "load_inplace": True}, "load_inplace"),
        (UNLOAD, {}, "lora_name"),
        (UNLOAD, {"lora_name": "alias"}, "is not served here"),
    ],
)
def test_wrong_loads_and_unloads_are_refused(path, body, says, running):
    status, text = post(running, path, body)
    assert status in (400, 404) and says in json.loads(text)["error"]["message"]
    assert len(running.service.llm.list_loras()) == 2


def test_adapters_come_and_go_while_others_stream(running, paths, said):
    texts, stop = [], threading.Event()

    def stream():
        with running.client() as client:
            while not stop.is_set():
                texts.append(complete(client, "low"))

    thread = threading.Thread(target=stream)
    thread.start()
    try:
        for name in ("root", "all", "root") * 2:
            load = {"lora_name": "guest", "lora_path": paths[name]}
            assert post(running, LOAD, load)[0] == 200
            with running.client() as client:
                assert complete(client, "guest") == said[name]
            assert post(running, UNLOAD, {"lora_name": "guest"})[0] == 200
    finally:
        stop.set()
        thread.join()
    assert texts and set(texts) == {said["low"]}
    running.settle()
    adapters = running.service.llm.adapters._by_name.values()
    assert not any(adapter.num_requests for adapter in adapters)


def test_the_routes_are_there_by_the_switch_alone(paths, monkeypatch):
    with serving(lora_llm(paths, "low")) as served:
        assert post(served, LOAD, {"lora_name": "x", "lora_path": paths["all"]})[0] == 404
        with urllib.request.urlopen(f"{served.url}/openapi.json") as answer:
            description = json.load(answer)
        assert LOAD not in description["paths"]
        names = description["components"]["schemas"]["ModelName"]["enum"]
        assert names == ["tiny", "alias", "low"]
    words = ["serve", "tiny", "--enable-lora"]
    assert not settings_of(build_parser().parse_args(words)).allow_runtime_lora_updating
    for value, on in (("1", True), ("True", True), ("0", False), ("", False)):
        monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", value)
        assert settings_of(build_parser().parse_args(words)).allow_runtime_lora_updating == on
    words.append("--no-allow-runtime-lora-updating")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    assert not settings_of(build_parser().parse_args(words)).allow_runtime_lora_updating


def test_what_cannot_be_served_is_told_before_the_model_is_loaded(paths, monkeypatch):
    monkeypatch.setattr("spectral_paged.llm.LLM", None)
    for words, says in [
        ("--enable-lora --lora-modules tiny=x", "'tiny' has a name of the model"),
        ("--allow-runtime-lora-updating", "needs --enable-lora"),
    ]:
        args = build_parser().parse_args(["serve", "tiny", "--port", "0", *words.split()])
        with pytest.raises(InvalidRequestError, match=says):
            serve(args)
    with served_llm() as llm, pytest.raises(InvalidRequestError, match="needs --enable-lora"):
        Service(llm, ServerSettings(("tiny",), allow_runtime_lora_updating=True))


def test_options_of_vllm_are_read():
    words = "serve tiny --enable-lora --max-loras 4 --max-lora-rank 32 --lora-modules a=x b=y"
    args = build_parser().parse_args([*words.split(), "--lora-modules", "c=z"])
    assert given_options(args, LLMOptions) == {
        "enable_lora": True,
        "max_loras": 4,
        "max_lora_rank": 32,
        "lora_modules": ["a=x", "b=y", "c=z"],
    }


@pytest.mark.parametrize("door", ["server", "batch"])
def test_a_request_that_was_read_before_an_unload_does_not_load_it_again(door, paths, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT, "model": "low"}))
    (line,) = read_lines(tmp_path / "in.jsonl", {})
    body = json.dumps({"model": "low", "prompt": PROMPT}).encode()
    with lora_llm(paths, "low") as llm:
        if door == "server":
            asked = parse_request(llm, ServerSettings(("tiny",)), body, chat=False).lora
        else:
            asked = lora_of(llm, line)
        llm.generate(PROMPT, PARAMS, use_tqdm=False, lora_request=asked)
        llm.remove_lora(1)
        with pytest.raises(AdapterError, match="'low' is not loaded"):
            llm.generate(PROMPT, PARAMS, use_tqdm=False, lora_request=asked)
        assert llm.list_loras() == []


# ---- other doors -------------------------------------------------------------------------


def test_a_line_of_a_batch_names_its_adapter(paths, said, tmp_path):
    def openai_line(model):
        body = {"model": model, "prompt": PROMPT}
        return {"custom_id": model, "url": "/v1/completions", "body": body}

    lines = [openai_line(name) for name in ("low", "all", "lowe")]
    lines += [{"prompt": PROMPT, "model": "all"}, {"prompt": PROMPT}, {"prompt": "x", "model": 5}]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    defaults = {"temperature": 0.0, "max_tokens": 6}
    assert "model" in LINE_FIELDS
    with lora_llm(paths, "low", "all") as llm:
        results = {r.record["line"]: r.record for r in serve_lines(llm, read_lines(path, defaults))}
    bodies = [results[number]["response"]["body"] for number in (1, 2)]
    assert [body["choices"][0]["text"] for body in bodies] == [said["low"], said["all"]]
    assert [body["model"] for body in bodies] == ["low", "all"]
    assert "did you mean 'low'?" in results[3]["error"]["message"]
    assert results[4]["outputs"][0]["text"] == said["all"]
    assert results[5]["outputs"][0]["text"] == said["tiny"]
    assert "model is 5; it must be a text" in results[6]["error"]["message"]
    with served_llm() as llm:  # without adapters a file may name whatever it was written for
        results = [r.record for r in serve_lines(llm, read_lines(path, defaults))]
    assert sum(record["error"] is None for record in results) == 5


def test_coroutines_have_adapters(paths, said):
    async def text(llm, name, request):
        async for output in llm.generate(PROMPT, PARAMS, name, lora_request=request):
            last = output
        return last.outputs[0].text

    async def run(llm):
        low, root = LoRARequest("low", 1), LoRARequest("root", 7, paths["root"])
        asked = [text(llm, "a", low), text(llm, "b", None), text(llm, "c", root)]
        assert await asyncio.gather(*asked) == [said["low"], said["tiny"], said["root"]]
        assert await llm.list_loras() == {1, 7}
        assert await llm.add_lora(LoRARequest("all", 8, paths["all"]))
        assert await llm.remove_lora(7) and not await llm.remove_lora(7)
        with pytest.raises(AdapterError, match="is loaded: give another name and id"):
            await llm.add_lora(LoRARequest("again", 8, paths["all"]))
        assert await text(llm, "d", LoRARequest("all", 8)) == said["all"]
        with pytest.raises(Exception, match="'root' is not loaded"):
            await text(llm, "e", LoRARequest("root", 7))
        await llm.stop()

    with lora_llm(paths, "low") as made:
        asyncio.run(run(AsyncLLM(made)))
