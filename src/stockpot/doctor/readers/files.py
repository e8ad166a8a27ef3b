"""Files of recorded requests, line by line: what a line is, it says itself."""

from __future__ import annotations

import gzip
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from stockpot.clock import Clock, SystemClock
from stockpot.doctor.exchange import Exchange
from stockpot.doctor.readers.body import Keys
from stockpot.doctor.readers.line import Line, exchange_of
from stockpot.doctor.readers.server_logs import exchange_of_log
from stockpot.doctor.readers.transcripts import Transcripts
from stockpot.errors import ConfigurationError

STDIN = "-"
_EXAMPLES = 20
_LINE_MAX_BYTES = 64 * 2**20
_YEAR_S = 365.2425 * 86_400


@dataclass(slots=True)
class ReadCounts:
    """What was read. `skipped` counts lines that hold no request, by why; `wrong` are the first of those that
    cannot be read, as `file:line: why`."""

    lines: int = 0
    requests: int = 0
    size_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter[str])
    wrong: list[str] = field(default_factory=list[str])


def read_files(
    paths: Iterable[str | Path], counts: ReadCounts, *, clock: Clock | None = None
) -> Iterator[Exchange]:
    """The requests of all files, in order; "-" is standard input, `.gz` is unpacked. Lines that hold none are
    counted and left out. Raises ConfigurationError for a file that cannot be read at all."""
    year = 1970 + int((clock or SystemClock()).wall() // _YEAR_S)
    for path in paths:
        name = str(path)
        try:
            with _opened(name) as lines:
                yield from _read(lines, "stdin" if name == STDIN else name, counts, year)
        except (OSError, EOFError) as error:
            raise ConfigurationError(f"{name} cannot be read: {error}; give a file of requests.") from error


def read_lines(
    lines: Iterable[bytes], name: str, counts: ReadCounts, *, year: int = 1970
) -> Iterator[Exchange]:
    """The same of lines that are at hand."""
    yield from _read(lines, name, counts, year)


def _needs_reading(line: bytes) -> bool:
    """Whether what is the same to a model may be written in two ways: with marks of boundaries or without,
    with escapes or without."""
    return not line.isascii() or b"\\u" in line or b"_control" in line


def _opened(name: str) -> IO[bytes] | gzip.GzipFile:
    if name == STDIN:
        return sys.stdin.buffer
    return gzip.open(name, "rb") if name.endswith(".gz") else Path(name).open("rb", buffering=2**20)


def _read(lines: Iterable[bytes], name: str, counts: ReadCounts, year: int) -> Iterator[Exchange]:
    decoder, transcripts, keys = msgspec.json.Decoder(Line), Transcripts(), Keys()
    for number, line in enumerate(lines, 1):
        counts.lines += 1
        counts.size_bytes += len(line)
        start = line.lstrip()[:1]
        if not start:
            continue
        try:
            if len(line) > _LINE_MAX_BYTES:
                raise ValueError(f"the line has {len(line)} bytes, at most {_LINE_MAX_BYTES} are read")
            if start != b"{":
                found = exchange_of_log(line, name, number, year)
                if found is None:
                    counts.skipped["no request in it"] += 1
                    continue
            else:
                read = decoder.decode(line)
                made = transcripts.read(read, name, number, len(line))
                if made is not None:
                    for each in made:
                        counts.requests += 1
                        yield each
                    continue
                found = exchange_of(read, name, number, len(line), keys=keys, marked=_needs_reading(line))
                if found is None:
                    counts.skipped["no prompt in it"] += 1
                    continue
        except (msgspec.MsgspecError, ValueError, SyntaxError, RecursionError) as error:
            counts.skipped["not readable"] += 1
            if len(counts.wrong) < _EXAMPLES:
                counts.wrong.append(f"{name}:{number}: {str(error)[:200]}")
            continue
        counts.requests += 1
        yield found
