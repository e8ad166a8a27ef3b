"""A backend that speaks the Anthropic Messages API."""

from __future__ import annotations

from stockpot.backends.anthropic_events import AnthropicParser
from stockpot.backends.anthropic_render import render_messages
from stockpot.backends.prompt_estimate import CHARACTERS_PER_TOKEN, estimated_prompt_tokens
from stockpot.backends.refused_extras import refuse_extras_of
from stockpot.backends.remote import Cadence, Call, RemoteBackend
from stockpot.clock import Clock
from stockpot.errors import UnsupportedField
from stockpot.requests import ChatRequest, CompletionRequest
from stockpot.settings_gateway import BackendSettings

VERSION = "2023-06-01"
"""Sent as `anthropic-version`: the one there is."""


class AnthropicBackend(RemoteBackend):
    """Chats alone. `headers` of the settings may hold `anthropic-beta`."""

    def __init__(
        self, name: str, settings: BackendSettings, *, clock: Clock, cadence: Cadence | None = None
    ) -> None:
        headers = {} if "anthropic-version" in settings.headers else {"anthropic-version": VERSION}
        if settings.api_key is not None:
            headers["x-api-key"] = settings.api_key.get_secret_value()
        super().__init__(name, settings, clock=clock, headers=headers, cadence=cadence)

    def models_url(self) -> str:
        return f"{self.settings.url}/models?limit=1000"

    def call(self, request: ChatRequest | CompletionRequest, model: str) -> Call:
        if isinstance(request, CompletionRequest):
            raise UnsupportedField(
                f"The model {request.generation.model!r} continues no plain prompts; send a chat.",
                param="prompt",
            )
        if (
            request.generation.dialect == "anthropic"
        ):  # those of OpenAI are translated or refused by rendering
            refuse_extras_of("anthropic", request.generation.extras, self.settings.allow_extras)
        parser = AnthropicParser(
            self.upstream.fail,
            has_boundaries=bool(request.boundaries),
            prompt_characters=estimated_prompt_tokens(request) * CHARACTERS_PER_TOKEN,
        )
        return Call(f"{self.settings.url}/messages", render_messages(request, model), parser)

    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        del content, special, tenant
        raise UnsupportedField(
            f"The backend {self.name!r} of the model {model!r} tells no token ids.", param="model"
        )
