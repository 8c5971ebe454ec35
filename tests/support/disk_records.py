"""Small records in a folder: written, read, damaged and counted."""

from __future__ import annotations

import torch

from spectral_paged.store.folder import name_of
from spectral_paged.store.record_file import HEADER_BYTES

IDENTITY = bytes(range(32))
FRAME, NUM_BYTES = 1024, 3000
SIZE = HEADER_BYTES + NUM_BYTES


def body(seed):
    g = torch.Generator().manual_seed(seed)
    return [x.clone() for x in torch.randint(256, (NUM_BYTES,), generator=g).byte().split(FRAME)]


def write(tier, key, parent=None, seed=None):
    done = object()
    written = tier.write(key, parent, body(key[0] if seed is None else seed), done)
    tier.flush()
    return written and done in tier.take_written()


def read(tier, key, parent=None):
    """The bytes of a record, or None where it is a miss."""
    pieces = [torch.zeros_like(x) for x in body(0)]
    copy = tier.read(key, parent, pieces)
    copy.wait()
    assert copy.is_done
    return None if copy.failed else torch.cat(pieces)


def path_of(tier, key, parent=None):
    return tier._folder.path / name_of(IDENTITY, key, parent)


def spoil(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[:-1]
    elif how == "no header":
        data = data[: HEADER_BYTES - 1]
    elif how == "longer":
        data += b"\0"
    elif how == "foreign":
        data[:8] = b"\x7fELFELF\0"
    elif how == "older":
        data[8:12] = (0).to_bytes(4, "little")
    elif how == "another":
        data = bytearray(path.with_name(name_of(IDENTITY, b"b", None)).read_bytes())
    elif how == "empty":
        data = bytearray(HEADER_BYTES + 1)
    path.write_bytes(data)


def total(tier):
    return sum(f.stat().st_size for f in tier._folder.path.iterdir() if f.suffix == ".page")
