"""How large the files that are read may be, so that a wrong one is refused before it fills memory.

Paths that a user names are the user's own: links and `..` are followed. Names that stand inside a
file are not (see `models.checkpoint_files`).
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
MAX_CALIBRATION_BYTES = 16 << 30  # seven fp32 [layers, H, D, D]: 0.5 GB for 126 layers of 8 x 128
MAX_TEXT_BYTES = 1 << 30
MAX_METRICS_BYTES = 16 << 20  # an answer of a metrics endpoint


def amount(num_bytes: int) -> str:
    """`64 MiB`, or plain bytes where it is less than one."""
    return f"{num_bytes >> 20:,} MiB" if num_bytes >> 20 else f"{num_bytes} bytes"


def check_file(path: Path, limit: int, what: str) -> None:
    """Refuse what is no regular file (links are followed) or larger than `limit` bytes.

    Raises:
        CorruptFileError: says which; `what` names what the file should be.
        OSError: there is no such file, or it may not be looked at.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise CorruptFileError(f"{path} is no regular file: name the file of {what}")
    if size > limit:
        raise CorruptFileError(
            f"{path} has {amount(size)}; {what} has at most {amount(limit)}: is it the right file?"
        )


def bounded_lines(file: IO[bytes], limit: int) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes) of each line. One of more than `limit` bytes comes cut to `limit` + 1
    without an end (`is_cut` tells), and the rest of it is skipped."""
    number = 0
    while raw := file.readline(limit + 1):
        number += 1
        rest = raw
        while len(rest) > limit and not rest.endswith(b"\n"):
            rest = file.readline(limit + 1)
        yield number, raw


def is_cut(raw: bytes, limit: int) -> bool:
    """Whether `bounded_lines` left out an end of this line."""
    return len(raw) > limit and not raw.endswith(b"\n")
