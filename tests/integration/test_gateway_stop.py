"""How a gateway ends: SIGTERM under load loses nothing, SIGKILL at most the last second."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import httpx2
from tests.integration.gateway_harness import NEVER_S, Process, backends, gateway, until
from tests.integration.test_gateway_clients import ask, flood
from tests.mock_upstream import MockUpstream, Script

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello there"}]}
CHAT = "/v1/chat/completions"


async def rows(server: Process, by: str = "") -> list[dict[str, Any]]:
    """What `stockpot usage` says of the ledger."""
    grouped = ("--by", by) if by else ()
    return json.loads(await server.command("usage", "--format", "json", *grouped))


async def test_sigterm_under_load_loses_no_request(tmp_path: Path) -> None:
    async with MockUpstream() as mock, Process(tmp_path, backends=backends(a=mock)) as server:
        mock.default = Script(text="one two three four", token_delay_s=0.1)
        outcomes: list[str] = []

        async def client(stream: bool) -> None:
            """Asks again and again; a server that stops says so, or does not take the connection."""
            async with httpx2.AsyncClient(base_url=server.url, timeout=NEVER_S) as http:
                while True:
                    body = {**HELLO, "stream": stream}
                    try:
                        async with http.stream("POST", CHAT, json=body) as response:
                            text = (await response.aread()).decode()
                    except httpx2.ConnectError:
                        return
                    except httpx2.RemoteProtocolError:
                        # An idle connection that the server closed while this was being sent.
                        outcomes.append("unsent")
                        return
                    if response.status_code == 503:
                        assert response.headers["retry-after"]
                        return
                    assert response.status_code == 200, text
                    assert not stream or text.endswith("data: [DONE]\n\n")
                    assert "four" in text
                    outcomes.append("whole")

        clients = [asyncio.create_task(client(bool(number % 2))) for number in range(20)]
        await mock.until(lambda m: m.served >= 25 and m.running >= 10)
        server.signal(signal.SIGTERM)
        assert await server.ended() == 0
        await asyncio.gather(*clients)
        whole = outcomes.count("whole")
        assert whole == mock.served == len(mock.requests)
        assert mock.disconnects == 0
        [total] = await rows(server)
        assert total["failures"] <= 20  # those that were refused at the end
        assert total["requests"] - total["failures"] == whole
        assert total["output_tokens"] == 4 * whole


async def test_what_outlasts_the_drain_is_ended_and_in_the_ledger(tmp_path: Path) -> None:
    settings = {"drain_s": 0.3}
    async with (
        MockUpstream() as mock,
        Process(tmp_path, backends=backends(a=mock), server=settings) as server,
    ):
        mock.default = Script(text="one two three", fault="hang_midway", fault_after=2)
        async with httpx2.AsyncClient(base_url=server.url, timeout=NEVER_S) as http:
            async with http.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
                lines = response.aiter_lines()
                async for line in lines:
                    if "two" in line:
                        break
                server.signal(signal.SIGTERM)
                rest = [line async for line in lines]
            assert any('"error"' in line for line in rest)
            assert "data: [DONE]" not in rest
        assert await server.ended() == 0
        [total] = await rows(server)
        assert (total["requests"], total["failures"], total["output_tokens"]) == (1, 1, 2)


async def test_a_client_that_does_not_read_cannot_keep_the_server_from_stopping(tmp_path: Path) -> None:
    async with flood() as upstream:
        sections = {"flood": {"url": upstream.url, "models": ["m"]}}
        async with gateway(tmp_path, backends=sections, server={"drain_s": 0.3}) as gw:
            reader, writer = await ask(gw, stream=True)
            await reader.readexactly(100)
            await upstream.stalled()
            gw.server.request_stop()
            await until(lambda: gw.server.should_exit)
        assert [record.cause for record in gw.records] == ["cancelled"]
        accounts = gw.serving.accounts
        assert accounts is not None
        assert accounts.ledger.stats().written == 1
        writer.transport.abort()


async def test_kill_loses_at_most_the_last_second(tmp_path: Path) -> None:
    async with MockUpstream() as mock, Process(tmp_path, backends=backends(a=mock)) as server:
        async with httpx2.AsyncClient(base_url=server.url, timeout=NEVER_S) as http:
            for _ in range(30):
                assert (await http.post(CHAT, json=HELLO)).status_code == 200
            # The promise is about what is older than a second.
            await asyncio.sleep(1.0)
            for _ in range(5):
                assert (await http.post(CHAT, json=HELLO)).status_code == 200
            server.signal(signal.SIGKILL)
        await server.ended()
        [total] = await rows(server)
        assert 30 <= total["requests"] <= 35
        assert total["failures"] == 0
        # It starts again from what is there, and counts on.
        again = Process(tmp_path, backends=backends(a=mock))
        async with again, httpx2.AsyncClient(base_url=again.url, timeout=NEVER_S) as http:
            assert (await http.post(CHAT, json=HELLO)).status_code == 200
            again.signal(signal.SIGTERM)
            assert await again.ended() == 0
        [after] = await rows(again)
        assert after["requests"] == total["requests"] + 1
