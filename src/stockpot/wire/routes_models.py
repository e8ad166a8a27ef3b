"""GET /v1/models, /v1/models/{id}; POST /tokenize."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from stockpot.backends.backend import ModelCard
from stockpot.caller import Caller
from stockpot.errors import RequestError, UnknownModel
from stockpot.requests import ChatRequest, Generation
from stockpot.wire.body import read_shape
from stockpot.wire.errors import json_response
from stockpot.wire.service import Service
from stockpot.wire.shapes_completion import TokenizeShape
from stockpot.wire.translate import messages_of


class ModelBody(msgspec.Struct, frozen=True, tag_field="object", tag="model"):
    """OpenAI's model object; `context_tokens` and `details` are ours."""

    id: str
    created: int
    owned_by: str
    context_tokens: int
    details: Mapping[str, Any]


class ModelList(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """All models served here."""

    data: list[ModelBody]


class Tokens(msgspec.Struct, frozen=True):
    """Token ids, how many they are, and how many the model's context holds."""

    model: str
    tokens: list[int]
    count: int
    context_tokens: int


def router(service: Service) -> APIRouter:
    """The routes about models and their vocabularies."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models(request: Request) -> Response:
        caller = await service.identity.caller(request)
        return json_response(ModelList([_body(card) for card in _cards(service, caller)]))

    @routes.get("/v1/models/{model_id:path}")
    async def model(request: Request, model_id: str) -> Response:
        caller = await service.identity.caller(request)
        return json_response(_body(_card(service, caller, model_id)))

    @routes.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        caller = await service.identity.caller(request)
        shape = await read_shape(request, TokenizeShape, {}, service.settings.server)
        if (shape.text is None) == (shape.messages is None):
            raise RequestError("Send either 'text' or 'messages'.", param="text")
        card = _card(service, caller, shape.model)
        content: str | ChatRequest
        if shape.messages is not None:
            # Boundaries are left out: the tokens are the same without them, and nothing is kept.
            generation = Generation(shape.model, "tokenize", tenant=caller.tenant)
            content = ChatRequest(generation, messages_of(shape.messages))
        else:
            content = shape.text or ""
        tokens = await service.backend.tokenize(
            shape.model, content, special=shape.special, tenant=caller.tenant
        )
        return json_response(Tokens(shape.model, tokens, len(tokens), card.context_tokens))

    return routes


def _cards(service: Service, caller: Caller) -> list[ModelCard]:
    """What the caller may use."""
    cards = service.backend.models()
    return [card for card in cards if caller.models is None or card.id in caller.models]


def _card(service: Service, caller: Caller, model_id: str) -> ModelCard:
    cards = _cards(service, caller)
    for card in cards:
        if card.id == model_id:
            return card
    served = ", ".join(repr(card.id) for card in cards)
    raise UnknownModel(
        f"The model {model_id[:100]!r} is not served here; served: {served or 'none'}.", param="model"
    )


def _body(card: ModelCard) -> ModelBody:
    return ModelBody(card.id, card.created, card.owned_by, card.context_tokens, card.details)
