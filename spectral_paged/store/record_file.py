"""A record on disk: a header that says what it is, and its bytes with their checksum.

```
header   magic | version | checksum of the rest | identity | digest of the key | bytes | checksum
body     the record's bytes
```
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from torch import Tensor

from spectral_paged.store.folder import digest_of, start_of_name

MAGIC = b"SPKVPAGE"
CHUNK_BYTES = 4 << 20
VERSION = 2  # of this layout, and of what records hold
_START = struct.Struct("<8sIQ")  # magic, version, checksum of the rest
_REST = struct.Struct(
    "<32s32sQ16s"
)  # identity, digest of the key, bytes of the body, checksum of the body
HEADER_BYTES = _START.size + _REST.size


class BadRecordError(Exception):
    """A file that is no record, or not the one that is wanted; the message says why."""


def _checksum(pieces: Sequence[Tensor]) -> bytes:
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(_buffer(piece))
    return digest.digest()


def _buffer(piece: Tensor) -> Any:
    return piece.numpy().data


def header(identity: bytes, key: bytes, pieces: Sequence[Tensor]) -> bytes:
    """The header of a record whose body is `pieces`.

    Args:
        identity: 32 bytes that separate the records of other models and formats.
        key: of any length.
    """
    num_bytes = sum(len(piece) for piece in pieces)
    rest = _REST.pack(identity, digest_of(key), num_bytes, _checksum(pieces))
    return _START.pack(MAGIC, VERSION, xxhash.xxh3_64_intdigest(rest)) + rest


def write_body(file: BinaryIO, head: bytes, pieces: Sequence[Tensor]) -> None:
    """Write a record and have the system store it."""
    file.write(head)
    for piece in pieces:
        file.write(_buffer(piece))
    file.flush()
    os.fsync(file.fileno())


def read_head(file: BinaryIO) -> tuple[bytes, bytes, int, bytes]:
    """The identity, the key's digest, the bytes of the body and their checksum of an open file.

    Raises:
        BadRecordError: it is no record of this version, or is damaged.
    """
    head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise BadRecordError("it is truncated")
    magic, version, checksum = _START.unpack_from(head)
    if magic != MAGIC:
        raise BadRecordError("it is no record")
    if version != VERSION:
        raise BadRecordError(f"it has version {version}, and this is {VERSION}")
    rest = head[_START.size :]
    if xxhash.xxh3_64_intdigest(rest) != checksum:
        raise BadRecordError("its header is damaged")
    identity, digest, num_bytes, body = _REST.unpack(rest)
    if os.fstat(file.fileno()).st_size != HEADER_BYTES + num_bytes:
        raise BadRecordError("it is truncated")
    return identity, digest, num_bytes, body


def check_record(path: Path) -> None:
    """Read a record and compare its checksum.

    Raises:
        BadRecordError: it is damaged, truncated, no record, or has not the name of its key.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        identity, digest, _, checksum = read_head(file)
        if not path.name.startswith(start_of_name(identity, digest)):
            raise BadRecordError("it is another record")
        body = xxhash.xxh3_128()
        while part := file.read(CHUNK_BYTES):
            body.update(part)
    if body.digest() != checksum:
        raise BadRecordError("its bytes are damaged")


def read_record(path: Path, identity: bytes, key: bytes, pieces: Sequence[Tensor]) -> None:
    """Read a record's body into `pieces`.

    Raises:
        BadRecordError: the file is not this record, whole.
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        found_identity, digest, num_bytes, checksum = read_head(file)
        if (found_identity, digest) != (identity, digest_of(key)):
            raise BadRecordError("it is another record")
        if num_bytes != sum(len(piece) for piece in pieces):
            raise BadRecordError(f"it has {num_bytes} bytes")
        for piece in pieces:
            rest = _buffer(piece)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise BadRecordError("it is truncated")
                rest = rest[count:]
    if _checksum(pieces) != checksum:
        raise BadRecordError("its bytes are damaged")
