"""Headers that say for whom and what for a request is, and what an answer says of its way."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from stockpot.backends.fake import FakeBackend
from stockpot.errors import AllowanceExceeded, GuardRefused, StockpotError, UpstreamError
from stockpot.events import Completed, Delivery, Event, Notice, Queued
from stockpot.requests import ChatRequest, CompletionRequest, Generation

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

WAY = Delivery(
    "small\r\nx: y",
    "east",
    attempts=2,
    cost_nanousd=1_230_004,
    cost_source="configured",
    notices=(Notice("degraded", "The budget is low."),),
)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class RecordingBackend(FakeBackend):
    """Remembers what it was asked, and answers as if through the gateway."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Generation] = []

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        self.asked.append(request.generation)
        async for event in super().generate(request):
            yield replace(event, delivery=WAY) if isinstance(event, Completed) else event


@pytest.fixture(scope="module")
def recording() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture(scope="module")
def recorded(recording: RecordingBackend, serve: Serve) -> Generator[httpx2.Client, None, None]:
    """A client of a server over `recording`."""
    with serve(recording) as client:
        yield client


def chat(client: httpx2.Client, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], **fields}
    return client.post("/v1/chat/completions", json=body, headers=headers)


def test_headers_reach_the_backend(recorded: httpx2.Client, recording: RecordingBackend) -> None:
    headers = {
        "x-stockpot-session": "s-1",
        "x-stockpot-task": "t-1",
        "x-stockpot-tags": "batch, nightly,batch,",
        "x-stockpot-priority": "low",
        "traceparent": TRACE,
    }
    fields = {"user": "ann", "prompt_cache_key": "k", "stream": True}
    assert chat(recorded, headers, **fields).status_code == 200
    asked = recording.asked[-1]
    assert (asked.session, asked.task, asked.user, asked.priority) == ("s-1", "t-1", "ann", "low")
    assert asked.caller.tags == ("batch", "nightly")
    assert (asked.trace_parent, asked.stream, asked.dialect) == (TRACE, True, "openai")


@pytest.mark.parametrize(
    ("fields", "session", "user"),
    [
        ({}, "", ""),
        ({"user": "ann"}, "ann", "ann"),
        ({"user": "ann", "prompt_cache_key": "k"}, "k", "ann"),
        ({"user": None, "prompt_cache_key": ""}, "", ""),
        ({"user": {"id": 1}}, "", ""),
    ],
)
def test_a_session_may_stand_in_the_body(
    recorded: httpx2.Client, recording: RecordingBackend, fields: dict[str, Any], session: str, user: str
) -> None:
    assert chat(recorded, **fields).status_code == 200
    asked = recording.asked[-1]
    assert (asked.session, asked.user, asked.priority, asked.stream) == (session, user, "normal", False)


def test_what_no_label_holds_is_known_by_its_digest(
    recorded: httpx2.Client, recording: RecordingBackend
) -> None:
    sessions: set[str] = set()
    for user in ("x" * 129, "x" * 130, "a\nb"):
        assert chat(recorded, user=user).status_code == 200
        sessions.add(recording.asked[-1].session)
    assert len(sessions) == 3
    assert all(session.startswith("sha256:") and len(session) < 128 for session in sessions)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-stockpot-session", "x" * 129),
        ("x-stockpot-task", "tab\there"),
        ("x-stockpot-tags", ",".join(f"t{index}" for index in range(17))),
        ("x-stockpot-tags", "y" * 129),
        ("x-stockpot-priority", "urgent"),
    ],
)
def test_headers_that_say_nothing_are_refused(recorded: httpx2.Client, name: str, value: str) -> None:
    response = chat(recorded, {name: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (name, "invalid_header")


@pytest.mark.parametrize(
    "value", ["x", TRACE.upper(), "ff" + TRACE[2:], TRACE.replace("b7ad6b7169203331", "0" * 16)]
)
def test_a_malformed_trace_begins_anew(
    recorded: httpx2.Client, recording: RecordingBackend, value: str
) -> None:
    assert chat(recorded, {"traceparent": value}).status_code == 200
    assert recording.asked[-1].trace_parent == ""


def test_an_answer_says_which_way_it_came(recorded: httpx2.Client) -> None:
    whole = chat(recorded)
    streamed = chat(recorded, stream=True, stream_options={"include_usage": True}).text
    for said in (whole.json()["stockpot"], json.loads(streamed.split("data: ")[-2])["stockpot"]):
        assert (said["model"], said["backend"], said["attempts"]) == ("small\r\nx: y", "east", 2)
        assert (said["cost_usd"], said["cost_source"], said["shared"]) == (0.001230004, "configured", False)
        assert said["notices"] == [{"kind": "degraded", "detail": "The budget is low."}]
    assert whole.headers["x-stockpot-model"] == "small??x: y"
    assert whole.headers["x-stockpot-backend"] == "east"
    assert whole.headers["x-stockpot-cost-usd"] == "0.001230004"
    cached = whole.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert whole.headers["x-stockpot-cached-tokens"] == str(cached)


@pytest.mark.parametrize(
    ("error", "status", "told", "retry_after"),
    [
        (
            UpstreamError("Busy.", cause="rate_limited", backend="b", retry_after_s=6.2),
            429,
            ("rate_limit_error", "upstream_rate_limited"),
            "7",
        ),
        (
            UpstreamError("Gone.", cause="reset", backend="b", code="c"),
            502,
            ("server_error", "c"),
            None,
        ),
        (
            UpstreamError("Slow.", cause="timeout", backend="b"),
            504,
            ("timeout_error", "upstream_timeout"),
            None,
        ),
        (
            AllowanceExceeded("Much.", retry_after_s=0.5),
            429,
            ("rate_limit_error", "rate_limit_exceeded"),
            "1",
        ),
        (
            AllowanceExceeded("Dear.", retry_after_s=60, money=True),
            402,
            ("insufficient_quota", "budget_exceeded"),
            "60",
        ),
        (GuardRefused("No."), 400, ("invalid_request_error", "guard_refused"), None),
    ],
)
def test_refusals_of_the_gateway(
    serve: Serve, error: StockpotError, status: int, told: tuple[str, str], retry_after: str | None
) -> None:
    class Refusing(FakeBackend):
        async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
            raise error
            yield Queued(0)

    with serve(Refusing()) as client:
        for response in (chat(client), chat(client, stream=True)):
            assert response.status_code == status
            assert response.headers.get("retry-after") == retry_after
            body = response.json()["error"]
            assert (body["type"], body["code"]) == told
            assert body["message"] == str(error)
