"""/v1/usage, /v1/tasks/.../outcome and /admin/usage: own figures, own tasks, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from tests.accounts.records import BLUE, EXACT, NOON, RED, SEMANTIC, finished, kept

from stockpot.accounts.accounts import Accounts, open_accounts
from stockpot.caller import Caller
from stockpot.clock import Clock, VirtualClock
from stockpot.errors import Forbidden, StockpotError
from stockpot.settings import Settings
from stockpot.wire import routes_accounts
from stockpot.wire.errors import on_stockpot_error
from stockpot.wire.service import Service


class ByHeader:
    """Identity for a test: the caller is the word in a header."""

    async def caller(self, request: Request) -> Caller:
        return {"red": RED, "blue": BLUE}[request.headers["x-caller"]]

    async def administrator(self, request: Request) -> str:
        if request.headers["x-caller"] != "admin":
            raise Forbidden("not you")
        return "admin"


@dataclass(frozen=True)
class Parts:
    accounts: Accounts | None
    settings: Settings
    clock: Clock
    identity: ByHeader


@pytest.fixture
def accounts(tmp_path: Path) -> Generator[Accounts]:
    opened = open_accounts(Settings(data_dir=tmp_path), clock=VirtualClock(NOON + 60))
    yield opened
    opened.close()


def _app(accounts: Accounts | None) -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    parts = Parts(accounts, Settings(), VirtualClock(NOON + 60), ByHeader())
    app.include_router(routes_accounts.router(cast(Service, parts)))
    app.add_exception_handler(StockpotError, on_stockpot_error)
    return app


@pytest.fixture
async def client(accounts: Accounts) -> AsyncGenerator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=_app(accounts))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as opened:
        yield opened


def _as(who: str) -> dict[str, str]:
    return {"x-caller": who}


async def test_a_key_sees_its_own_usage(client: httpx2.AsyncClient, accounts: Accounts) -> None:
    for record in (finished(), finished(model="large"), finished(BLUE)):
        accounts.ledger.observe_request(record)
    answer = (await client.get("/v1/usage?by=model&since=1d", headers=_as("red"))).json()
    assert [(row["model"], row["requests"]) for row in answer["rows"]] == [("large", 1), ("small", 1)]
    (row,) = (await client.get("/v1/usage", headers=_as("blue"))).json()["rows"]
    assert (row["requests"], row["cost_usd"]) == (1, 1e-6)
    for name in ("key", "team"):
        refused = await client.get(f"/v1/usage?{name}=k1", headers=_as("blue"))
        assert refused.status_code == 400


async def test_what_kept_answers_saved(client: httpx2.AsyncClient, accounts: Accounts) -> None:
    for record in (finished(), kept(EXACT), kept(SEMANTIC, BLUE)):
        accounts.ledger.observe_request(record)
    (row,) = (await client.get("/v1/usage", headers=_as("red"))).json()["rows"]
    assert (row["requests"], row["exact_hits"], row["semantic_hits"], row["recall_share"]) == (2, 1, 0, 1.0)
    assert (row["saved_prompt_tokens"], row["saved_output_tokens"]) == (100, 10)
    assert (row["saved_usd"], row["saved_s"], row["unpriced"]) == (1e-6, 1.5, 0)
    answer = (await client.get("/admin/usage?by=recall&recall=semantic", headers=_as("admin"))).json()
    assert [(row["recall"], row["requests"]) for row in answer["rows"]] == [("semantic", 1)]


async def test_operators_see_everybodys(client: httpx2.AsyncClient, accounts: Accounts) -> None:
    for record in (finished(), finished(BLUE)):
        accounts.ledger.observe_request(record)
    answer = (await client.get("/admin/usage?by=team", headers=_as("admin"))).json()
    assert sorted(row["team"] for row in answer["rows"]) == ["blue", "red"]
    answer = (await client.get("/admin/usage?team=red", headers=_as("admin"))).json()
    assert [row["requests"] for row in answer["rows"]] == [1]
    assert (await client.get("/admin/usage", headers=_as("red"))).status_code == 403


async def test_an_outcome_is_kept_and_the_last_counts(client: httpx2.AsyncClient, accounts: Accounts) -> None:
    accounts.ledger.observe_request(finished(task="ticket/7"))
    for word in ("failure", "success"):
        body = {"outcome": word, "note": "checked", "value": 0.5}
        said = await client.post("/v1/tasks/ticket%2F7/outcome", json=body, headers=_as("red"))
        assert said.status_code == 200
        assert said.json() == {"task": "ticket/7", "at": NOON + 60, "requests": 1, **body}
    history = (await client.get("/v1/tasks/ticket/7/outcome", headers=_as("red"))).json()["outcomes"]
    assert [each["outcome"] for each in history] == ["failure", "success"]
    answer = (await client.get("/v1/usage?tasks=true", headers=_as("red"))).json()
    assert [(row["succeeded"], row["failed"]) for row in answer["rows"]] == [(1, 0)]


async def test_others_tasks_are_not_there(client: httpx2.AsyncClient, accounts: Accounts) -> None:
    accounts.ledger.observe_request(finished(task="t1"))
    refused = await client.post("/v1/tasks/t1/outcome", json={"outcome": "failure"}, headers=_as("blue"))
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "unknown_task"
    assert (await client.get("/v1/tasks/t1/outcome", headers=_as("blue"))).json()["outcomes"] == []


@pytest.mark.parametrize(
    "body", [{}, {"outcome": "maybe"}, {"outcome": "success", "x": 1}, {"outcome": "success", "value": "1"}]
)
async def test_a_wrong_body_is_refused(client: httpx2.AsyncClient, body: dict[str, Any]) -> None:
    refused = await client.post("/v1/tasks/t1/outcome", json=body, headers=_as("red"))
    assert refused.status_code == 400


@pytest.mark.parametrize("query", ["by=soup", "since=soon", "until=x", "tasks=yes", "day=x", "soup=1"])
async def test_a_wrong_query_is_refused(client: httpx2.AsyncClient, query: str) -> None:
    refused = await client.get(f"/v1/usage?{query}", headers=_as("red"))
    assert refused.status_code == 400
    assert refused.json()["error"]["message"]


async def test_without_accounts_it_says_so() -> None:
    transport = httpx2.ASGITransport(app=_app(None))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/v1/usage", headers=_as("red"))).status_code == 501
