"""What was used and how tasks ended: /v1/usage and /v1/tasks/... for callers, /admin/usage for operators."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from stockpot.accounts.accounts import Accounts
from stockpot.accounts.outcomes import Outcome
from stockpot.accounts.scope import TEXT_MAX
from stockpot.accounts.usage import DIMENSIONS, UsageQuery, checked_only, dimensions_of, moment, plain
from stockpot.caller import Caller
from stockpot.errors import RequestError
from stockpot.wire.body import read_shape
from stockpot.wire.errors import json_response
from stockpot.wire.service import Service
from stockpot.wire.shapes_cache import Query

_ASK_AGAIN_S = (0.0, 0.3, 0.7)
"""A task's request may have been answered by another gateway, whose ledger is up to a second behind."""
_OPERATORS_ONLY = frozenset({"key", "team"})

T = TypeVar("T")


class _NoAccounts(RequestError):
    """Accounts are switched off."""

    status = 501
    code = "no_accounts"


class _UnknownTask(RequestError):
    """No request of the caller has the task."""

    status = 404
    code = "unknown_task"


class OutcomeShape(BaseModel):
    """How a task ended; `value` is the client's own measure of it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    outcome: Literal["success", "failure"]
    note: str = Field(default="", max_length=TEXT_MAX)
    value: float | None = Field(default=None, allow_inf_nan=False)


def router(service: Service) -> APIRouter:
    """The routes. What asks the database runs in a thread: it may block."""
    routes = APIRouter()

    @routes.post("/v1/tasks/{task:path}/outcome")
    async def say(request: Request, task: str) -> Response:
        caller = await service.identity.caller(request)
        accounts = _accounts(service)
        shape = await read_shape(request, OutcomeShape, {}, service.settings.server)
        return json_response(await _said(accounts, caller, task, shape))

    @routes.get("/v1/tasks/{task:path}/outcome")
    async def said(request: Request, task: str) -> Response:
        caller = await service.identity.caller(request)
        accounts = _accounts(service)
        Query(request.query_params)
        history = await asyncio.to_thread(accounts.outcomes.of, caller, task)
        return json_response({"task": task, "outcomes": history})

    @routes.get("/v1/usage")
    async def own(request: Request) -> Response:
        caller = await service.identity.caller(request)
        accounts = _accounts(service)
        return json_response(await _usage(service, accounts, request, {"key": caller.key_id}))

    @routes.get("/admin/usage")
    async def everybody(request: Request) -> Response:
        await service.identity.administrator(request)
        return json_response(await _usage(service, _accounts(service), request, {}))

    return routes


async def _said(accounts: Accounts, caller: Caller, task: str, shape: OutcomeShape) -> Outcome:
    def say() -> Outcome | None:
        return accounts.outcomes.say(caller, task, shape.outcome, note=shape.note, value=shape.value)

    await asyncio.to_thread(accounts.ledger.flush)
    for pause_s in _ASK_AGAIN_S:
        await asyncio.sleep(pause_s)
        outcome = await asyncio.to_thread(say)
        if outcome is not None:
            return outcome
    raise _UnknownTask(
        f"No request of this key or its team names the task {task[:80]!r} yet; send 'x-stockpot-task' with"
        " the requests of a task, and its outcome when they are answered.",
        param="task",
    )


async def _usage(
    service: Service, accounts: Accounts, request: Request, fixed: dict[str, str]
) -> dict[str, Any]:
    """The answer of both routes for usage; a caller's own has a key that is `fixed`."""
    filters = [name for name in DIMENSIONS if not fixed or name not in _OPERATORS_ONLY]
    Query(request.query_params, "by", "since", "until", "tasks", *filters)
    given, now = request.query_params, service.clock.wall()
    query = UsageQuery(
        by=_checked("by", lambda: dimensions_of(given.get("by", ""))),
        since=_checked("since", lambda: moment(given.get("since", "30d"), now)),
        until=_checked("until", lambda: moment(given["until"], now) if "until" in given else math.inf),
        only=_checked(
            "day", lambda: checked_only({name: given[name] for name in filters if name in given} | fixed)
        ),
    )
    tasks = given.get("tasks", "false")
    if tasks not in ("true", "false"):
        raise RequestError(
            f"The query parameter 'tasks' must be true or false; got {tasks[:40]!r}.", param="tasks"
        )
    rows: Sequence[Any] = await asyncio.to_thread(
        accounts.tasks if tasks == "true" else accounts.usage, query
    )
    until = None if query.until == math.inf else query.until
    return {"now_s": now, "since": query.since, "until": until, "rows": [plain(row) for row in rows]}


def _checked(name: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except ValueError as error:
        raise RequestError(f"The query parameter '{name}' is wrong: {error}.", param=name) from error


def _accounts(service: Service) -> Accounts:
    if service.accounts is None:
        raise _NoAccounts("This server keeps no accounts (accounts.enabled is false).")
    return service.accounts
