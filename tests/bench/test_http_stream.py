"""The HTTP reader: whatever way the bytes are cut, the content is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.bench.http_stream import BodyDecoder, EventSplitter, fetch
from stockpot.bench.server import free_port
from stockpot.errors import ServerUnreachable

pytestmark = pytest.mark.anyio


@st.composite
def _cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    ends = [*places, len(data)]
    return [data[a:b] for a, b in zip([0, *places], ends, strict=True)]


@given(st.data(), st.lists(st.binary(min_size=1, max_size=40), max_size=6))
def test_chunks_come_out_whole_however_they_arrive(data: st.DataObject, chunks: list[bytes]) -> None:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    body = BodyDecoder({"transfer-encoding": "chunked"})
    content = b"".join(body.feed(part) for part in data.draw(_cut(framed)))
    assert content == b"".join(chunks)
    assert body.complete


def test_a_counted_body_is_complete_at_its_length() -> None:
    body = BodyDecoder({"content-length": "5"})
    assert not body.complete
    assert body.feed(b"abc") == b"abc"
    assert not body.complete
    body.feed(b"de")
    assert body.complete
    assert BodyDecoder({"content-length": "0"}).complete


def test_a_chunk_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        BodyDecoder({"transfer-encoding": "chunked"}).feed(b"what?\r\n")


@given(st.data())
def test_events_come_out_whole_however_they_arrive(data: st.DataObject) -> None:
    stream = b': comment\n\ndata: {"a": 1}\n\nevent: x\r\ndata:{"b": 2}\r\n\r\ndata: [DONE]\n\n'
    splitter = EventSplitter()
    events = [event for part in data.draw(_cut(stream)) for event in splitter.feed(part)]
    assert events == [b'{"a": 1}', b'{"b": 2}', b"[DONE]"]


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Stub = Callable[[Handler], AbstractAsyncContextManager[str]]


def _saying(*parts: bytes) -> Handler:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return say


async def test_a_body_without_length_ends_with_the_connection(stub: Stub) -> None:
    async with stub(_saying(b"HTTP/1.1 200 OK\r\n\r\n", b"all ", b"of it")) as url:
        response = await fetch(url)
    assert (response.status, response.body) == (200, b"all of it")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab",
        b"nonsense\r\n\r\n",
    ],
)
async def test_an_answer_that_breaks_off_is_said_to(stub: Stub, answer: bytes) -> None:
    async with stub(_saying(answer)) as url:
        with pytest.raises(ServerUnreachable, match=r"closed the connection|broke off"):
            await fetch(url)


async def test_nobody_there_is_said() -> None:
    with pytest.raises(ServerUnreachable, match="No server answers"):
        await fetch(f"http://127.0.0.1:{free_port()}/")


async def test_a_server_that_never_answers_is_given_up(stub: Stub) -> None:
    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client leaves

    async with stub(wait) as url:
        with pytest.raises(ServerUnreachable, match="did not answer within"):
            await fetch(url, timeout_s=0.05)
