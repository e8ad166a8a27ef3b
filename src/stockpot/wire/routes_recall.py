"""Answers that are kept: POST /v1/feedback for callers, /admin/recall/... for administrators."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.errors import RequestError
from stockpot.recall.administration import RecallAdministration
from stockpot.wire.body import read_shape
from stockpot.wire.errors import json_response
from stockpot.wire.service import Service
from stockpot.wire.shapes_cache import Query
from stockpot.wire.shapes_recall import FeedbackShape, InvalidateAnswersShape

_MOST_ENTRIES = 10_000


class _NothingKept(RequestError):
    """Answers are not kept here."""

    status = 501
    code = "no_recall"


class _NotThere(RequestError):
    """An entry that is not known (any more), or not to the caller."""

    status = 404
    code = "unknown_entry"


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/feedback")
    async def feedback(request: Request) -> Response:
        caller = await service.identity.caller(request)
        shape = await read_shape(request, FeedbackShape, {}, service.settings.server)
        if (shape.request_id is None) == (shape.entry is None):
            raise RequestError("Send either 'request_id' or 'entry'.", param="request_id")
        came = await _recall(service).feedback(
            caller, entry=shape.entry, request_id=shape.request_id, right=shape.verdict == "right"
        )
        if came is None:
            raise _NotThere(
                "No kept answer of yours is known by that id (any more): it may have been taken out, or the"
                " request may have been answered anew."
            )
        return json_response({"entry": came.entry, "removed": came.removed, "learnt": came.learnt})

    @routes.get("/admin/recall")
    async def report(request: Request) -> Response:
        await service.identity.administrator(request)
        Query(request.query_params)
        return json_response({"now_s": service.clock.wall(), **await _recall(service).report()})

    @routes.get("/admin/recall/entries")
    async def entries(request: Request) -> Response:
        await service.identity.administrator(request)
        query = Query(request.query_params, "limit", "tenant")
        limit, tenant = query.count("limit", 50, most=_MOST_ENTRIES), query.tenant("tenant")
        return json_response({"entries": await _recall(service).entries(limit, tenant)})

    @routes.get("/admin/recall/entries/{entry_id}")
    async def entry(request: Request, entry_id: str) -> Response:
        await service.identity.administrator(request)
        Query(request.query_params)
        recall = _recall(service)
        found: dict[str, Any] | None = None
        if len(entry_id) == 32 and set(entry_id) <= set("0123456789abcdef"):
            found = await recall.entry(entry_id)
        if found is None:
            raise _NotThere(f"There is no entry {entry_id[:100]!r} (any more).")
        return json_response(found)

    @routes.post("/admin/recall/invalidate")
    async def invalidate(request: Request) -> Response:
        actor = await service.identity.administrator(request)
        shape = await read_shape(request, InvalidateAnswersShape, {}, service.settings.server)
        selector, recall = shape.selector(), _recall(service)
        detail = shape.model_dump(exclude_none=True, exclude_defaults=True)
        await service.audit(actor, "recall.invalidate", "answers", **detail)
        return json_response({"removed": await recall.invalidate(selector)})

    return routes


def _recall(service: Service) -> RecallAdministration:
    if service.recall is None:
        raise _NothingKept(
            "This server keeps no answers: set recall.exact or recall.semantic.mode in its settings."
        )
    return service.recall
