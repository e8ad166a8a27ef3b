"""POST /v1/responses; what would be stored is never there: GET and DELETE /v1/responses/{id}."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.errors import RequestError
from stockpot.wire.arrival import arrival_of
from stockpot.wire.body import read_shape
from stockpot.wire.cache_marker import with_marked_boundaries
from stockpot.wire.delivery import CollectedAnswer, StreamedAnswer
from stockpot.wire.edge import new_id
from stockpot.wire.responses_answer import ResponseCollector, ResponseNarrator, response_begun
from stockpot.wire.responses_translate import responses_request, wants_logprobs
from stockpot.wire.service import Service
from stockpot.wire.shapes_responses import ResponsesShape


class _NotStored(RequestError):
    """A response is asked for after it was given."""

    status = 404
    code = "response_not_stored"


def router(service: Service) -> APIRouter:
    """The routes of the Responses API."""
    routes = APIRouter()
    server, clock = service.settings.server, service.clock

    async def create(request: Request) -> Response:
        # Made here, not taken from the client's X-Request-Id: backends may rely on its being unique.
        answer_id = f"resp_{new_id()}"
        arrival = await arrival_of(service, request, answer_id)
        shape = await read_shape(request, ResponsesShape, {}, server)
        wanted = with_marked_boundaries(responses_request(shape, arrival), service.settings.cache.marker)
        service.asked(request, answer_id, "openai-responses")
        events = service.backend.generate(wanted)
        begun = response_begun(shape, id=answer_id, created_s=int(clock.wall()))
        logprobs = wants_logprobs(shape)
        if shape.stream:
            return StreamedAnswer(
                events,
                ResponseNarrator(begun, logprobs=logprobs, clock=clock),
                progress_events=arrival.wants_events,
            )
        return CollectedAnswer(events, ResponseCollector(begun, logprobs=logprobs, clock=clock))

    async def stored(request: Request) -> Response:
        await arrival_of(service, request, "")
        raise _NotStored(
            f"There is no response {request.path_params['response_id'][:100]!r}: this server keeps no answers"
            " ('store' is always false); use the answer as it was sent.",
            param="response_id",
        )

    routes.add_route("/v1/responses", create, methods=["POST"])
    routes.add_route("/v1/responses/{response_id}", stored, methods=["GET", "DELETE"])
    routes.add_route("/v1/responses/{response_id}/cancel", stored, methods=["POST"])
    routes.add_route("/v1/responses/{response_id}/input_items", stored, methods=["GET"])
    return routes
