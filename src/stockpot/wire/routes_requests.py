"""GET /admin/requests: the last requests as they were sent, for administrators alone."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.errors import RequestError
from stockpot.telemetry.recording import RecordedRequest
from stockpot.wire.service import Service
from stockpot.wire.shapes_cache import Query

REQUESTS_MAX = 100_000


class _NotRecorded(RequestError):
    """Requests are not recorded here."""

    status = 501
    code = "not_recorded"


class RecordedRequests(msgspec.Struct, frozen=True):
    """Oldest first."""

    requests: list[RecordedRequest]


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.get("/admin/requests")
    async def requests(request: Request) -> Response:
        actor = await service.identity.administrator(request)
        query = Query(request.query_params, "limit", "tenant")
        limit, tenant = query.count("limit", 1_000, most=REQUESTS_MAX), query.tenant("tenant")
        if service.recording is None:
            raise _NotRecorded(
                'This server does not record requests: set telemetry.recording.mode = "on" in its settings,'
                " and start it again."
            )
        await service.audit(actor, "requests.read", tenant or "all", limit=limit)
        found = RecordedRequests(list(service.recording.last(limit, tenant)))
        return Response(msgspec.json.encode(found), media_type="application/json")

    return routes
