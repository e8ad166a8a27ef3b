"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.wire.arrival import Arrival, arrival_of
from stockpot.wire.body import read_extensible
from stockpot.wire.cache_marker import with_marked_boundaries
from stockpot.wire.chat_answer import ChatCollector, ChatNarrator
from stockpot.wire.completion_answer import CompletionCollector, CompletionNarrator
from stockpot.wire.delivery import CollectedAnswer, StreamedAnswer
from stockpot.wire.edge import new_id
from stockpot.wire.service import Service
from stockpot.wire.shapes_chat import ChatShape
from stockpot.wire.shapes_common import GenerationShape
from stockpot.wire.shapes_completion import CompletionShape
from stockpot.wire.translate import chat_request, completion_request


def router(service: Service) -> APIRouter:
    """The routes that generate."""
    routes = APIRouter()
    server, clock = service.settings.server, service.clock
    marker = service.settings.cache.marker

    async def chat(request: Request) -> Response:
        # Made here, not taken from the client's X-Request-Id: backends may rely on its being unique.
        answer_id = f"chatcmpl-{new_id()}"
        arrival = await arrival_of(service, request, answer_id)
        shape, extras = await read_extensible(request, ChatShape, server)
        wanted = with_marked_boundaries(chat_request(shape, arrival, extras), marker)
        service.asked(request, answer_id, "openai-chat")
        events, created = service.backend.generate(wanted), int(clock.wall())
        if shape.stream:
            narrator = ChatNarrator(
                id=answer_id, created=created, model=shape.model, usage=_wants_usage(shape)
            )
            return StreamedAnswer(events, narrator, progress_events=_wants_progress(shape, arrival))
        collector = ChatCollector(
            id=answer_id,
            created=created,
            model=shape.model,
            choices=wanted.generation.choices,
            logprobs=bool(shape.logprobs),
        )
        return CollectedAnswer(events, collector)

    async def completion(request: Request) -> Response:
        answer_id = f"cmpl-{new_id()}"
        arrival = await arrival_of(service, request, answer_id)
        shape, extras = await read_extensible(request, CompletionShape, server)
        wanted = with_marked_boundaries(completion_request(shape, arrival, extras), marker)
        service.asked(request, answer_id, "completion")
        events, created = service.backend.generate(wanted), int(clock.wall())
        choices = wanted.generation.choices
        if shape.stream:
            narrator = CompletionNarrator(
                id=answer_id, created=created, model=shape.model, choices=choices, usage=_wants_usage(shape)
            )
            return StreamedAnswer(events, narrator, progress_events=_wants_progress(shape, arrival))
        collector = CompletionCollector(
            id=answer_id,
            created=created,
            model=shape.model,
            choices=choices,
            logprobs=shape.logprobs is not None,
        )
        return CollectedAnswer(events, collector)

    # Plain routes: FastAPI would solve dependencies for each request, and there are none.
    routes.add_route("/v1/chat/completions", chat, methods=["POST"])
    routes.add_route("/v1/completions", completion, methods=["POST"])
    return routes


def _wants_usage(shape: GenerationShape) -> bool:
    return bool(shape.stream_options and shape.stream_options.include_usage)


def _wants_progress(shape: GenerationShape, arrival: Arrival) -> bool:
    return arrival.wants_events or bool(shape.stream_options and shape.stream_options.include_progress)
