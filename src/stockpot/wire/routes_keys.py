"""Virtual keys over HTTP: /admin/keys/..., for administrators alone."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import AfterValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from stockpot.caller import NOBODY, Limits
from stockpot.errors import RequestError
from stockpot.identity.key_admin import KeyAdmin, NewKey, duration_s, shown
from stockpot.identity.key_store import StoredKey
from stockpot.wire.body import read_shape
from stockpot.wire.errors import json_response
from stockpot.wire.service import Service
from stockpot.wire.shapes_cache import Query
from stockpot.wire.shapes_common import Shape

_NOT_KEPT = {"cache-control": "no-store"}
_MODELS_MAX = 1_000


class _NoKeys(RequestError):
    """Virtual keys are switched off."""

    status = 501
    code = "no_keys"


def _duration(text: str) -> str:
    duration_s(text)
    return text


Count = Annotated[int | None, Field(ge=0, le=2**53)]
Usd = Annotated[float | None, Field(ge=0, le=1e6, strict=False)]
Duration = Annotated[str, AfterValidator(_duration)]


class LimitsShape(Shape):
    """See `caller.Limits`."""

    requests_per_minute: Count = None
    tokens_per_minute: Count = None
    concurrency: Count = None
    tokens_per_day: Count = None
    tokens_per_month: Count = None
    usd_per_day: Usd = None
    usd_per_month: Usd = None


class NewKeyShape(Shape):
    """The body of POST /admin/keys. `expires` is a time from now on, such as 30d."""

    name: str
    kind: Literal["user", "admin"] = "user"
    team: str = ""
    tags: list[str] = Field(default_factory=list[str])
    tenant: str = ""
    models: Annotated[list[str], Field(min_length=1, max_length=_MODELS_MAX)] | None = None
    limits: LimitsShape | None = None
    expires: Duration | None = None


class RotateShape(Shape):
    """The body of POST /admin/keys/{id}/rotate: how long the old key still holds."""

    grace: Duration = "1h"


def router(service: Service) -> APIRouter:
    """The routes. What asks the database runs in a thread: it may block."""
    routes = APIRouter(prefix="/admin/keys")
    server = service.settings.server

    def admin() -> KeyAdmin:
        if service.keys is None:
            raise _NoKeys("This server keeps no virtual keys: accounts.enabled is false.")
        return service.keys

    @routes.get("")
    async def list_keys(request: Request) -> Response:
        await service.identity.administrator(request)
        Query(request.query_params)
        found = await asyncio.to_thread(admin().list)
        return json_response({"now_s": service.clock.wall(), "keys": [_shown(admin(), key) for key in found]})

    @routes.post("")
    async def create(request: Request) -> Response:
        actor = await service.identity.administrator(request)
        wanted = _wanted(await read_shape(request, NewKeyShape, {}, server))
        key, text = await asyncio.to_thread(lambda: admin().create(wanted, actor=actor))
        return json_response({"key": text, **_shown(admin(), key)}, status=201, headers=_NOT_KEPT)

    @routes.delete("/{key_id}")
    async def revoke(request: Request, key_id: str) -> Response:
        actor = await service.identity.administrator(request)
        key = await asyncio.to_thread(lambda: admin().revoke(key_id, actor=actor))
        return json_response(_shown(admin(), key))

    @routes.post("/{key_id}/rotate")
    async def rotate(request: Request, key_id: str) -> Response:
        actor = await service.identity.administrator(request)
        grace_s = duration_s((await read_shape(request, RotateShape, {}, server)).grace)
        key, text = await asyncio.to_thread(lambda: admin().rotate(key_id, grace_s=grace_s, actor=actor))
        return json_response({"key": text, **_shown(admin(), key)}, headers=_NOT_KEPT)

    return routes


def _wanted(shape: NewKeyShape) -> NewKey:
    return NewKey(
        name=shape.name,
        kind=shape.kind,
        team=shape.team,
        tags=tuple(shape.tags),
        tenant=shape.tenant,
        models=None if shape.models is None else frozenset(shape.models),
        limits=NOBODY.limits if shape.limits is None else Limits(**shape.limits.model_dump()),
        expires_s=None if shape.expires is None else duration_s(shape.expires),
    )


def _shown(admin: KeyAdmin, key: StoredKey) -> dict[str, Any]:
    return {**shown(key), "state": admin.state(key)}
