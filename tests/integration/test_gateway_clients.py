"""Clients that read slowly, leave, or never end a request: the gateway, its backends and others go on."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web
from tests.integration.gateway_harness import NEVER_S, Gateway, Process, backends, gateway, until
from tests.mock_upstream import MockUpstream, Script

CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{"content":"' + b"x" * 4000 + b'"},"finish_reason":null}]}\n\n'
)
BUFFERED_BYTES = 64 * 2**20
"""More than the sockets of two connections and the gateway's own windows hold."""


class Flood:
    """An upstream that writes without end; `written` bytes as far as somebody took them."""

    def __init__(self) -> None:
        self.written = self.gone = 0
        self.url = ""

    async def models(self, request: web.Request) -> web.StreamResponse:
        del request
        return web.json_response({"data": [{"id": "m"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(CHUNK)
                self.written += len(CHUNK)
        except (asyncio.CancelledError, ConnectionError):
            self.gone += 1
            raise

    async def stalled(self) -> int:
        """Wait until nobody takes any more; how much it was."""
        before = -1
        while before != self.written:
            assert self.written < BUFFERED_BYTES, "somebody takes it all and keeps it"
            before = self.written
            await asyncio.sleep(0.3)
        return before


@asynccontextmanager
async def flood() -> AsyncGenerator[Flood]:
    upstream = Flood()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.answer)
    app.router.add_get("/v1/models", upstream.models)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    upstream.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    try:
        yield upstream
    finally:
        await runner.cleanup()


async def ask(gw: Gateway, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A chat request on a connection of its own, whose small window is read by nobody but the test."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port, limit=1024)
    body = json.dumps(gw.request(**fields)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("shared", [False, True])
async def test_a_client_that_does_not_read_stops_its_upstream(tmp_path: Path, shared: bool) -> None:
    """Shared: its request is a single flight, which is read by a task of the gateway's own."""
    async with flood() as upstream, MockUpstream() as mock:
        sections = backends(a=mock)
        sections["flood"] = {"url": upstream.url, "models": {"big": "m"}}
        async with gateway(tmp_path, backends=sections) as gw:
            sampling = {"temperature": 0} if shared else {}
            reader, writer = await ask(gw, model="big", stream=True, **sampling)
            await reader.readexactly(100)
            taken = await upstream.stalled()
            for number in range(20):
                assert (await gw.chat(f"others go on {number}")).status_code == 200
            # It goes on from where it stood when it is read again.
            await reader.readexactly(taken + BUFFERED_BYTES // 8)
            await until(lambda: upstream.written > taken)
            writer.transport.abort()
            await until(lambda: upstream.gone == 1)
            await until(lambda: len(gw.records) == 21)
            record = gw.records[-1]
            assert (record.cause, record.backend, record.estimated) == ("cancelled", "flood", True)
            assert record.completion_tokens > 0
            assert gw.serving.executor.condition("flood").in_flight == 0


async def test_a_client_that_never_reads_again_is_let_go(tmp_path: Path) -> None:
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system cannot tell")
    async with flood() as upstream:
        sections = {"flood": {"url": upstream.url, "models": ["m"], "max_concurrency": 1}}
        async with gateway(tmp_path, backends=sections) as gw:
            assert gw.listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000
            gw.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 500)
            reader, writer = await ask(gw, stream=True)
            await reader.readexactly(100)
            await upstream.stalled()
            # The client is there and says nothing.
            await until(lambda: upstream.gone == 1)
            assert (await gw.record()).cause == "cancelled"
            writer.transport.abort()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_cancels_its_upstream(tmp_path: Path, stream: bool) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text="one two three", fault="hang_midway" if stream else "hang", fault_after=2)
        async with gateway(tmp_path, backends=backends(a=mock)) as gw:
            reader, writer = await ask(gw, stream=stream)
            if stream:
                await reader.readuntil(b"two")
            else:
                await mock.until(lambda m: m.running == 1)
            writer.transport.abort()
            await mock.until(lambda m: m.disconnects == 1)
            record = await gw.record()
            assert (record.cause, [attempt.cause for attempt in record.attempts]) == (
                "cancelled",
                ["cancelled"],
            )
            # What the backend did until then is paid for, as far as can be known from here.
            assert record.estimated
            assert record.prompt_tokens > 0
            assert record.cost.nanousd > 0
            if stream:
                assert record.completion_tokens == 2
            [row] = await gw.usage("cause")
            assert row["cause"] == "cancelled"
            assert row["cost_usd"] == pytest.approx(record.cost.nanousd / 1e9)


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(fault="hang")
        sections = backends(a={"mock": mock, "max_concurrency": 1})
        async with gateway(tmp_path, backends=sections) as gw:
            first = await ask(gw, stream=True)
            await mock.until(lambda m: m.running == 1)
            second = await ask(gw, stream=True)
            await until(lambda: gw.serving.executor.waiting()["normal"] == 1)
            second[1].transport.abort()
            await until(lambda: gw.serving.executor.waiting()["normal"] == 0)
            first[1].transport.abort()
            await mock.until(lambda m: m.disconnects == 1)
            records = [await gw.record(), await gw.record()]
            assert [len(record.attempts) for record in records] == [0, 1]
            assert gw.serving.executor.condition("a").in_flight == 0


async def test_a_shared_answer_goes_on_when_one_of_its_readers_leaves(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text="one two three four five", token_delay_s=0.1)
        async with gateway(tmp_path, backends=backends(a=mock)) as gw:
            reader, writer = await ask(gw, stream=True, temperature=0)
            await reader.readuntil(b"one")
            other = asyncio.create_task(gw.stream(temperature=0))
            await until(lambda: gw.serving.gateway.load().running == 2)
            writer.transport.abort()
            assert (await other).text == "one two three four five"
            assert len(mock.requests) == 1
            records = [await gw.record(), await gw.record()]
            assert [record.cause for record in records] == ["cancelled", None]
            # Whoever stays pays, once.
            assert [len(record.attempts) for record in records] == [0, 1]
            assert [record.shared for record in records] == [True, False]


async def test_ten_thousand_idle_connections_keep_nobody_out(tmp_path: Path) -> None:
    """As many as the process may open files, ten thousand at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, soft - 1_000)
    async with MockUpstream() as mock, Process(tmp_path, backends=backends(a=mock)) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(socket.create_connection(address))
            body = {"model": "m", "messages": [{"role": "user", "content": "still there?"}]}
            async with httpx2.AsyncClient(base_url=server.url, timeout=NEVER_S) as client:
                answers = [await client.post("/v1/chat/completions", json=body) for _ in range(20)]
            assert {answer.status_code for answer in answers} == {200}


async def test_requests_that_trickle_in_hold_nothing(tmp_path: Path) -> None:
    """Slowloris: heads and bodies that never end."""
    server = {"body_timeout_s": 0.5}
    async with (
        MockUpstream() as mock,
        gateway(tmp_path, backends=backends(a=mock), server=server, headers_timeout_s=0.5) as gw,
    ):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-A: "
        body = b"1\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        slow = [await asyncio.open_connection("127.0.0.1", gw.port) for _ in range(100)]
        for place, (_, writer) in enumerate(slow):
            writer.write(head + (body if place % 2 else b""))
        assert (await gw.chat()).status_code == 200
        answers = await asyncio.gather(*(reader.read() for reader, _ in slow[::2]))
        assert set(answers) == {b""}
        refused = await asyncio.gather(*(reader.readline() for reader, _ in slow[1::2]))
        assert {line.split()[1] for line in refused} == {b"408"}
        assert not mock.running
        for _, writer in slow:
            writer.transport.abort()
