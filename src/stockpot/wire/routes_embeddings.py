"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Literal, cast

import msgspec
import numpy as np
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from stockpot.errors import RequestError
from stockpot.requests import EmbeddingRequest, Embeddings, Generation
from stockpot.wire.arrival import arrival_of, label_of, session_of
from stockpot.wire.body import read_extensible
from stockpot.wire.disconnect import ClientGone, while_connected
from stockpot.wire.edge import new_id
from stockpot.wire.errors import json_response
from stockpot.wire.service import Service
from stockpot.wire.shapes_embeddings import EmbeddingsShape

Encoding = Literal["float", "base64"]


class EmbeddingBody(msgspec.Struct, frozen=True, tag_field="object", tag="embedding"):
    """One vector, as numbers or as base64 of little-endian float32."""

    index: int
    embedding: Sequence[float] | str


class EmbeddingUsage(msgspec.Struct, frozen=True):
    """Token counts of all inputs together."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """The whole body."""

    data: list[EmbeddingBody]
    model: str
    usage: EmbeddingUsage


def router(service: Service) -> APIRouter:
    """The route of embeddings."""
    routes = APIRouter()

    async def embeddings(request: Request) -> Response:
        arrival = await arrival_of(service, request, f"embd-{new_id()}")
        shape, extras = await read_extensible(request, EmbeddingsShape, service.settings.server)
        if shape.timeout is not None and shape.timeout > arrival.longest_s:
            raise RequestError(
                f"'timeout' must be at most {arrival.longest_s:g} seconds, this server's own limit"
                f" (engine.request_timeout_s); got {shape.timeout:g}.",
                param="timeout",
            )
        encoding: Encoding = shape.encoding_format or "float"
        wanted = EmbeddingRequest(
            Generation(
                model=shape.model,
                request_id=arrival.request_id,
                deadline_s=shape.timeout or arrival.longest_s,
                tenant=arrival.tenant,
                client_request_id=arrival.client_request_id,
                caller=arrival.caller,
                session=session_of(arrival, extras.get("user")),
                task=arrival.task,
                user=label_of(extras.get("user")),
                priority=arrival.priority,
                extras=extras,
                trace_parent=arrival.trace_parent,
            ),
            cast(list[str] | list[list[int]], shape.input),
            encoding,
            shape.dimensions,
        )
        try:
            async with while_connected(request.receive):
                found = await service.backend.embed(wanted)
        except ClientGone as error:
            raise ClientDisconnect from error
        return json_response(_body(found, encoding))

    routes.add_route("/v1/embeddings", embeddings, methods=["POST"])
    return routes


def _body(found: Embeddings, encoding: Encoding) -> EmbeddingList:
    data = [EmbeddingBody(index, _encoded(vector, encoding)) for index, vector in enumerate(found.vectors)]
    return EmbeddingList(data, found.model, EmbeddingUsage(found.prompt_tokens, found.prompt_tokens))


def _encoded(vector: Sequence[float] | str, encoding: Encoding) -> Sequence[float] | str:
    """The vector as it was asked for, whichever way the backend gave it."""
    if isinstance(vector, str):
        if encoding == "base64":
            return vector
        return np.frombuffer(base64.b64decode(vector), "<f4").tolist()
    if encoding == "float":
        return vector
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
