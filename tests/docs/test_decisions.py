"""Decision records have one form, are all in the index, and exist if they are cited."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from support.decisions import (
    FOLDER,
    HEADINGS,
    INDEX,
    MAX_LINES,
    STATUSES,
    decisions,
    read,
    with_table,
)
from support.paths import ROOT

DECISIONS = decisions()
NUMBERS = {d.number for d in DECISIONS}
EACH = pytest.mark.parametrize("decision", DECISIONS, ids=[d.path.stem for d in DECISIONS])
CITING = {".md", ".py", ".yml", ".yaml", ".toml", ""}
NOT_OURS = {".venv", "build", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def faults(decision):
    """What a record lacks."""
    if decision.headings != HEADINGS:
        yield f"headings are {decision.headings}"
    if len(decision.text.splitlines()) > MAX_LINES:
        yield f"more than {MAX_LINES} lines"
    if not decision.status.startswith(STATUSES):
        yield f"status is {decision.status}"
    sections = re.split(r"^## .+$", decision.text, flags=re.M)[1:]
    if not all(section.strip() for section in sections):
        yield "an empty section"
    if not decision.path.name.startswith(f"{decision.number}-"):
        yield "another number than its file's"


@EACH
def test_a_record_is_whole_and_short(decision):
    assert list(faults(decision)) == []


def test_numbers_run_on_and_dates_do_not_run_back():
    assert [d.number for d in DECISIONS] == [f"{n:04}" for n in range(1, len(DECISIONS) + 1)]
    assert all(one.date <= two.date for one, two in pairwise(DECISIONS))


def test_the_index_is_that_of_the_files():
    """`python tests/support decisions` writes it."""
    page = INDEX.read_text(encoding="utf-8")
    assert page == with_table(page) and len(DECISIONS) >= 30
    assert {p.name for p in FOLDER.iterdir()} == {d.path.name for d in DECISIONS} | {"index.md"}


GOOD = "\n\n".join(
    [
        "# 0001. A title",
        "- Status: accepted\n- Date: 2026-01-01",
        *(f"## {h}\n\nx" for h in HEADINGS),
    ]
)


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("## Evidence", "## Proof"),
        GOOD.replace("## Evidence\n\nx", "## Evidence\n"),
        GOOD.replace("accepted", "fine"),
        GOOD.replace("0001", "0002"),
        GOOD + "\n" * 40 + "x",
    ],
)
def test_a_faulty_record_is_noticed(text):
    assert list(faults(read(FOLDER / "0001-a-title.md", text)))


@pytest.mark.parametrize("line", ["- Status: accepted\n", "- Date: 2026-01-01", "# 0001. "])
def test_a_record_without_its_head_is_noticed(line):
    assert list(faults(read(FOLDER / "0001-a-title.md", GOOD))) == []
    with pytest.raises(ValueError, match="0001-a-title"):
        read(FOLDER / "0001-a-title.md", GOOD.replace(line, ""))


def cited(text):
    """Numbers of the records that a text names."""
    plain = " ".join(re.sub(r"\n\s*(?:#:? )?", " ", text).split())
    found = re.findall(r"\bdecisions? (\d{4}(?:(?:, | and )\d{4})*)", plain)
    return {number for numbers in found for number in re.findall(r"\d{4}", numbers)}


def test_what_is_cited_exists():
    ours = [path for path in ROOT.iterdir() if path.name not in NOT_OURS]
    files = [path for path in ours if path.is_file()]
    files += [path for folder in ours if folder.is_dir() for path in folder.rglob("*")]
    named = {
        p: cited(p.read_text(encoding="utf-8")) for p in files if p.suffix in CITING and p.is_file()
    }
    del named[Path(__file__)]
    assert {str(p): numbers - NUMBERS for p, numbers in named.items() if numbers - NUMBERS} == {}
    assert len({number for numbers in named.values() for number in numbers}) >= 5


def test_citations_are_found():
    text = "see decision 0012, and decisions 0001, 0002 and\n# 9999; a decision of 2026, 1234"
    assert cited(text) == {"0012", "0001", "0002", "9999"}
