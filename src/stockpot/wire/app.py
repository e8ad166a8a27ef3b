"""The HTTP application: routes, error mapping and the edge, put together."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from stockpot import __version__
from stockpot.backends.backend import Backend
from stockpot.clock import Clock, SystemClock
from stockpot.errors import StockpotError
from stockpot.settings import Settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire import (
    openapi,
    routes_accounts,
    routes_anthropic,
    routes_cache,
    routes_embeddings,
    routes_generation,
    routes_keys,
    routes_models,
    routes_operation,
    routes_recall,
    routes_requests,
    routes_responses,
)
from stockpot.wire.edge import Edge
from stockpot.wire.errors import on_http_exception, on_stockpot_error
from stockpot.wire.identity import Identity
from stockpot.wire.service import Service
from stockpot.wire.straight import Straight


def create_app(
    backend: Backend, settings: Settings, metrics: Metrics, *, clock: Clock | None = None
) -> Application:
    """The application over a backend that somebody else starts and stops, without accounts."""
    clock = clock or SystemClock()
    return application(Service(backend, settings, metrics, clock, Identity(settings.access, clock=clock)))


class Application(FastAPI):
    """FastAPI, entered through `entry`, where one is set: what every request passes first, and what the
    busiest routes need of the framework, which is nothing. Its own layers cost a tenth of a short request."""

    entry: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.entry is None or scope["type"] != "http":
            await super().__call__(scope, receive, send)
        else:
            await self.entry(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        # The edge is the last resort for the unforeseen; this one would answer before it, in another shape.
        return stack.app if isinstance(stack, ServerErrorMiddleware) else stack

    async def framework(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The usual way in."""
        await super().__call__(scope, receive, send)


def application(service: Service) -> Application:
    """The application over parts that somebody else starts and stops."""
    # Bodies are read and checked by `body`, not declared to FastAPI: its own OpenAPI document would be wrong,
    # `openapi` writes ours.
    app = Application(
        title="Stockpot",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redirect_slashes=False,
        # Traces and metrics are ours (`telemetry`). FastAPI's own would tell all of it twice where a provider
        # is set for the whole process, and look for one with each request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    busiest = [
        part.router(service)
        for part in (routes_generation, routes_anthropic, routes_responses, routes_embeddings)
    ]
    for router in busiest:
        app.include_router(router)
    for part in (
        routes_models,
        routes_accounts,
        routes_keys,
        routes_cache,
        routes_recall,
        routes_requests,
        routes_operation,
        openapi,
    ):
        app.include_router(part.router(service))
    app.add_exception_handler(StockpotError, on_stockpot_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    straight = Straight(
        app.framework,
        routes=[route for router in busiest for route in router.routes],
        handlers={StockpotError: on_stockpot_error, ClientDisconnect: _on_disconnect},
    )
    app.entry = Edge(straight, metrics=service.metrics, clock=service.clock)
    return app


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """The client went away while it sent its body: whatever is answered, nobody reads it."""
    del request, error
    return Response(status_code=400)
