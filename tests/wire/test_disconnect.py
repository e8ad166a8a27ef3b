"""A client that goes away is cancelled, whatever its request was doing; stopping drains."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import msgspec
import pytest

from stockpot.backends.fake import FakeBackend, FakeBehaviour

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hi there"}]}
LONG_S = 60.0


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come; the bound is for failures alone."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it did not happen")


def request_bytes(length: int, body: bytes) -> bytes:
    """A POST that announces `length` bytes."""
    lines = (
        f"POST {CHAT} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        "",
        "",
    )
    return "\r\n".join(lines).encode() + body


def connect(client: httpx2.Client) -> socket.socket:
    """A connection of our own, which can be closed whenever."""
    return socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=20)


def send(client: httpx2.Client, **fields: Any) -> socket.socket:
    """A request on a connection of our own."""
    body = msgspec.json.encode({**GOOD, **fields})
    connection = connect(client)
    connection.sendall(request_bytes(len(body), body))
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_gone_while_tokens_come(serve: Serve, stream: bool) -> None:
    backend = FakeBackend(FakeBehaviour(token_delay_s=0.01))
    with serve(backend) as client:
        connection = send(client, stream=stream, ignore_eos=True, max_tokens=4000)
        until(lambda: backend.engine_stats().tokens_generated > 3)
        connection.close()
        until(lambda: backend.cancelled == 1)
        until(lambda: backend.running == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_gone_while_waiting_for_the_first_token(serve: Serve, stream: bool) -> None:
    backend = FakeBackend(FakeBehaviour(prefill_delay_s=LONG_S))
    with serve(backend) as client:
        connection = send(client, stream=stream)
        until(lambda: backend.running == 1)
        connection.close()
        until(lambda: backend.cancelled == 1)
        assert backend.running == 0


@pytest.mark.parametrize("stream", [True, False])
def test_gone_while_queued(serve: Serve, stream: bool) -> None:
    backend = FakeBackend(FakeBehaviour(max_running=1, prefill_delay_s=LONG_S))
    with serve(backend) as client:
        first = send(client)
        until(lambda: backend.running == 1)
        second = send(client, stream=stream)
        until(lambda: backend.waiting == 1)
        second.close()
        until(lambda: backend.cancelled == 1)
        assert backend.waiting == 0
        assert backend.running == 1
        first.close()
        until(lambda: backend.cancelled == 2)


def test_gone_in_the_middle_of_its_body(serve: Serve) -> None:
    with serve(FakeBackend()) as client:
        with connect(client) as connection:
            connection.sendall(request_bytes(99, b'{"model"'))
        assert client.post(CHAT, json=GOOD).status_code == 200


def test_two_requests_sent_at_once_on_one_connection(serve: Serve) -> None:
    body = msgspec.json.encode(GOOD)
    with serve(FakeBackend()) as client, connect(client) as connection:
        connection.sendall(2 * request_bytes(len(body), body))
        received = b""
        while received.count(b"You said: hi there") < 2:
            new = connection.recv(65536)
            assert new
            received += new


def test_stopping_lets_running_requests_finish_and_refuses_new_ones(serve: Serve) -> None:
    backend = FakeBackend(FakeBehaviour(token_delay_s=0.1))
    stops: list[Callable[[], object]] = []
    with serve(backend, stops=stops) as client, ThreadPoolExecutor() as pool:
        fields = {**GOOD, "ignore_eos": True, "max_tokens": 8}
        running = pool.submit(client.post, CHAT, json=fields)
        until(lambda: backend.running == 1)
        assert client.get("/ready").status_code == 200
        stops[0]()
        until(lambda: not backend.health().ready)
        refused = client.post(CHAT, json=GOOD)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        answer = running.result()
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 8
    assert backend.cancelled == 0


def test_what_does_not_finish_in_time_is_ended(serve: Serve) -> None:
    backend = FakeBackend(FakeBehaviour(prefill_delay_s=LONG_S))
    stops: list[Callable[[], object]] = []
    with serve(backend, stops=stops, drain_s=0.05) as client, ThreadPoolExecutor() as pool:
        whole = pool.submit(client.post, CHAT, json=GOOD)
        streamed = pool.submit(client.post, CHAT, json={**GOOD, "stream": True})
        until(lambda: backend.running == 2)
        stops[0]()
        assert whole.result().status_code == 503
        assert '"shutting_down"' in streamed.result().text
