"""Requests that are meant to hurt: heads and bodies that are too much, wrong keys by the thousand."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.gateway_harness import Gateway, backends, bearer, gateway
from tests.mock_upstream import MockUpstream

MANY = 1_000_000
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

HEADS: dict[str, bytes] = {
    "one header without end": HEAD + b"X-A: " + b"a" * 2**22,
    "a name without end": HEAD + b"a" * 2**22,
    "a path without end": b"GET /" + b"a" * 2**22,
    "many headers": HEAD + b"X-A: 1\r\n" * 50_000,
    "many headers in few bytes": HEAD + b"a:\r\n" * 1_000 + b"\r\n",
}

BODIES: dict[str, bytes] = {
    "deep arrays": b'{"model":"m","messages":' + b"[" * MANY + b"]" * MANY + b"}",
    "deep objects": b'{"a":' * MANY + b"1" + b"}" * MANY,
    "messages that are none": b'{"model":"m","messages":[' + b"1," * MANY + b"1]}",
    "empty messages": b'{"model":"m","messages":[' + b"{}," * MANY + b"{}]}",
    "parts that are none": b'{"model":"m","messages":[{"role":"user","content":[' + b"1," * MANY + b"1]}]}",
    "fields of a tool": b'{"model":"m","messages":[{"role":"user","content":"a"}],"tools":[{"type":'
    b'"function","function":{"name":"f",'
    + b",".join(b'"a%d":1' % number for number in range(300_000))
    + b"}}]}",
    "a number without end": b'{"model":"m","max_tokens":' + b"9" * MANY + b"}",
    "one key often": b'{"model":"m",' + b'"stop":[],' * 100_000 + b'"messages":[]}',
    "bytes that are none of UTF-8": b'{"model":"' + b"\xff" * MANY + b'"}',
    "nothing but space": b" " * MANY,
}


async def exchange(gw: Gateway, sent: bytes) -> bytes:
    """What comes back for these bytes, to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionResetError:
        return b""
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("name", HEADS)
async def test_heads_without_end_are_refused_early(tmp_path: Path, name: str) -> None:
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        answer = await exchange(gw, HEADS[name])
        # Who still sends when the connection is closed may lose the answer to a reset.
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 "), answer[:200]
        assert (await gw.chat()).status_code == 200


async def test_as_many_headers_as_clients_send_are_fine(tmp_path: Path) -> None:
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        headers = {f"x-{number}": "a" * 300 for number in range(150)}
        assert (await gw.chat(headers=headers)).status_code == 200


async def test_headers_behind_a_body_are_not_kept(tmp_path: Path) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
    chunked = b"%x\r\n%b\r\n0\r\n" % (len(body), body) + b"X-A: 1\r\n" * 10_000 + b"\r\n"
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        sent = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked
        assert (await exchange(gw, sent)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("name", BODIES)
async def test_bodies_that_are_too_much_are_refused(tmp_path: Path, name: str, path: str) -> None:
    headers = {"content-type": "application/json"}
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        answer = await gw.client.post(path, content=BODIES[name], headers=headers)
        assert answer.status_code == 400, answer.text
        assert len(answer.content) < 1_000
        assert not mock.requests
        assert (await gw.chat()).status_code == 200


async def test_what_is_wrong_often_costs_no_more_than_once(tmp_path: Path) -> None:
    """Of a million things that are wrong one is told, so one is looked for."""
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        body, headers = BODIES["messages that are none"], {"content-type": "application/json"}
        tracemalloc.start()
        try:
            answer = await gw.client.post("/v1/chat/completions", content=body, headers=headers)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert answer.status_code == 400
        assert most < 20 * len(body)


async def test_a_body_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    server = {"max_body_bytes": 10_000}
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock), server=server) as gw:
        assert (await gw.chat("a" * 20_000)).status_code == 413
        announced = HEAD + b"Connection: close\r\nContent-Length: 99999999999999999999\r\n\r\n"
        assert (await exchange(gw, announced)).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 "))
        chunk = b"%x\r\n%b\r\n" % (5_000, b"a" * 5_000)
        sent = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 20
        assert (await exchange(gw, sent)).startswith(b"HTTP/1.1 413 ")
        assert not mock.requests


async def test_a_compressed_body_is_not_unpacked(tmp_path: Path) -> None:
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        body = gzip.compress(json.dumps(gw.request("a" * 2**20)).encode())
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = await gw.client.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert "content-encoding" in answer.json()["error"]["message"].lower()


async def test_wrong_keys_by_the_thousand(tmp_path: Path) -> None:
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        good = (await gw.create_key())["key"]
        assert (await gw.chat(headers=bearer(good))).status_code == 200
        prefix, last = good[:-1], good[-1]
        wrong: list[Callable[[int], str]] = [
            lambda number: f"sk-{number}",
            lambda number: prefix + ("a" if last != "a" else "b") + str(number),
            lambda number: good[: -1 - number % 20],
        ]
        seen: dict[int, int] = {}
        for number in range(1500):
            answer = await gw.chat(headers=bearer(wrong[number % 3](number)))
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
            if number % 100 == 0:
                assert (await gw.chat(headers=bearer(good))).status_code == 200
        assert set(seen) == {401, 429}
        # Twenty a minute are looked at, and those that became due meanwhile.
        assert 20 <= seen[401] < 60
        assert (await gw.chat(headers=bearer(good))).status_code == 200
        assert len(mock.requests) == 17


async def test_wrong_keys_leave_nothing_behind(tmp_path: Path) -> None:
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock)) as gw:
        await gw.create_key()

        async def knock(first: int) -> None:
            for number in range(first, first + 500):
                assert (await gw.chat(headers=bearer(f"sp-{number:040d}"))).status_code in (401, 429)

        await knock(0)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await knock(500)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 2**20
        assert [row["requests"] for row in await gw.usage()] == []
