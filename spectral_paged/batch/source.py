"""A batch input is JSONL in UTF-8; other kinds and encodings are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from spectral_paged.errors import InvalidRequestError
from spectral_paged.file_limits import MAX_LINE_BYTES, bounded_lines, is_cut

UTF8_MARK = b"\xef\xbb\xbf"
RECODE = "iconv -f {0} -t UTF-8 in > out; in PowerShell: Out-File -Encoding utf8"
# first bytes -> (what it is, how to make JSONL of it)
OTHERS = {
    # one mark of UTF-32 begins as UTF-16's
    b"\xff\xfe\0\0": ("UTF-32", RECODE.format("UTF-32")),
    b"\0\0\xfe\xff": ("UTF-32", RECODE.format("UTF-32")),
    b"\xff\xfe": ("UTF-16", RECODE.format("UTF-16")),
    b"\xfe\xff": ("UTF-16", RECODE.format("UTF-16")),
    b"\x1f\x8b": ("gzip", "gunzip it"),
    b"PK\x03\x04": ("a zip archive", "unzip it"),
    b"BZh": ("bzip2", "bunzip2 it"),
    b"\xfd7zXZ": ("xz", "unxz it"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd it"),
    b"PAR1": ("Parquet", "pandas.read_parquet(path).to_json(out, orient='records', lines=True)"),
    b"ARROW1": ("Arrow", "pandas.read_feather(path).to_json(out, orient='records', lines=True)"),
    b"%PDF": ("a PDF", "write its text as prompts"),
}
SAMPLE = 20  # lines at the beginning, of which one has to be an object or a string of JSON


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number from 1 and the UTF-8 bytes of each line that is not blank, stripped."""
    with path.open("rb") as file:
        if file.peek(3).startswith(UTF8_MARK):
            file.seek(len(UTF8_MARK))
        for number, raw in bounded_lines(file, MAX_LINE_BYTES):
            if raw.strip():
                yield number, raw if is_cut(raw, MAX_LINE_BYTES) else raw.strip()


def check_source(path: Path) -> None:
    """Refuse an input that is no JSONL, with what it is and how to convert it.

    Raises:
        InvalidRequestError: it is of another kind or encoding, or has no line.
    """
    with path.open("rb") as file:
        head = file.read(8)
    for magic, (kind, remedy) in OTHERS.items():
        if head.startswith(magic):
            raise _refused(path, f"it is {kind}", remedy)
    lines = [raw for _, raw in islice(raw_lines(path), SAMPLE)]
    if not lines:
        raise _refused(path, "it has no line", "write a prompt as one JSON object a line")
    first, single = lines[0], len(lines) == 1
    if b"\0" in first[:64]:
        raise _refused(path, "it is UTF-16 without its mark, or no text", "save it as UTF-8")
    if first.startswith(b"[") and (single or not _is_json(first)):
        raise _refused(path, "it is a JSON array", "jq -c '.[]' in.json > in.jsonl")
    if first == b"{":
        raise _refused(path, "its objects go over several lines", "jq -c . in.json > in.jsonl")
    # a quoted cell of CSV is a JSON string too, but the header above it is none
    strings = _is_json(first) and any(raw.startswith(b'"') and _is_json(raw) for raw in lines)
    if not strings and not any(raw.startswith(b"{") and _is_json(raw) for raw in lines):
        begins = first[:60].decode(errors="replace")
        raise _refused(
            path,
            f"no line at its beginning is a JSON object, the first is {begins!r}",
            "write a prompt as one JSON object a line; of CSV: pandas.read_csv(path).to_json(out, "
            "orient='records', lines=True)",
        )


def _is_json(raw: bytes) -> bool:
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return True


def _refused(path: Path, what: str, remedy: str) -> InvalidRequestError:
    return InvalidRequestError(f"{path} is no JSONL in UTF-8: {what}. To convert it: {remedy}")
