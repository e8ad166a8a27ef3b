"""A strict reader of the head of a GGUF file: key/value pairs and tensor infos, never tensor data.

Long arrays (the vocabulary) are stepped over, not read: of the default model's 98 MB this looks at 1.8 and
builds no object for their 98,000 strings. Whatever a damaged or hostile file says, memory stays within a
small multiple of its head, and nothing but ModelError comes out.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stockpot.errors import ModelError, ModelNotFound
from stockpot.models.tensor_types import TENSOR_TYPES

VERSIONS = (2, 3)
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_EAGER_ELEMENTS = 4096
"""Longer arrays of numbers, and all arrays of strings, are left in the file."""
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, struct.Struct] = {
    number: struct.Struct("<" + code)
    for number, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """An array that was stepped over."""

    elements: int


Value = str | int | float | bool | tuple[int | float | bool, ...] | SkippedArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor; `shape` has the row length first, `size_bytes` is None for a type unknown here."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    size_bytes: int | None

    @property
    def elements(self) -> int:
        total = 1
        for length in self.shape:
            total *= length
        return total


@dataclass(frozen=True, slots=True)
class GgufHead:
    """What stands before the tensor data. `data_bytes` is from its start to the end of the file."""

    pairs: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_bytes: int
    file_bytes: int


def read_head(path: Path) -> GgufHead:
    """The head of the GGUF file `path`, its counts, types and sizes checked against the file's length.

    Raises ModelNotFound (no file) and ModelError (not GGUF, truncated, absurd numbers).
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(
                    f"{path} is not a GGUF file (it does not begin with 'GGUF'). Give a .gguf file; "
                    "weights in other formats must be converted first."
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).head()
    except FileNotFoundError as error:
        raise ModelNotFound(f"There is no model file {path}.") from error
    except OSError as error:
        raise ModelError(f"The model file {path} cannot be read: {error.strerror}.") from error


class _Reader:
    """A cursor over the mapped file. Invariant: `_at` never passes `_end`."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path = path
        self._content = content
        self._end = len(content)
        self._at = 4

    def head(self) -> GgufHead:
        version = self._number(_U32)
        if version not in VERSIONS:
            raise self._damaged(
                f"its version is {version}, known are {VERSIONS[0]} and {VERSIONS[1]} (little-endian)"
            )
        tensor_count = self._count(MAX_TENSORS, 24, "tensors")
        pair_count = self._count(MAX_PAIRS, 13, "key/value pairs")
        pairs: dict[str, Value] = {}
        for _ in range(pair_count):
            key = self._name("key")
            pairs[key] = self._value(self._number(_U32), key)
        alignment = pairs.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment}, which is no power of two")
        infos = [self._tensor() for _ in range(tensor_count)]
        data_start = min(self._at + -self._at % alignment, self._end)
        data_bytes = self._end - data_start
        for info, offset in infos:
            if offset + (info.size_bytes or 0) > data_bytes:
                end = data_start + offset + (info.size_bytes or 0)
                raise ModelError(
                    f"{self._path} is truncated: the tensor {info.name} ends at byte {end:,}, "
                    f"the file at {self._end:,}. Fetch it again."
                )
        return GgufHead(pairs, tuple(info for info, _ in infos), data_bytes, self._end)

    def _tensor(self) -> tuple[TensorInfo, int]:
        """A tensor info and the offset of its data."""
        name = self._name("tensor name")
        dimensions = self._number(_U32)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number(_U64) for _ in range(dimensions))
        type_number = self._number(_U32)
        offset = self._number(_U64)
        kind = TENSOR_TYPES.get(type_number)
        info = TensorInfo(name, shape, type_number, None)
        if kind is not None and (elements := info.elements):
            info = TensorInfo(name, shape, type_number, kind.size_bytes(shape[0], elements // shape[0]))
        return info, offset

    def _value(self, type_number: int, key: str) -> Value:
        if scalar := _SCALARS.get(type_number):
            return self._unpack(scalar)
        if type_number == _STRING:
            return self._take(self._length(MAX_STRING_BYTES, key)).decode(errors="replace")
        if type_number == _ARRAY:
            return self._array(key)
        raise self._damaged(f"the value of {key!r} has the unknown type {type_number}")

    def _array(self, key: str) -> Value:
        element_type = self._number(_U32)
        count = self._number(_U64)
        if element_type == _STRING:
            self._skip_strings(count, key)
            return SkippedArray(count)
        scalar = _SCALARS.get(element_type)
        if scalar is None:
            raise self._damaged(f"the array {key!r} has elements of the unsupported type {element_type}")
        size = scalar.size * count
        if size > self._end - self._at:
            raise self._damaged(f"the array {key!r} claims {count} elements, more than the file holds")
        if count > MAX_EAGER_ELEMENTS:
            self._at += size
            return SkippedArray(count)
        return tuple(self._unpack(scalar) for _ in range(count))

    def _skip_strings(self, count: int, key: str) -> None:
        """Step over `count` strings: the one loop that matters for speed."""
        at, end, content, unpack = self._at, self._end, self._content, _U64.unpack_from
        if count > (end - at) // 8:
            raise self._damaged(f"the array {key!r} claims {count} strings, more than the file holds")
        last = end - 8
        for _ in range(count):
            if at > last:
                raise self._damaged(f"the array {key!r} goes beyond the end")
            at += 8 + unpack(content, at)[0]
        if at > end:
            raise self._damaged(f"the array {key!r} goes beyond the end")
        self._at = at

    def _count(self, most: int, least_bytes: int, what: str) -> int:
        """A count of things of at least `least_bytes` each."""
        count = self._number(_U64)
        if count > most or count * least_bytes > self._end - self._at:
            raise self._damaged(f"it claims {count} {what}, more than it can hold")
        return count

    def _length(self, most: int, what: str) -> int:
        length = self._number(_U64)
        if length > most:
            raise self._damaged(f"the text {what!r} claims {length} bytes")
        return length

    def _name(self, what: str) -> str:
        data = self._take(self._length(MAX_KEY_BYTES, what))
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._damaged(f"a {what} is not UTF-8") from None

    def _number(self, kind: struct.Struct) -> int:
        return int.from_bytes(self._take(kind.size), "little")

    def _unpack(self, kind: struct.Struct) -> int | float | bool:
        value: int | float | bool = kind.unpack(self._take(kind.size))[0]
        return value

    def _take(self, size: int) -> bytes:
        start = self._at
        if size > self._end - start:
            raise self._damaged("it ends in the middle of its head")
        self._at = start + size
        return self._content[start : self._at]

    def _damaged(self, reason: str) -> ModelError:
        return ModelError(
            f"{self._path} is a damaged GGUF file or of a kind this version cannot read: {reason} "
            f"(byte {self._at:,}). Fetch it again."
        )
