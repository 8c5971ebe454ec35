"""Decision records, read from their files, and their index.

`python tests/support decisions` writes the table of `docs/decisions/index.md` anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT

FOLDER = ROOT / "docs" / "decisions"
INDEX = FOLDER / "index.md"
HEADINGS = ["Context", "Decision", "Evidence", "What would reverse it"]
STATUSES = ("accepted", "rejected", "deferred", "superseded by decision ")
MAX_LINES = 40
HEAD = re.compile(
    r"# (?P<number>\d{4})\. (?P<title>.+)\n\n"
    r"- Status: (?P<status>.+)\n- Date: (?P<date>\d{4}-\d\d-\d\d)\n"
)


@dataclass(frozen=True)
class Decision:
    """A record: `status` starts with one of STATUSES, `date` is that of the decision."""

    path: Path
    number: str
    title: str
    status: str
    date: str
    text: str

    @property
    def headings(self) -> list[str]:
        return re.findall(r"^## (.+)$", self.text, re.M)

    @property
    def row(self) -> str:
        """The record's line in the index."""
        return f"| {self.number} | [{self.title}]({self.path.name}) | {self.status} | {self.date} |"


def read(path: Path, text: str | None = None) -> Decision:
    """Read a record; raises ValueError if its head has not the form of one."""
    text = path.read_text(encoding="utf-8") if text is None else text
    if not (head := HEAD.match(text)):
        raise ValueError(f"{path.name}: no number and title, status and date as the others have")
    return Decision(path, **head.groupdict(), text=text)


def decisions() -> list[Decision]:
    return [read(path) for path in sorted(FOLDER.glob("[0-9]*.md"))]


def with_table(page: str) -> str:
    """The index page with the rows of all records below its table's header."""
    above = page.split("| --- |")[0]
    return f"{above}| --- | --- | --- | --- |\n" + "".join(f"{d.row}\n" for d in decisions())


def main() -> None:
    INDEX.write_text(with_table(INDEX.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
