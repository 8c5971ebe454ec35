"""The report of `bench quality`: Markdown and pictures from a results value."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectral_paged.benchmarks.quality.sections import SECTIONS
from spectral_paged.benchmarks.quality.tables import Results, Section


def sections(results: Results) -> list[Section]:
    """The sections that `results` have data for, in order."""
    found: list[Section] = []
    for build in SECTIONS:
        made = build(results)
        found += made if isinstance(made, list) else [made] if made is not None else []
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_report(results: Results, path: Path) -> list[Path]:
    """Write Markdown to `path` and pictures beside it; returns all files written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, files = [f"# Quality: {results.get('model', 'unnamed model')}"], [path]
    if environment := results.get("environment"):
        parts.append(", ".join(f"{k} {v}" for k, v in environment.items()))
    for section in sections(results):
        parts += [f"## {section.title}", section.text]
        if section.rows:
            parts.append(table(section.columns, section.rows))
        if section.plot is not None:
            slug = section.title.lower().replace(" ", "-")
            picture = path.with_name(f"{path.stem}-{slug}.png")
            section.plot(picture)
            files.append(picture)
            parts.append(f"![{section.title}]({picture.name})")
    if texts := results.get("texts"):
        rows = [[t["genre"], t["name"], str(t["chars"]), t["sha256"][:16]] for t in texts]
        parts += ["## Texts", table(["genre", "text", "characters", "sha256"], rows)]
    parts += [f"- {note}" for note in results.get("notes") or []]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return files
