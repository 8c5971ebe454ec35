"""Structured outputs: every answer has its form, and no other request notices."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from spectral_paged import SamplingParams
from spectral_paged.errors import InvalidRequestError, RequestFailedError, SamplingParamsError
from spectral_paged.grammar import Constraint, GrammarCompiler, Vocabulary
from spectral_paged.sampling import SampledTokens, StructuredOutputsParams
from support.fault_runs import serve, tokens
from support.schemas import FORMS, matches
from support.served import served_llm
from support.tiny_model import raise_once, tiny_llm

AHEAD = pytest.mark.parametrize("ahead", [False, True])
FREE = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NUM_FORMS = int(os.environ.get("SPECTRAL_PAGED_FORMS", "60"))  # `make forms` has 2,000


def structured(**form):
    """Parameters that draw at random; `form` has fields of StructuredOutputsParams."""
    asked = StructuredOutputsParams(**form)
    return SamplingParams(temperature=1.0, seed=1, max_tokens=400, structured_outputs=asked)


def said(llm, params, prompt="tell me"):
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    return [c.text for c in output.outputs], {c.finish_reason for c in output.outputs}


@pytest.fixture(scope="module", params=[False, True], ids=["in turn", "ahead"])
def llm(request):
    made = served_llm()
    made.engine.async_scheduling = request.param
    return made


@settings(
    max_examples=NUM_FORMS // 4,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=NUM_FORMS == 60,
    database=None,
)
@given(forms=st.lists(FORMS, min_size=4, max_size=4), seed=st.integers(0, 99), n=st.integers(1, 2))
def test_every_answer_has_its_form_and_no_request_is_disturbed(llm, forms, seed, n):
    params = [
        SamplingParams(n=n, temperature=1.0, seed=seed + i, max_tokens=600, structured_outputs=form)
        for i, form in enumerate(
            form | ({"disable_any_whitespace": True} if "json" in form else {}) for form in forms
        )
    ]
    (alone,) = llm.generate(["a free one"], FREE, use_tqdm=False)
    free, *outputs = llm.generate(["a free one", *["tell me"] * 4], [FREE, *params], use_tqdm=False)
    assert free.outputs[0].token_ids == alone.outputs[0].token_ids
    for form, output in zip(forms, outputs, strict=True):
        for completion in output.outputs:
            assert completion.finish_reason == "stop", (form, completion)
            assert matches(form, completion.text), (form, completion.text)


@pytest.mark.parametrize(
    "form, good",
    [
        ({"choice": ["yes", "no", 'may"be']}, lambda text: text in ("yes", "no", 'may"be')),
        ({"regex": "[a-f]{3}-[0-9]+x"}, lambda text: text[3] == "-" and text.endswith("x")),
        ({"json": PERSON}, lambda text: set(json.loads(text)) == {"name", "age"}),
        ({"json": json.dumps(PERSON)}, lambda text: json.loads(text)["age"] in (1, 22, 333)),
        ({"grammar": 'start: "a" b+ \n b: "(" b ")" | "x"'}, lambda text: text[0] == "a"),
        ({"grammar": 'root ::= "a" b\nb ::= "(" b ")" | "x"'}, lambda text: text[0] == "a"),
    ],
    ids=["choice", "regex", "json", "json as text", "lark", "gbnf"],
)
def test_each_kind_of_form_holds(llm, form, good):
    for seed in range(3):
        params = structured(**form)
        params.seed = seed
        (text,), reasons = said(llm, params)
        assert (good(text) and reasons == {"stop"}) or reasons == {"length"}, text


def test_a_json_object_is_any_object(llm):
    params = structured(json_object=True)
    params.bad_words, params.logit_bias = ["{{"], {llm.get_tokenizer()("}")["input_ids"][0]: 9.0}
    (text,), _ = said(llm, params)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("closed", [False, True])
def test_a_schema_may_be_of_any_mappings(llm, closed):
    parts = MappingProxyType({"a": MappingProxyType({"type": "null"})})
    schema = MappingProxyType({"type": "object", "properties": parts, "required": ("a",)})
    params = structured(json=schema, disable_additional_properties=closed)
    params.max_tokens = 16
    assert said(llm, params)[0][0].startswith("{") and "additionalProperties" not in schema


def test_additional_properties_may_be_closed(llm):
    open_schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    (text,), _ = said(
        llm,
        structured(
            json=open_schema, disable_additional_properties=True, disable_any_whitespace=True
        ),
    )
    assert text == '{"a":null}'


@pytest.mark.parametrize(
    "form, why",
    [
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": "{nope"}, "Expecting property name"),
        ({"json": "[1]"}, "a JSON schema is an object"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": ""}, "a string of 1 to"),
        ({"regex": "()"}, "no text but the empty one"),
        ({"grammar": 'start: "a" foo'}, "foo"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(llm, form, why):
    with pytest.raises((InvalidRequestError, SamplingParamsError), match=why) as caught:
        said(llm, structured(**form))
    assert caught.value.param == "structured_outputs"
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("form", [{}, {"regex": "a", "choice": ["b"]}, {"json_object": False}])
def test_one_form_is_asked_for(form):
    with pytest.raises(SamplingParamsError, match="structured_outputs"):
        StructuredOutputsParams(**form)


def test_a_compilation_that_takes_too_long_is_refused_and_others_go_on(monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    compile_now = GrammarCompiler._compile

    def slow(self, asked):
        if asked.regex == "slow":
            begun.set()
            go_on.wait(20)
        return compile_now(self, asked)

    monkeypatch.setattr(GrammarCompiler, "_compile", slow)
    compiler = GrammarCompiler(lambda: Vocabulary([b"a", b"b"], lambda text: []), (), seconds=0.2)
    with pytest.raises(InvalidRequestError, match="took more than 0.2 s"):
        compiler.compile(StructuredOutputsParams(regex="slow"))
    assert begun.is_set()
    start = time.monotonic()
    assert compiler.compile(StructuredOutputsParams(regex="ab*"))
    assert time.monotonic() - start < 0.2
    go_on.set()


@pytest.mark.parametrize("ends", [(), (2,), (2, 40)])
def test_end_tokens_come_where_the_grammar_may_end(ends):
    tokens = [b"a", b"b", *[b""] * 40]
    compiler = GrammarCompiler(lambda: Vocabulary(tokens, lambda text: []), ends)
    grammar = compiler.compile(StructuredOutputsParams(regex="ab*"))

    def allowed(place):
        bits = np.unpackbits(place.allowed().view(np.uint8), bitorder="little")
        return set(np.flatnonzero(bits[: len(tokens)]).tolist())

    for ignored in (False, True):
        place = grammar.start(ignore_ends=ignored)
        assert allowed(place) == {0}
        for token in (0, 1, 1):
            place.accept(token)
            assert allowed(place) == {1, *(() if ignored else ends)} and not place.ended
    for token in ends:
        place = grammar.start()
        place.accept(0)
        place.accept(token)
        with pytest.raises(InvalidRequestError, match="cannot go on"):
            grammar.start().accept(token)


def test_a_grammar_is_compiled_once(monkeypatch):
    calls = []
    compile_now = GrammarCompiler._compile
    monkeypatch.setattr(
        GrammarCompiler, "_compile", lambda *args: calls.append(1) or compile_now(*args)
    )
    llm = served_llm()
    for _ in range(3):
        said(llm, structured(choice=["yes", "no"]))
    said(llm, structured(choice=["no", "yes"]))
    assert len(calls) == 2


def test_what_is_asked_for_is_written_out_once_with_its_parameters(monkeypatch):
    """A large schema costs the engine's thread nothing, however many prompts have it."""
    schema = {"enum": [f"value {i}" for i in range(50)]}
    params, calls = structured(json=schema), []
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda *args, **how: calls.append(1) or dumps(*args, **how))
    llm = served_llm()
    llm.generate(["a", "b", "c"], params, use_tqdm=False)
    written = len(calls)
    llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert len(calls) == written  # the grammar was written once, and nothing again
    schema["enum"].clear()  # what it was when it was asked for counts
    (text,), _ = said(served_llm(), params)
    assert json.loads(text).startswith("value ")


@pytest.mark.parametrize("value", [{1, 2}, object()], ids=["set", "object"])
def test_a_schema_that_json_does_not_have_is_refused_where_it_is_made(value):
    with pytest.raises(SamplingParamsError, match="cannot be written as JSON") as caught:
        StructuredOutputsParams(json={"enum": value})
    assert caught.value.param == "structured_outputs"


def test_masks_of_a_step_are_filled_together_and_say_the_same(monkeypatch):
    forms = [{"regex": "[a-f]{9}"}, {"choice": ["yes", "no"]}, {"regex": "(a|ab|abc|b|bc|c)+"}]
    llm = served_llm()
    compiler = llm.engine.grammars
    grammars = [compiler.compile(StructuredOutputsParams(**form)) for form in forms]
    alone, together = [g.start() for g in grammars], [g.start() for g in grammars]
    for _ in range(3):
        Constraint.fill(together)
        for one, other in zip(alone, together, strict=True):
            assert one.allowed().tolist() == other.allowed().tolist()
            bits = np.unpackbits(one.allowed().view(np.uint8), bitorder="little")
            token = int(np.flatnonzero(bits)[0])
            one.accept(token), other.accept(token)
    filled = []
    fill = Constraint.fill
    monkeypatch.setattr(
        Constraint, "fill", lambda many: filled.append(len(p := [*many])) or fill(p)
    )
    params = [structured(**form) for form in forms]
    llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert max(filled) == len(forms)


def test_a_mask_that_was_filled_is_computed_again_behind_a_token():
    compiler = GrammarCompiler(lambda: Vocabulary([b"a", b"b"], lambda text: []), ())
    grammar = compiler.compile(StructuredOutputsParams(regex="ab"))
    places = [grammar.start() for _ in range(2)]
    Constraint.fill(places)
    assert [int(p.allowed()[0]) & 3 for p in places] == [1, 1]
    places[1].accept(0)
    Constraint.fill(places)
    assert [int(p.allowed()[0]) & 3 for p in places] == [1, 2]


def test_structured_outputs_without_a_tokenizer_are_refused():
    with pytest.raises(InvalidRequestError, match="need a tokenizer"):
        tiny_llm().engine.add_request("a", [1], structured(regex="ab"))


def test_a_tokenizer_that_cannot_say_it_is_told_so(llm):
    with pytest.raises(InvalidRequestError, match="no token that it may begin with"):
        said(llm, structured(regex="漢"))


@AHEAD
def test_requests_that_gave_way_go_on_where_they_were(ahead):
    prompts = ["x" * size for size in (300, 600, 650, 700, 400, 620, 900, 560, 610)]
    params = structured(regex="[a-f]{90}")
    params.max_tokens = 100
    small, large = served_llm(kv_cache_bytes=700_000, max_num_seqs=32), served_llm()
    small.engine.async_scheduling = ahead
    got, want = (llm.generate(prompts, params, use_tqdm=False) for llm in (small, large))
    assert [o.outputs[0].text for o in got] == [o.outputs[0].text for o in want]
    assert all(len(o.outputs[0].text) == 90 for o in got)
    assert small.stats()["preemptions"] > 0


def queued(ahead):
    """An LLM that two requests with a form and a free one wait for."""
    llm, params = served_llm(), structured(json=PERSON)
    params.n, llm.engine.async_scheduling = 2, ahead
    for i, prompt in enumerate(["some words", "x" * 600]):
        llm.engine.add_request(str(i), prompt, params)
    llm.engine.add_request("free", "y", FREE)
    return llm


@functools.cache
def undisturbed(ahead):
    return tokens(serve(queued(ahead))[0])


@AHEAD
@pytest.mark.parametrize("where", ["get", "draw", "forward", "end_step"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no")], ids=repr)
def test_a_step_that_is_taken_again_is_at_the_same_place(monkeypatch, error, where, ahead):
    want, llm = undisturbed(ahead), queued(ahead)
    owner, name = {
        "get": (SampledTokens, "get"),
        "draw": (Constraint, "allowed"),
        "forward": (llm.engine.runner, "forward"),
        "end_step": (llm.cache, "end_step"),
    }[where]
    raise_once(monkeypatch, owner, name, error, 5)
    done, raised = serve(llm, type(error))
    assert tokens(done) == want and all(o.error is None for o in done.values())
    assert not llm.engine.requests.reading


def let_grow_too_large(monkeypatch, llm, name):
    victim = llm.engine.requests.by_id[name].completions[0].constraint
    count = [0]
    allowed = victim.allowed

    def too_large():
        count[0] += 1
        if count[0] > 4:
            raise RequestFailedError("structured_outputs cannot go on: too large")
        return allowed()

    monkeypatch.setattr(victim, "allowed", too_large)


@AHEAD
def test_grammars_that_raise_in_every_request_of_a_step_fail_each(monkeypatch, ahead):
    llm = served_llm()
    llm.engine.async_scheduling = ahead
    for name in ("a", "b"):
        llm.engine.add_request(name, "x", structured(regex="[a-f]{60}"))
        let_grow_too_large(monkeypatch, llm, name)
    done, _ = serve(llm)
    assert all("too large" in str(done[name].error) for name in "ab")


@AHEAD
def test_a_grammar_that_raises_on_the_way_fails_its_request_alone(monkeypatch, ahead):
    llm = served_llm()
    llm.engine.async_scheduling = ahead
    llm.engine.add_request("bad", "x", structured(regex="[a-f]{60}"))
    llm.engine.add_request("good", "y", structured(regex="[a-f]{30}"))
    llm.engine.add_request("free", "y", FREE)
    let_grow_too_large(monkeypatch, llm, "bad")
    done, _ = serve(llm)
    assert "too large" in str(done["bad"].error)
    assert done["good"].error is None and len(done["good"].outputs[0].text) == 30
    assert done["free"].error is None and len(done["free"].outputs[0].token_ids) == 12


def test_steps_stay_queued_ahead_beside_structured_outputs():
    llm = served_llm()
    llm.engine.async_scheduling = True
    said(llm, structured(regex="[a-f]{30}"))
    assert llm.stats()["lockstep_steps"] == 0


def test_min_tokens_and_stop_strings_go_with_a_form(llm):
    params = structured(regex="[a-f]{4,30}")
    params.min_tokens = 20
    (text,), _ = said(llm, params)
    assert len(text) >= 20
    params = structured(regex="(ab|ac){9}")
    params.stop = ["b"]
    (text,), reasons = said(llm, params)
    assert reasons == {"stop"} and "b" not in text
