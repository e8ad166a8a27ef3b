"""Large files are read in a process of its own, so that cutting JSON and comparing prompts go on at once."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from stockpot.doctor.exchange import Exchange
from stockpot.doctor.readers.files import STDIN, ReadCounts, read_files
from stockpot.errors import ConfigurationError
from stockpot.models.machine import usable_processors

_LARGE_BYTES = 64 * 2**20
_AT_ONCE = 256


class _End(msgspec.Struct):
    """The last message: what was counted; `failed`: why it is the last."""

    lines: int
    requests: int
    size_bytes: int
    skipped: dict[str, int]
    wrong: list[str]
    failed: str = ""


def read_ahead(paths: Sequence[str], counts: ReadCounts) -> Generator[Exchange]:
    """As `read_files`; large files, where there are two processors, in another process. At most some hundred
    requests are read ahead. Raises ConfigurationError."""
    if not _is_worth_it(paths):
        yield from read_files(paths, counts)
        return
    context = multiprocessing.get_context("spawn")  # a fork would take threads and their locks along
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_read, args=(list(paths), sender), daemon=True)
    process.start()
    sender.close()
    batch, end = msgspec.msgpack.Decoder(list[Exchange]), msgspec.msgpack.Decoder(_End)
    try:
        while True:
            data = receiver.recv_bytes()
            if data[:1] != b"b":
                _take(end.decode(data[1:]), counts)
                return
            yield from batch.decode(memoryview(data)[1:])
    except EOFError as error:
        raise ConfigurationError(
            f"The process that reads {', '.join(paths)[:200]} has ended before it was done; is there memory"
            " enough?"
        ) from error
    finally:
        receiver.close()
        process.terminate()
        process.join()


def _is_worth_it(paths: Sequence[str]) -> bool:
    if STDIN in paths or usable_processors() < 2:
        return False
    with suppress(OSError):  # it is told when it is read
        return sum(Path(path).stat().st_size for path in paths) >= _LARGE_BYTES
    return False


def _take(end: _End, counts: ReadCounts) -> None:
    counts.lines, counts.requests, counts.size_bytes = end.lines, end.requests, end.size_bytes
    counts.skipped = Counter(end.skipped)
    counts.wrong = end.wrong
    if end.failed:
        raise ConfigurationError(end.failed)


def _read(paths: list[str], sender: Connection) -> None:
    """In the other process."""
    counts, encoder, failed = ReadCounts(), msgspec.msgpack.Encoder(), ""
    batch: list[Exchange] = []
    try:
        for exchange in read_files(paths, counts):
            batch.append(exchange)
            if len(batch) == _AT_ONCE:
                sender.send_bytes(b"b" + encoder.encode(batch))
                batch.clear()
    except ConfigurationError as error:
        failed = str(error)
    except (BrokenPipeError, KeyboardInterrupt):
        return  # nobody listens any more
    sender.send_bytes(b"b" + encoder.encode(batch))
    end = _End(counts.lines, counts.requests, counts.size_bytes, dict(counts.skipped), counts.wrong, failed)
    sender.send_bytes(b"e" + encoder.encode(end))
