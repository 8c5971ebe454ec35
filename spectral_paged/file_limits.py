"""Limits on the bytes of input files, so that a wrong file is refused before it fills memory.

Links and `..` in paths that a user gives are followed. File names inside a file are checked by
`models.checkpoint_files`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from spectral_paged.errors import CorruptFileError

MAX_LINE_BYTES = 64 << 20  # a line of input; a million token ids are about 7 MB
MAX_RECORD_BYTES = 1 << 30  # a line of output; logprobs of 20 tokens a token are 1 KB a token
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 256 << 20
MAX_TOKENIZER_BYTES = 1 << 30
MAX_GGUF_METADATA_BYTES = 256 << 20  # mostly a vocabulary: 262,144 tokens and merges are 15 MB
MAX_GGUF_STRINGS = 1 << 21
MAX_CALIBRATION_BYTES = 16 << 30  # seven fp32 [layers, H, D, D]: 0.5 GB for 126 layers of 8 x 128
MAX_TEXT_BYTES = 1 << 30
MAX_METRICS_BYTES = 16 << 20  # a response of a metrics endpoint


def amount(num_bytes: int) -> str:
    """Format bytes as `64 MiB`, or as plain bytes below 1 MiB."""
    return f"{num_bytes >> 20:,} MiB" if num_bytes >> 20 else f"{num_bytes} bytes"


def check_file(path: Path, limit: int, what: str) -> None:
    """Refuse a path that is no regular file (links are followed) or has more than `limit` bytes.

    Args:
        what: the kind of file, for the message.

    Raises:
        CorruptFileError: the file is refused.
        OSError: there is no such file, or it may not be read.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise CorruptFileError(f"{path} is no regular file: name the file of {what}")
    if size > limit:
        raise CorruptFileError(
            f"{path} has {amount(size)}; {what} has at most {amount(limit)}: is it the right file?"
        )


def bounded_lines(file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield the number from 1 and the bytes of each line, line end included.

    A line of more than `limit` bytes is cut to `limit` + 1 bytes without a line end (see `is_cut`).
    """
    number = 0
    while raw := file.readline(limit + 1):
        number += 1
        rest = raw
        while len(rest) > limit and not rest.endswith(b"\n"):
            rest = file.readline(limit + 1)
        yield number, raw


def is_cut(raw: bytes, limit: int) -> bool:
    """True if `bounded_lines` cut this line."""
    return len(raw) > limit and not raw.endswith(b"\n")
