"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

import uuid

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.wire.body import read_shape
from stockpot.wire.chat_answer import ChatCollector, ChatNarrator
from stockpot.wire.completion_answer import CompletionCollector, CompletionNarrator
from stockpot.wire.delivery import CollectedAnswer, StreamedAnswer
from stockpot.wire.edge import request_id_of
from stockpot.wire.service import Service
from stockpot.wire.shapes_chat import ChatShape
from stockpot.wire.shapes_common import GenerationShape
from stockpot.wire.shapes_completion import CompletionShape
from stockpot.wire.tolerated import CHAT, COMPLETION
from stockpot.wire.translate import Arrival, chat_request, completion_request


def router(service: Service) -> APIRouter:
    """The routes that generate."""
    routes = APIRouter()
    server = service.settings.server
    longest_s = service.settings.engine.request_timeout_s

    def arrival(request: Request, answer_id: str) -> Arrival:
        """Raises Unauthenticated for a caller that is not known."""
        caller = service.identity.caller(request)
        return Arrival(answer_id, longest_s, caller.tenant, request_id_of(request))

    @routes.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        # Made here, not taken from the client's X-Request-Id: backends may rely on its being unique.
        answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        arrived = arrival(request, answer_id)
        shape = await read_shape(request, ChatShape, CHAT, server)
        wanted = chat_request(shape, arrived)
        created = int(service.clock.wall())
        events = service.backend.generate(wanted)
        if shape.stream:
            return StreamedAnswer(
                events,
                ChatNarrator(id=answer_id, created=created, model=shape.model, usage=_wants_usage(shape)),
            )
        return CollectedAnswer(
            events,
            ChatCollector(
                id=answer_id,
                created=created,
                model=shape.model,
                choices=wanted.generation.choices,
                logprobs=bool(shape.logprobs),
            ),
        )

    @routes.post("/v1/completions")
    async def completion(request: Request) -> Response:
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        arrived = arrival(request, answer_id)
        shape = await read_shape(request, CompletionShape, COMPLETION, server)
        wanted = completion_request(shape, arrived)
        created, choices = int(service.clock.wall()), wanted.generation.choices
        events = service.backend.generate(wanted)
        if shape.stream:
            return StreamedAnswer(
                events,
                CompletionNarrator(
                    id=answer_id,
                    created=created,
                    model=shape.model,
                    choices=choices,
                    usage=_wants_usage(shape),
                ),
            )
        return CollectedAnswer(
            events,
            CompletionCollector(
                id=answer_id,
                created=created,
                model=shape.model,
                choices=choices,
                logprobs=shape.logprobs is not None,
            ),
        )

    return routes


def _wants_usage(shape: GenerationShape) -> bool:
    return bool(shape.stream_options and shape.stream_options.include_usage)
