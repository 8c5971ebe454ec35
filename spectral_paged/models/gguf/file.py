"""Reading of the GGUF container, its metadata and tensors, with a limit for every number in it.

```
'GGUF' | version u32 | tensors u64 | keys u64 | key, type, value ... | name, shape, type, offset ...
       | padding to the alignment | tensor data, each tensor at a multiple of the alignment
```
Arrays of numbers are views of the mapped file. gguf's own reader makes an object of every element,
so that a megabyte of metadata takes minutes.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spectral_paged.errors import CorruptFileError, UnsupportedModelError
from spectral_paged.file_limits import MAX_GGUF_METADATA_BYTES, MAX_GGUF_STRINGS, amount

VERSIONS = (2, 3)
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
NUMBERS = {  # value type -> numpy's name of it
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's shape in PyTorch's order, its GGML type, and its place in the file in bytes."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    start: int
    num_bytes: int


class GGUFFile:
    """A GGUF file: its metadata as Python values, and its tensors, which are read on demand.

    Attributes:
        metadata: strings, numbers, booleans, lists of strings and numpy vectors, by key.
        tensors: by name, in the order of the file.

    Raises:
        CorruptFileError: the file is not GGUF, is damaged, ends early, or has more metadata than
            any model.
        UnsupportedModelError: this version does not know a tensor's type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _mapped(path)
        cursor = _Cursor(path, self._data)
        try:
            num_tensors, num_keys = self._read_head(cursor)
            self.metadata = _read_metadata(cursor, num_keys)
            self.tensors = _read_tensors(cursor, num_tensors, self._alignment())
        except (struct.error, UnicodeDecodeError, OverflowError) as error:
            raise CorruptFileError(
                f"{path} ({len(self._data)} bytes) ends before its last tensor or is damaged "
                f"({error}): fetch it again"
            ) from error

    def _read_head(self, cursor: _Cursor) -> tuple[int, int]:
        if bytes(self._data[:4]) != b"GGUF" or len(self._data) < 24:
            raise CorruptFileError(
                f"{self.path} is not a GGUF file (it does not start with 'GGUF'): fetch it again"
            )
        cursor.skip(4)
        version, num_tensors, num_keys = cursor.unpack("<IQQ")
        if version not in VERSIONS:
            turned = " of another byte order" if version & 0xFFFF == 0 else ""
            raise CorruptFileError(
                f"{self.path} has GGUF version {version}{turned}; versions 2 and 3 are read: "
                "convert it to one"
            )
        for what, found, limit in (
            ("tensors", num_tensors, MAX_TENSORS),
            ("keys", num_keys, MAX_KEYS),
        ):
            if found > limit:
                raise CorruptFileError(
                    f"{self.path} says that it has {found} {what}; at most {limit} are read: fetch "
                    "it again"
                )
        return num_tensors, num_keys

    def _alignment(self) -> int:
        found = self.metadata.get("general.alignment", 32)
        if not isinstance(found, int) or found < 8 or found & (found - 1):
            raise CorruptFileError(
                f"{self.path}: general.alignment {found!r} is no power of two from 8 on: fetch it "
                "again"
            )
        return found

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Read a tensor, dequantized to fp32.

        Raises:
            UnsupportedModelError: gguf cannot dequantize the tensor's type.
        """
        from gguf import GGMLQuantizationType, dequantize  # imports slowly

        info = self.tensors[name]
        kind = GGMLQuantizationType(info.type_id)
        raw = self._data[info.start : info.start + info.num_bytes]
        try:
            if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
                values = raw.view("<f4" if kind is GGMLQuantizationType.F32 else "<f2")
            else:
                values = dequantize(raw.reshape(*info.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} has type {kind.name}, which cannot be read: take a "
                "file of another quantization, such as Q8_0 or Q4_K_M"
            ) from error
        return np.asarray(values, dtype=np.float32).reshape(info.shape)


class _Cursor:
    """A reading place in the mapped bytes, with a count of the strings read."""

    def __init__(self, path: Path, data: np.ndarray[Any, Any]) -> None:
        self.path, self.at, self.strings = path, 0, 0
        self._data = data
        self._bytes = data.data  # a memoryview: slices of it copy nothing

    def skip(self, num_bytes: int) -> None:
        self.at += num_bytes

    def unpack(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self._bytes, self.at)
        self.at += struct.calcsize(form)
        return found

    def string(self) -> str:
        self.strings += 1
        (length,) = self.unpack("<Q")
        start, self.at = self.at, self.at + length
        self.check()
        return str(self._bytes[start : self.at], "utf-8")

    def check(self) -> None:
        """Refuse metadata that goes past the file's end, or beyond that of any model."""
        if self.at > len(self._bytes):
            raise struct.error(f"{self.at} bytes are needed")
        if self.at > MAX_GGUF_METADATA_BYTES or self.strings > MAX_GGUF_STRINGS:
            raise CorruptFileError(
                f"{self.path} has more metadata than {amount(MAX_GGUF_METADATA_BYTES)} or "
                f"{MAX_GGUF_STRINGS} strings: is it the right file?"
            )

    def numbers(self, type_id: int, count: int) -> np.ndarray[Any, Any]:
        kind = np.dtype(NUMBERS[type_id])
        start, self.at = self.at, self.at + count * kind.itemsize
        self.check()
        return self._data[start : self.at].view(kind)


def _mapped(path: Path) -> np.ndarray[Any, Any]:
    """The file's bytes as a memory map, which reads only pages that are accessed."""
    if path.stat().st_size == 0:  # nothing to map
        return np.empty(0, dtype=np.uint8)
    return np.memmap(path, dtype=np.uint8, mode="r")


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in found:
            raise CorruptFileError(
                f"{cursor.path} has the key {key[:200]!r} twice: fetch it again, or take the model "
                "from somebody else"
            )
        (type_id,) = cursor.unpack("<I")
        found[key] = _read_value(cursor, key, type_id)
    return found


def _read_value(cursor: _Cursor, key: str, type_id: int) -> Any:
    if type_id == STRING:
        return cursor.string()
    if type_id in NUMBERS:
        value = cursor.numbers(type_id, 1)
        if type_id == 6:  # the shortest decimal of the same fp32: 1e-05, not 9.99999974e-06
            return float(str(value[0]))
        return value[0].item()
    element, count = cursor.unpack("<IQ") if type_id == ARRAY else (type_id, 0)
    if element in NUMBERS:
        return cursor.numbers(element, count)
    if element == STRING:
        if count > MAX_GGUF_STRINGS:
            raise CorruptFileError(
                f"{cursor.path}: {key[:200]} has {count} strings; at most {MAX_GGUF_STRINGS} are "
                "read: is it the right file?"
            )
        return [cursor.string() for _ in range(count)]
    raise CorruptFileError(
        f"{cursor.path}: {key[:200]} holds values of type {element}, which no version of GGUF has "
        "there: fetch it again"
    )


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # imports slowly

    path, heads = cursor.path, []
    for _ in range(num_tensors):
        name = cursor.string()
        (dimensions,) = cursor.unpack("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise CorruptFileError(
                f"{path}: tensor {name[:200]} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} "
                "are read: fetch it again"
            )
        shape = cursor.unpack(f"<{dimensions}Q")[::-1]
        heads.append((name, shape, *cursor.unpack("<IQ")))
    begin = -(-cursor.at // alignment) * alignment
    found: dict[str, TensorInfo] = {}
    for name, shape, type_id, offset in heads:
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
        except (KeyError, ValueError):
            raise UnsupportedModelError(
                f"{path}: tensor {name[:200]} has type {type_id}, which this version does not "
                "know: take a file of another quantization, such as Q8_0 or Q4_K_M"
            ) from None
        info = TensorInfo(
            name, shape, type_id, begin + offset, math.prod(shape) // block * block_bytes
        )
        if name in found or shape[-1] % block or offset % alignment or not math.prod(shape):
            raise CorruptFileError(
                f"{path}: tensor {name[:200]} comes twice, or its shape {list(shape)} or place "
                f"{offset} is not one of its type: fetch it again"
            )
        if info.start + info.num_bytes > len(cursor._bytes):
            raise struct.error(f"tensor {name[:200]} needs {info.start + info.num_bytes} bytes")
        found[name] = info
    return found
