"""What the page says that vLLM has and this has not is refused here, and nothing else is."""

from __future__ import annotations

import argparse
import json
import re
from importlib import import_module

import pytest

from spectral_paged.cli.commands import build_parser
from spectral_paged.errors import InvalidRequestError
from spectral_paged.openai import parse_body
from spectral_paged.options import METHODS_NOT_SERVED, NOT_SERVED, PAGE
from spectral_paged.sampling import RULES
from spectral_paged.server.app import Service
from spectral_paged.server.settings import ServerSettings
from support.markdown_pages import read, rows
from support.paths import ROOT, TESTS
from support.served import served_llm

TEXT = (ROOT / PAGE).read_text(encoding="utf-8")


def table(heading):
    """The rows of the table under a heading, without its head."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [row for row in rows(read(ROOT / PAGE, section))[1:] if set(row[0]) != {"-"}]


def spans(cell):
    return re.findall(r"`([^`]+)`", cell)


VLLM = json.loads((TESTS / "data" / "vllm_names.json").read_text(encoding="utf-8"))  # of 0.26.0
FIELDS = [name for first, _ in table("Fields of a body") for name in spans(first)]


def test_options_and_what_to_do_instead_are_those_of_the_command_line():
    said = {instead: spans(first) for first, instead in table("Options of `vllm serve`")}
    assert said == {
        instead: [string.split()[0] for string in names] for instead, names in NOT_SERVED.items()
    }


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("chat", [True, False])
def test_fields_are_refused_by_name(field, chat):
    body = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "x"}
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(body | {field: 7}, chat=chat, defaults={})
    assert caught.value.param == field and field in str(caught.value)


def test_methods_of_vllms_that_are_not_here_are_told_what_is():
    said = {instead: tuple(spans(first)) for first, instead in table("Methods of `LLM`")}
    assert said == METHODS_NOT_SERVED
    with served_llm() as llm:
        for instead, names in said.items():
            for name in names:
                assert not hasattr(llm, name)
                with pytest.raises(AttributeError, match=re.escape(f"{name!r}: take {instead}")):
                    getattr(llm, name)
        with pytest.raises(AttributeError, match="no attribute 'nonsense'$"):
            llm.nonsense  # noqa: B018
        for name in re.findall(r"`llm\.([\w.]+)", " ".join(said)):
            assert hasattr(llm, name.split(".")[0])


def test_what_scripts_import_is_there():
    found = []
    for theirs, ours in table("What scripts import"):
        _, *names = spans(theirs)
        (module,) = spans(ours)
        if module.startswith("spectral_paged"):
            found += names
            assert {name for name in names if not hasattr(import_module(module), name)} == set()
    assert {"LLM", "SamplingParams", "AsyncLLM", "RequestOutputKind", "Counter"} <= set(found)


def test_nothing_that_vllm_has_is_left_out():
    """Its options, methods, routes and fields are served, or listed with what to do instead."""
    serve = {string for action in parser_of("serve")._actions for string in action.option_strings}
    assert set(VLLM["options"]) - serve == set()  # those that are refused are known to it too
    with served_llm() as llm:
        listed = {name for names in METHODS_NOT_SERVED.values() for name in names}
        assert {name for name in VLLM["methods"] if not hasattr(llm, name)} <= listed
    assert set(VLLM["routes"]) - set(spans(TEXT)) == set()
    unserved = {name for name in VLLM["sampling fields"] if name not in RULES}
    assert unserved - set(spans(TEXT)) == set()


def parser_of(command):
    (commands,) = (
        action.choices
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return commands[command]


def test_endpoints_that_are_served_are_and_the_others_are_not():
    with served_llm() as llm:
        app = Service(llm, ServerSettings(("tiny",), dev_mode=True)).app
    routes = {route.path for route in app.routes}
    for first, here in table("Endpoints"):
        for path in spans(first):
            assert (path in routes) == here.startswith("served"), path
            assert here.startswith("served") or here.startswith("404")


def test_the_page_is_found_from_where_a_reader_comes_from():
    for name in ("README.md", "docs/index.md", "docs/server.md", "docs/command-line.md"):
        assert "vllm-comparison.md" in (ROOT / name).read_text(encoding="utf-8"), name
