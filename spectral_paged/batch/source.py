"""A batch input is JSONL, plain or gzipped, in UTF-8 or UTF-16; other kinds are refused."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from spectral_paged.errors import CorruptFileError, InvalidRequestError
from spectral_paged.file_limits import MAX_LINE_BYTES, bounded_lines, is_cut

GZIP = b"\x1f\x8b"
# byte order marks; those of UTF-32 first, for one begins as UTF-16's
BOMS = {
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
# first bytes -> (what it is, how to make JSONL of it)
OTHERS = {
    b"PK\x03\x04": ("a zip archive", "unzip it"),
    b"BZh": ("bzip2", "bunzip2 it, or compress it with gzip"),
    b"\xfd7zXZ": ("xz", "unxz it, or compress it with gzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd it, or compress it with gzip"),
    b"PAR1": ("Parquet", "pandas.read_parquet(path).to_json(out, orient='records', lines=True)"),
    b"ARROW1": ("Arrow", "pandas.read_feather(path).to_json(out, orient='records', lines=True)"),
    b"%PDF": ("a PDF", "write its text as prompts"),
}
SAMPLE = 20  # lines at the beginning, of which one has to be JSON


class _Recoded:
    """The lines of a text file as UTF-8; `readline` counts characters."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text

    def readline(self, size: int) -> bytes:
        return self._text.readline(size).encode(errors="surrogatepass")


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number from 1 and the UTF-8 bytes of each line that is not blank, stripped.

    Raises:
        CorruptFileError: the archive or the encoding is damaged.
    """
    try:
        with path.open("rb") as plain:
            file: Any = plain
            if plain.peek(2).startswith(GZIP):
                file = gzip.GzipFile(fileobj=plain)
            head, lines = file.peek(4), file
            for bom, encoding in BOMS.items():
                if head.startswith(bom):
                    text = io.TextIOWrapper(file, encoding=encoding, newline="\n")
                    lines = _Recoded(text)
                    break
            for number, raw in bounded_lines(lines, MAX_LINE_BYTES):
                if raw.strip():
                    yield number, raw if is_cut(raw, MAX_LINE_BYTES) else raw.strip()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeError) as error:
        raise CorruptFileError(f"{path} is damaged ({error}): make it again") from error


def check_source(path: Path) -> None:
    """Refuse an input that is no JSONL, with what it is and how to convert it.

    Raises:
        InvalidRequestError: it is of another kind, or has no line.
        CorruptFileError: the archive or the encoding is damaged.
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
    if not any(_is_json(raw) for raw in lines):
        begins = first[:60].decode(errors="replace")
        raise _refused(
            path,
            f"no line at its beginning is JSON, the first is {begins!r}",
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
    return InvalidRequestError(
        f"{path} is no JSONL in UTF-8 or UTF-16, plain or gzipped: {what}. To convert it: {remedy}"
    )
