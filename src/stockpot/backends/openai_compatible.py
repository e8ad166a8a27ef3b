"""A backend that speaks the OpenAI API: hosted ones, vLLM, SGLang, llama-server, another Stockpot."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, cast

import msgspec

from stockpot.backends.openai_events import OpenAIParser
from stockpot.backends.openai_render import render_chat, render_completion, render_embedding, render_prompt
from stockpot.backends.prompt_estimate import CHARACTERS_PER_TOKEN, estimated_prompt_tokens
from stockpot.backends.remote import Cadence, Call, RemoteBackend
from stockpot.clock import Clock
from stockpot.errors import UnsupportedField
from stockpot.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Embeddings
from stockpot.settings_gateway import BackendSettings


class OpenAIBackend(RemoteBackend):
    """`settings.server` says what the server knows beyond the API."""

    def __init__(
        self, name: str, settings: BackendSettings, *, clock: Clock, cadence: Cadence | None = None
    ) -> None:
        key = settings.api_key
        headers = {"authorization": f"Bearer {key.get_secret_value()}"} if key is not None else {}
        super().__init__(name, settings, clock=clock, headers=headers, cadence=cadence)

    def models_url(self) -> str:
        return f"{self.settings.url}/models"

    def call(self, request: ChatRequest | CompletionRequest, model: str) -> Call:
        server, allowed = self.settings.server, self.settings.allow_extras
        if isinstance(request, ChatRequest):
            url = f"{self.settings.url}/chat/completions"
            body = render_chat(request, model, server, allowed)
        else:
            url = f"{self.settings.url}/completions"
            body = render_completion(request, model, server, allowed)
        parser = OpenAIParser(
            self.upstream.fail,
            choices=request.generation.choices,
            prompt_characters=estimated_prompt_tokens(request) * CHARACTERS_PER_TOKEN,
        )
        return Call(url, body, parser)

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        model = self.upstream_model(request.generation.model)
        answer = await self.post(
            f"{self.settings.url}/embeddings",
            render_embedding(request, model, self.settings.server, self.settings.allow_extras),
            request.generation,
        )
        try:
            told = msgspec.convert(answer, _EmbeddingAnswer)
        except msgspec.ValidationError as error:
            raise self.upstream.fail.error(
                "format", f"gave embeddings that cannot be read: {error}."
            ) from error
        if len(told.data) != len(request.inputs):
            raise self.upstream.fail.error(
                "format", f"gave {len(told.data)} embeddings for {len(request.inputs)} inputs."
            )
        in_order = sorted(told.data, key=lambda entry: entry.index)
        if any(isinstance(entry.embedding, str) and not _is_floats(entry.embedding) for entry in in_order):
            raise self.upstream.fail.error(
                "format", "gave an embedding that is no base64 of 32-bit numbers; it works with no client."
            )
        # 0 where it does not say: who counts what was used estimates it.
        tokens = told.usage.prompt_tokens if told.usage is not None else 0
        vectors = cast(Any, [entry.embedding for entry in in_order])
        return Embeddings(request.generation.model, vectors, tokens)

    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        del tenant
        upstream = self.upstream_model(model)
        match self.settings.server:
            case "vllm":
                answer = await self._ask("/tokenize", self._vllm_tokenize(upstream, content, special))
            case "llama-server":
                answer = await self._llama_tokenize(upstream, content, special)
            case "stockpot":
                if isinstance(content, str):
                    body = {"model": upstream, "text": content, "special": special}
                else:
                    body = render_prompt(content, upstream, "stockpot")
                answer = await self._ask("/tokenize", body)
            case "generic" | "sglang":
                raise UnsupportedField(
                    f"The backend {self.name!r} of the model {model!r} tells no token ids.", param="model"
                )
        try:
            return msgspec.convert(answer, _Tokens).tokens
        except msgspec.ValidationError as error:
            raise self.upstream.fail.error(
                "format", f"gave token ids that cannot be read: {error}."
            ) from error

    def _vllm_tokenize(self, model: str, content: str | ChatRequest, special: bool) -> Mapping[str, Any]:
        """With `special`, a text gets what begins every prompt, as it does when it is to be continued."""
        if isinstance(content, str):
            return {"model": model, "prompt": content, "add_special_tokens": special}
        return {**render_prompt(content, model, "vllm"), "add_generation_prompt": True}

    async def _llama_tokenize(self, model: str, content: str | ChatRequest, special: bool) -> Any:
        """As `_vllm_tokenize`; a chat is rendered first, and its template writes control tokens."""
        if isinstance(content, str):
            text = content
        else:
            rendered = await self._ask("/apply-template", render_prompt(content, model, "llama-server"))
            text, special = str(_field(rendered, "prompt")), True
        return await self._ask(
            "/tokenize", {"content": text, "add_special": special, "parse_special": special}
        )

    async def _ask(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self.post(self.root + path, msgspec.json.encode(body), None)


def _is_floats(text: str) -> bool:
    """Whether it is base64 of one 32-bit number or more."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return bool(data) and len(data) % 4 == 0


class _Embedding(msgspec.Struct):
    embedding: list[float] | str
    index: int = 0


class _EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int = 0


class _EmbeddingAnswer(msgspec.Struct):
    data: list[_Embedding]
    usage: _EmbeddingUsage | None = None


class _Tokens(msgspec.Struct):
    tokens: list[int]


def _field(answer: Any, name: str) -> Any:
    return cast(dict[str, Any], answer).get(name, "") if isinstance(answer, dict) else ""
