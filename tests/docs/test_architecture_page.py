"""docs/architecture.md says what the code does: its floors, its walks and every name in it."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable

import pytest

from spectral_paged import SamplingParams
from support.paths import ROOT
from support.tiny_model import random_prompts, tiny_llm

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOP = re.compile(r"`([\w/]+\.py):([\w.]+)`")
FILE = re.compile(r"`([\w/]+\.(?:py|json)|[\w/]+/)`")
SOURCES = ("kernels", "scheduler", "benchmarks", "spectral_paged")
# What a decode step on a CPU walks through at most, the torch references of kernels among it. A new
# file on that way has to be worth the hop.
MOST_FILES, MOST_FUNCTIONS = 39, 170


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def stops(text: str) -> list[tuple[str, str]]:
    return STOP.findall(text)


# ---- names -------------------------------------------------------------------------------


@functools.cache
def defined(path: str) -> set[str]:
    """Qualified names of a source's functions and methods."""
    found = set()

    def walk(node: ast.AST, inside: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                found.add(f"{inside}{child.name}")
                walk(child, f"{inside}{child.name}.")

    walk(ast.parse((ROOT / path).read_text(encoding="utf-8")), "")
    return found


@pytest.mark.parametrize("path, name", sorted(set(stops(PAGE))), ids=lambda x: x)
def test_every_stop_is_a_function_of_its_file(path, name):
    assert name in defined(path)


def test_every_file_is_there():
    assert [name for name in FILE.findall(PAGE) if not (ROOT / name).exists()] == []


# ---- floors ------------------------------------------------------------------------------


def floors() -> dict[str, int]:
    """The floor of each package and root module, from the imports of all files."""
    known: dict[str, set[str]] = {}
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.py"):
            inner = path.relative_to(ROOT).with_suffix("").parts
            part = inner[1] if source == "spectral_paged" else source
            if part == "__init__":
                continue
            uses = known.setdefault(part, set())
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    top, _, rest = node.module.partition(".")
                    if top == "spectral_paged":
                        uses |= {rest.split(".")[0]} if rest else {a.name for a in node.names}
    known = {part: {use for use in uses if use in known} - {part} for part, uses in known.items()}

    @functools.cache
    def floor(part: str) -> int:
        return 1 + max((floor(use) for use in known[part]), default=0)

    return {part: floor(part) for part in known}


def test_the_picture_of_the_floors_is_that_of_the_imports():
    drawn = {}
    for line in section("The floors").split("```")[1].strip().splitlines():
        number, *names = line.split()
        drawn |= dict.fromkeys(names, int(number))
    assert drawn == floors()


def test_every_package_has_a_line():
    table = section("The floors").split("| --- |")[1]
    named = set(
        re.findall(
            r"`(\w+)`",
            "".join(line.split("|")[1] for line in table.splitlines()[1:] if "|" in line),
        )
    )
    packages = {part for part in floors() if not (ROOT / "spectral_paged" / f"{part}.py").exists()}
    assert packages - {"data"} <= named


# ---- walks -------------------------------------------------------------------------------


def trace(run: Callable[[], object]) -> list[tuple[str, str]]:
    """The package's functions in the order in which `run` first calls them."""
    found: dict[tuple[str, str], None] = {}
    root = f"{ROOT}/"

    def note(frame: object, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename.startswith(root):
                path = code.co_filename.removeprefix(root)
                if path.split("/")[0] in SOURCES:
                    found[path, code.co_qualname] = None

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(found)


def in_order(wanted: list[tuple[str, str]], traced: list[tuple[str, str]]) -> None:
    assert [stop for stop in wanted if stop not in traced] == [], "never called"
    places = [traced.index(stop) for stop in wanted]
    assert places == sorted(places), [
        wanted[i] for i in range(1, len(places)) if places[i] < places[i - 1]
    ]


def generate_and_step():
    """What a prompt's way to its first pages calls, and what a later decode step alone calls."""
    llm = tiny_llm()
    engine, params = llm.engine, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)

    def run() -> None:
        for i, prompt in enumerate(random_prompts([1300, 650, 40])):
            engine.add_request(str(i), prompt, params)
        for _ in range(12):
            engine.step()

    whole = trace(run)
    sealed = llm.stats()["pages_sealed"]
    step = trace(engine.step)
    assert sealed == llm.stats()["pages_sealed"] > 0, "a step that seals nothing"
    return whole, step


@pytest.fixture(scope="module")
def traced():
    return generate_and_step()


def test_a_token_passes_its_stops_in_this_order(traced):
    numbered = re.split(r"\n(?=\d+\. )", section("The life of one token's K"))[1:]
    assert len(numbered) == 12
    host = [stop for item in numbered for stop in stops(item.split("On a GPU")[0])]
    in_order(host, traced[0])


def test_a_decode_step_calls_its_host_column_in_this_order(traced):
    rows = [
        line.split("|")
        for line in section("One decode step").splitlines()
        if line[:3] == "| 1" or re.match(r"\| \d", line)
    ]
    host = [stop for row in rows for stop in stops(row[2].split("on a GPU")[0])]
    assert len(rows) == 11 and len(host) >= 11
    in_order(host, traced[1])


def test_a_decode_step_walks_through_few_files(traced):
    assert len({path for path, _ in traced[1]}) <= MOST_FILES
    assert len(traced[1]) <= MOST_FUNCTIONS
