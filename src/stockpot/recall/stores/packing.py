"""Entries, evidence and invalidations as bytes, which a newer or older version can read where it fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import msgspec

from stockpot.recall.entry import Entry, Selector
from stockpot.recall.evidence.evidence import Observation

_Packed = TypeVar("_Packed")


class NotPackable(ValueError):
    """Values that have no such bytes: text that is no Unicode (half a surrogate pair), unknown types."""


@dataclass(frozen=True, slots=True)
class Invalidation:
    """What a process has removed, for the others. `origin` is that process's own word for itself."""

    origin: str
    selector: Selector


def pack_entry(entry: Entry) -> bytes:
    """All but its answer, which is kept beside it. Raises NotPackable."""
    return _pack(replace(entry, answer=b""))


def unpack_entry(packed: bytes, answer: bytes = b"") -> Entry | None:
    """None: it does not fit this version."""
    entry = _unpack(packed, Entry)
    return entry if entry is None or not answer else replace(entry, answer=answer)


def pack_observation(observation: Observation) -> bytes:
    """Raises NotPackable."""
    return _pack(observation)


def unpack_observation(packed: bytes) -> Observation | None:
    """None: it does not fit this version."""
    return _unpack(packed, Observation)


def pack_invalidation(invalidation: Invalidation) -> bytes:
    """Raises NotPackable."""
    return _pack(invalidation)


def unpack_invalidation(packed: bytes) -> Invalidation:
    """One that does not fit is taken for the widest: better too much is removed."""
    return _unpack(packed, Invalidation) or Invalidation("", Selector(everything=True))


def _pack(value: object) -> bytes:
    try:
        return msgspec.msgpack.encode(value, enc_hook=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise NotPackable(f"It cannot be written down ({error}).") from error


@runtime_checkable
class _Scalar(Protocol):
    def item(self) -> object: ...


def _plain(value: object) -> object:
    """Numbers of numpy, which arithmetic with vectors leaves behind."""
    if isinstance(value, _Scalar):
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} has no bytes here")


def _unpack(packed: bytes, kind: type[_Packed]) -> _Packed | None:
    try:
        value: _Packed = msgspec.msgpack.decode(packed, type=kind)
    except (msgspec.MsgspecError, ValueError):
        return None
    return value
