"""What operators see and do of the KV cache: /admin/cache/..., for administrators alone."""

from __future__ import annotations

import uuid

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.backends.cache_admin import CacheAdmin, InvalidationOrder, PrefixSelector
from stockpot.context.marker import split_marked
from stockpot.errors import RequestError
from stockpot.requests import ChatRequest, Generation
from stockpot.wire.body import read_shape
from stockpot.wire.cache_marker import with_marked_boundaries
from stockpot.wire.errors import json_response
from stockpot.wire.service import Service
from stockpot.wire.shapes_cache import (
    ExportShape,
    InvalidateShape,
    NoFields,
    PinShape,
    PromptStart,
    Query,
    WarmShape,
    duration_s,
)
from stockpot.wire.shapes_chat import ChatShape
from stockpot.wire.translate import Arrival, chat_request, messages_of

_MOST_ENTRIES = 10_000
_MOST_REQUESTS = 2_048
_RESTRICTED_BY_TENANT = ("tag", "document", "prefix")


class _NoCacheAdmin(RequestError):
    """The backend has no KV cache of its own."""

    status = 501
    code = "no_cache_admin"


class _NotThere(RequestError):
    """A request or a pin that is not known (any more)."""

    status = 404


def router(service: Service) -> APIRouter:
    """The routes under /admin/cache."""
    routes = APIRouter(prefix="/admin/cache")
    _add_looking(routes, service)
    _add_pins(routes, service)
    _add_doing(routes, service)
    return routes


def _add_looking(routes: APIRouter, service: Service) -> None:
    """Routes that change nothing. `now_s` is the server's clock, for whoever wants to say "ago"."""

    @routes.get("/stats")
    async def stats(request: Request) -> Response:
        await service.identity.administrator(request)
        Query(request.query_params)
        return json_response(service.backend.cache_stats())

    @routes.get("/entries")
    async def entries(request: Request) -> Response:
        await service.identity.administrator(request)
        query = Query(request.query_params, "limit", "tenant")
        limit, tenant = query.count("limit", 50, most=_MOST_ENTRIES), query.tenant("tenant")
        found = await _admin(service).entries(limit=limit, tenant=tenant)
        return json_response({"now_s": service.clock.wall(), "entries": found})

    @routes.get("/explain")
    async def recent(request: Request) -> Response:
        await service.identity.administrator(request)
        count = Query(request.query_params, "count").count("count", 20, most=_MOST_REQUESTS)
        found = await _admin(service).recent(count)
        return json_response({"now_s": service.clock.wall(), "requests": found})

    @routes.get("/explain/{request_id:path}")
    async def explain(request: Request, request_id: str) -> Response:
        await service.identity.administrator(request)
        Query(request.query_params)
        figures = await _admin(service).explain(request_id)
        if figures is None:
            raise _NotThere(
                f"The request {request_id[:100]!r} cannot be explained: it never got a place in the batch, or"
                " too many came after it. The others: GET /admin/cache/explain ('stockpot cache explain').",
                code="unknown_request",
            )
        return json_response({"now_s": service.clock.wall(), **figures})


def _add_pins(routes: APIRouter, service: Service) -> None:
    @routes.get("/pins")
    async def pins(request: Request) -> Response:
        await service.identity.administrator(request)
        Query(request.query_params)
        return json_response({"now_s": service.clock.wall(), "pins": await _admin(service).pins()})

    @routes.post("/pins")
    async def pin(request: Request) -> Response:
        actor = await service.identity.administrator(request)
        shape = await read_shape(request, PinShape, {}, service.settings.server)
        if (shape.for_s is None) == (shape.for_ is None):
            raise RequestError("Send either 'for_s' (seconds) or 'for' (such as '2h').", param="for")
        for_s = duration_s(shape.for_) if shape.for_ is not None else shape.for_s or 0.0
        prefix = _prefix(service, shape, shape.tenant)
        await service.audit(actor, "cache.pin", shape.tenant, owner=shape.owner, for_s=for_s)
        pinned = await _admin(service).pin(prefix, owner=shape.owner, for_s=for_s)
        return json_response({"now_s": service.clock.wall(), **pinned})

    @routes.delete("/pins/{pin}")
    async def unpin(request: Request, pin: str) -> Response:
        actor = await service.identity.administrator(request)
        await service.audit(actor, "cache.unpin", pin[:100])
        if not await _admin(service).unpin(pin):
            raise _NotThere(
                f"There is no pin {pin[:100]!r} (any more): it was given back, or its time has passed. "
                "GET /admin/cache/pins ('stockpot cache pins') lists all.",
                code="unknown_pin",
            )
        return json_response({"pin": pin, "unpinned": True})


def _add_doing(routes: APIRouter, service: Service) -> None:
    server = service.settings.server

    @routes.post("/invalidate")
    async def invalidate(request: Request) -> Response:
        actor = await service.identity.administrator(request)
        shape = await read_shape(request, InvalidateShape, {}, server)
        order = _order(service, shape, actor)
        where = {name: value for name in ("tenant", "by", "reason") if (value := getattr(shape, name))}
        await service.audit(actor, "cache.invalidate", f"{shape.kind}:{shape.value or ''}", **where)
        return json_response(await _admin(service).invalidate(order))

    @routes.post("/warm")
    async def warm(request: Request) -> Response:
        await service.identity.administrator(request)
        shape = await read_shape(request, WarmShape, {}, server)
        admin, model = _admin(service), shape.model or service.backend.models()[0].id
        prompt: ChatRequest | str
        if shape.prompt is not None and shape.messages is None:
            prompt = split_marked(shape.prompt, service.settings.cache.marker)[0]
        elif shape.messages is not None and shape.prompt is None:
            arrival = Arrival(
                f"warm-{uuid.uuid4().hex}", service.settings.engine.request_timeout_s, shape.tenant
            )
            chat = chat_request(ChatShape(model=model, messages=shape.messages), arrival)
            prompt = with_marked_boundaries(chat, service.settings.cache.marker)
        else:
            raise RequestError("Send either 'messages' or 'prompt'.", param="messages")
        return json_response(await admin.warm(prompt, model=model, tenant=shape.tenant))

    @routes.post("/verify")
    async def verify(request: Request) -> Response:
        await service.identity.administrator(request)
        # Nothing is asked for in a body; one that is there all the same must not ask for something.
        if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
            await read_shape(request, NoFields, {}, server)
        return json_response(await _admin(service).verify())

    @routes.post("/export")
    async def export(request: Request) -> Response:
        actor = await service.identity.administrator(request)
        shape = await read_shape(request, ExportShape, {}, server)
        await service.audit(actor, "cache.export", str(shape.folder))
        return json_response(await _admin(service).export(shape.folder))


def _admin(service: Service) -> CacheAdmin:
    admin = service.backend.cache_admin()
    if admin is None:
        raise _NoCacheAdmin(
            "This server has no KV cache of its own to administer: cache.enabled is false, or its backend"
            " keeps none."
        )
    return admin


def _prefix(service: Service, shape: PromptStart, tenant: str) -> PrefixSelector:
    if shape.given != 1:
        raise RequestError("Send exactly one of 'text', 'tokens' and 'messages'.", param="text")
    chat: ChatRequest | None = None
    marker = service.settings.cache.marker
    if shape.messages is not None:
        # Boundaries are left out: the tokens are the same without them. What is declared shared belongs to
        # nobody, so it is found with the tenant "".
        generation = Generation(service.backend.models()[0].id, "prefix", tenant=tenant)
        chat = with_marked_boundaries(ChatRequest(generation, messages_of(shape.messages)), marker)
    text = shape.text if shape.text is None else split_marked(shape.text, marker)[0]
    return PrefixSelector(text=text, tokens=shape.tokens, chat=chat, tenant=tenant)


def _order(service: Service, shape: InvalidateShape, actor: str) -> InvalidationOrder:
    """What is to be invalidated. Raises RequestError for fields that do not belong to the kind: half of
    what was meant must never be done."""
    kind = shape.kind
    if shape.given and kind != "prefix":
        raise RequestError(
            f"'text', 'tokens' and 'messages' are for the kind 'prefix', not for {kind!r}; remove them.",
            param="kind",
        )
    if (shape.value is None) != (kind in ("all", "prefix")):
        need = "takes no 'value'; remove it" if shape.value is not None else "needs a 'value'; add it"
        raise RequestError(f"The kind {kind!r} {need}.", param="value")
    if not shape.value and kind in ("tag", "document", "model"):
        raise RequestError("'value' must not be empty.", param="value")
    if shape.tenant is not None and kind not in _RESTRICTED_BY_TENANT:
        raise RequestError(
            f"'tenant' restricts a tag, document or prefix, not {kind!r}; remove it.", param="tenant"
        )
    return InvalidationOrder(
        kind=kind,
        value=shape.value or "",
        prefix=_prefix(service, shape, shape.tenant or "") if kind == "prefix" else None,
        tenant=shape.tenant,
        by=f"{shape.by} ({actor})" if shape.by is not None else actor,
        reason=shape.reason or "",
    )
