"""Markdown pages of the repository, parsed: fenced blocks, code spans, headings and links."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from support.paths import ROOT

MANUAL = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]  # what users read
PROJECT = [  # what contributors read
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "support" / "README.md",
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / ".github").rglob("*.yml")),
]
PAGES = [*MANUAL, *PROJECT]
FENCE = re.compile(r"^( *)(```+)([\w-]*)\n(.*?)^\1\2[ ]*$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` counts from 1, `not_run` is the reason that the page gives."""

    line: int
    language: str
    text: str
    not_run: str | None


@dataclass(frozen=True)
class Page:
    path: Path
    text: str
    blocks: list[Block]

    @property
    def prose(self):
        """The page without its fenced blocks."""
        return FENCE.sub("", self.text)

    @property
    def spans(self):
        """Code spans of the prose."""
        return [span.strip() for span in re.findall(r"`([^`]+)`", self.prose.replace("\n", " "))]

    @property
    def anchors(self):
        headings = re.findall(r"^#+ +(.+?) *#*$", self.prose, re.M)
        return {slug(heading) for heading in headings}

    @property
    def links(self):
        """Targets of links and pictures, without those that are web addresses."""
        targets = re.findall(r"\]\(([^)\s]+)\)", self.prose)
        return [t for t in targets if not re.match(r"[a-z]+:", t)]


def slug(heading):
    """The anchor of a heading, as both MkDocs and code hosts write it."""
    plain = re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading)
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def read(path, text=None):
    text = path.read_text(encoding="utf-8") if text is None else text
    blocks = []
    for found in FENCE.finditer(text):
        reason = NOT_RUN.search(text[: found.start()])
        line = text[: found.start(4)].count("\n") + 1
        body = textwrap.dedent(found[4])
        blocks.append(Block(line, found[3], body, reason and reason[1]))
    return Page(path, text, blocks)


def commands(block):
    """Lines of a block that call `spectral-paged`: continued lines joined, comments cut."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    lines = [re.sub(r"\s#.*", "", line).strip().removeprefix("$ ") for line in text.splitlines()]
    return [line for line in lines if line.startswith("spectral-paged ")]


def rows(page):
    """Rows of a page's tables, cell by cell."""
    lines = [line.strip() for line in page.prose.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


BY_NAME = {str(path.relative_to(ROOT)): read(path) for path in PAGES}


def table(name, header):
    """Rows below the header of a table of the page of that name."""
    page = BY_NAME[name]
    parts = [replace(page, text=part) for part in page.text.split("\n\n")]
    [found] = [rows(part) for part in parts if rows(part)[:1] == [header]]
    return found[2:]
