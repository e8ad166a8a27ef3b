"""What probes and monitoring ask: GET /health, /ready, /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from stockpot.wire.errors import json_response
from stockpot.wire.service import Service

_PROBE_METHODS = ["GET", "HEAD"]  # load balancers ask either way


def router(service: Service) -> APIRouter:
    """The routes of operation."""
    routes = APIRouter()

    @routes.api_route("/health", methods=_PROBE_METHODS)
    async def health() -> Response:
        """The process is alive; says nothing of the model."""
        return json_response({"status": "ok"})

    @routes.api_route("/ready", methods=_PROBE_METHODS)
    async def ready() -> Response:
        """Requests can be served: 200, or 503 with the reason."""
        state = service.backend.health()
        if state.ready:
            return json_response({"status": "ready"})
        return json_response(
            {"status": "not ready", "reason": state.reason}, status=503, headers={"retry-after": "1"}
        )

    @routes.get("/metrics")
    async def metrics(request: Request) -> Response:
        if service.settings.access.metrics == "admin":
            await service.identity.administrator(request)
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return routes
