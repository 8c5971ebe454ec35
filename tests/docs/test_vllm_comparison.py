"""What the page says that vLLM has and this has not is refused here, and nothing else is."""

from __future__ import annotations

import re

import pytest

from spectral_paged.errors import InvalidRequestError
from spectral_paged.llm import INSTEAD
from spectral_paged.openai import parse_body
from spectral_paged.options import NOT_SERVED, PAGE
from spectral_paged.server.app import Service
from spectral_paged.server.settings import ServerSettings
from support.markdown_pages import read, rows
from support.paths import ROOT
from support.served import served_llm

TEXT = (ROOT / PAGE).read_text(encoding="utf-8")


def table(heading):
    """The rows of the table under a heading, without its head."""
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [row for row in rows(read(ROOT / PAGE, section))[1:] if set(row[0]) != {"-"}]


def spans(cell):
    return re.findall(r"`([^`]+)`", cell)


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
    assert said == INSTEAD
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


def test_endpoints_that_are_served_are_and_the_others_are_not():
    with served_llm() as llm:
        app = Service(llm, ServerSettings(("tiny",))).app
    routes = {route.path for route in app.routes}
    for first, here in table("Endpoints"):
        for path in spans(first):
            assert (path in routes) == here.startswith("served"), path
            assert here.startswith("served") or here.startswith("404")


def test_the_page_is_found_from_where_a_reader_comes_from():
    for name in ("README.md", "docs/index.md", "docs/server.md", "docs/command-line.md"):
        assert "vllm-comparison.md" in (ROOT / name).read_text(encoding="utf-8"), name
