"""A whole server, put together and put together anew while it runs."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.mock_upstream import MockUpstream, Script

from stockpot.clock import SystemClock
from stockpot.errors import ConfigurationError, StockpotError, UnknownModel
from stockpot.events import Completed, Delta
from stockpot.requests import ChatRequest, Generation, Message, Sampling
from stockpot.serving import Serving, open_serving
from stockpot.settings import Settings, load_settings

EMPTY = Path(__file__).parent / "empty.toml"


def settings_of(folder: Path, **sections: Any) -> Settings:
    return load_settings(EMPTY, **{"engine": {"enabled": False}, "data_dir": folder, **sections})


@asynccontextmanager
async def running(settings: Settings) -> AsyncGenerator[Serving]:
    serving = open_serving(settings, None, clock=SystemClock())
    await serving.start()
    try:
        yield serving
    finally:
        await serving.stop(drain=False)


async def ask(serving: Serving, model: str, text: str = "hello") -> str:
    request = ChatRequest(
        Generation(model, "r", sampling=Sampling(temperature=1.0)), (Message("user", text),)
    )
    events = [event async for event in serving.gateway.generate(request)]
    assert isinstance(events[-1], Completed)
    return "".join(event.text for event in events if isinstance(event, Delta))


@pytest.mark.anyio
async def test_a_reload_changes_what_new_requests_meet(tmp_path: Path) -> None:
    async with MockUpstream("one") as first, MockUpstream("two") as second:
        first.default = Script(text="from the first")
        second.default = Script(text="from the second")
        before = {"a": {"url": first.url, "models": ["one"]}}
        async with running(settings_of(tmp_path, backends=before)) as serving:
            assert await ask(serving, "one") == "from the first"
            with pytest.raises(UnknownModel):
                await ask(serving, "soup")
            after = {**before, "b": {"url": second.url, "models": ["two"]}}
            routes = {"soup": {"targets": [{"model": "two"}]}}
            guards = {"words": {"rule": "block-list", "words": ["first"], "action": "redact"}}
            await serving.reload(settings_of(tmp_path, backends=after, routes=routes, guards=guards))
            assert await ask(serving, "soup") == "from the second"
            assert await ask(serving, "one") == "from the [redacted:blocked_word]"
            await serving.reload(settings_of(tmp_path, backends={"b": after["b"]}))
            with pytest.raises(UnknownModel):
                await ask(serving, "one")


@pytest.mark.anyio
@pytest.mark.parametrize(
    "wrong",
    [
        {"backends": {}},
        {"routes": {"x": {"targets": [{"model": "y"}]}, "y": {"targets": [{"model": "x"}]}}},
        {
            "routes": {
                "x": {"targets": [{"model": "m"}], "cascade": {"to": "m", "on": ["regex"], "pattern": "(("}}
            }
        },
        {"guards": {"g": {"rule": "classifier", "classifier": "no.such:thing"}}},
    ],
)
async def test_what_does_not_fit_changes_nothing(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async with MockUpstream("m") as mock:
        fits = {"backends": {"a": {"url": mock.url}}}
        async with running(settings_of(tmp_path, **fits)) as serving:
            with pytest.raises(ConfigurationError):
                await serving.reload(settings_of(tmp_path, **{**fits, **wrong}))
            assert await ask(serving, "m") == "hello"
        with pytest.raises(StockpotError):
            open_serving(settings_of(tmp_path, **{**fits, **wrong}), None, clock=SystemClock())


@pytest.mark.anyio
async def test_what_waits_for_a_restart_is_told_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with MockUpstream("m") as mock:
        fits = {"backends": {"a": {"url": mock.url}}}
        async with running(settings_of(tmp_path, **fits)) as serving:
            for _ in range(2):
                caplog.clear()
                await serving.reload(settings_of(tmp_path, **fits, server={"port": 9}))
                assert "server.port" in caplog.text
            assert serving.settings.server.port == 8000
            assert serving.accounts is not None
            assert [entry.action for entry in serving.accounts.audit.entries()] == ["settings.reload"] * 2
