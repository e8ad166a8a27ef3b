"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.wire.anthropic_answer import MessageCollector, MessageNarrator
from stockpot.wire.anthropic_translate import counted_request, messages_request
from stockpot.wire.arrival import arrival_of, check_model
from stockpot.wire.body import read_shape
from stockpot.wire.cache_marker import with_marked_boundaries
from stockpot.wire.delivery import CollectedAnswer, StreamedAnswer
from stockpot.wire.edge import new_id
from stockpot.wire.errors import json_response
from stockpot.wire.service import Service
from stockpot.wire.shapes_anthropic import MessagesShape, PromptShape


class TokenCount(msgspec.Struct, frozen=True):
    """How many tokens a prompt has."""

    input_tokens: int


def router(service: Service) -> APIRouter:
    """The routes of the Anthropic API."""
    routes = APIRouter()
    server = service.settings.server

    async def messages(request: Request) -> Response:
        # Made here, not taken from the client's X-Request-Id: backends may rely on its being unique.
        answer_id = f"msg_{new_id()}"
        arrival = await arrival_of(service, request, answer_id)
        shape = await read_shape(request, MessagesShape, {}, server)
        wanted = with_marked_boundaries(messages_request(shape, arrival), service.settings.cache.marker)
        service.asked(request, answer_id, "anthropic")
        events = service.backend.generate(wanted)
        if shape.stream:
            narrator = MessageNarrator(id=answer_id, model=shape.model)
            return StreamedAnswer(events, narrator, dialect="anthropic", progress_events=arrival.wants_events)
        collector = MessageCollector(id=answer_id, model=shape.model)
        return CollectedAnswer(events, collector, dialect="anthropic")

    async def count_tokens(request: Request) -> Response:
        arrival = await arrival_of(service, request, f"count_{new_id()}")
        shape = await read_shape(request, PromptShape, {}, server)
        check_model(arrival.caller, shape.model)
        counted = counted_request(shape, arrival)
        tokens = await service.backend.tokenize(shape.model, counted, special=False, tenant=arrival.tenant)
        return json_response(TokenCount(len(tokens)))

    # Plain routes: FastAPI would solve dependencies for each request, and there are none.
    routes.add_route("/v1/messages", messages, methods=["POST"])
    routes.add_route("/v1/messages/count_tokens", count_tokens, methods=["POST"])
    return routes
