"""A whole gateway before scripted servers, for tests of what it tells; and records of requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from stockpot.caller import Caller
from stockpot.clock import SystemClock
from stockpot.events import Event
from stockpot.gateway.spans import Spans
from stockpot.records import Attempt, Cost, RequestRecord
from stockpot.requests import ChatRequest, Generation, Message
from stockpot.serving import Serving, open_serving
from stockpot.settings import load_settings

EMPTY = Path(__file__).parent.parent / "empty.toml"
SECRET = "the secret of the soup"
"""What no line and no span may tell unless it was asked to."""


@asynccontextmanager
async def gateway(
    backends: Mapping[str, Mapping[str, Any]], *, spans: Spans | None = None, **sections: Any
) -> AsyncGenerator[Serving]:
    """Started, without an engine and without accounts."""
    settings = load_settings(
        EMPTY,
        backends=backends,
        **{"engine": {"enabled": False}, "accounts": {"enabled": False}, **sections},
    )
    serving = open_serving(settings, None, clock=SystemClock(), spans=spans)
    await serving.start()
    try:
        yield serving
    finally:
        await serving.stop(drain=False)


def question(model: str = "m", **generation: Any) -> ChatRequest:
    """A chat with `SECRET` in it."""
    return ChatRequest(Generation(model, "r-1", **generation), (Message("user", SECRET),))


async def answer(serving: Serving, request: ChatRequest) -> list[Event]:
    """All events."""
    return [event async for event in serving.gateway.generate(request)]


def attempt(backend: str = "a", **changes: Any) -> Attempt:
    """One that succeeded."""
    usual: dict[str, Any] = {
        "model": "m",
        "start_s": 0.0,
        "duration_s": 0.2,
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "completion_tokens": 5,
        "cost": Cost(2_000_000, "configured"),
    }
    return Attempt(backend, **{**usual, **changes})


def record(*attempts: Attempt, **changes: Any) -> RequestRecord:
    """A request with these attempts, the last of which gave the answer."""
    usual: dict[str, Any] = {
        "request_id": "r-1",
        "client_request_id": "mine",
        "at": 1_700_000_000.0,
        "operation": "chat",
        "caller": Caller(key_id="k1", team="kitchen"),
        "requested_model": "m",
        "model": "m" if attempts else "",
        "backend": attempts[-1].backend if attempts else "",
        "attempts": attempts,
        "prompt_tokens": sum(each.prompt_tokens for each in attempts),
        "cached_tokens": sum(each.cached_tokens for each in attempts),
        "completion_tokens": sum(each.completion_tokens for each in attempts),
        "cost": Cost(sum(each.cost.nanousd for each in attempts), "configured"),
    }
    return RequestRecord(**{**usual, **changes})
