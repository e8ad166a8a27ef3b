"""The seam between the request path and whatever generates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from stockpot.backends.cache_admin import CacheAdmin
from stockpot.errors import UnsupportedField
from stockpot.events import Event
from stockpot.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Embeddings


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One entry of /v1/models. `details` are facts for people (layers, encoding, bytes of KV per token)."""

    id: str
    created: int
    owned_by: str
    context_tokens: int
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Health:
    """`ready` false means: do not send requests here; `reason` says why, for people."""

    ready: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in work and waiting, None where the backend does not say."""

    running: int | None = None
    waiting: int | None = None


class Backend(ABC):
    """Generates for one or more models.

    Called on the event loop only; never blocks it. Several requests run at once. Implementations hold no
    request after its stream has ended or been closed.
    """

    @abstractmethod
    async def start(self) -> None:
        """Bring the backend up; returns when requests can be served. Raises StockpotError."""

    @abstractmethod
    async def stop(self, *, drain: bool) -> None:
        """Refuse new requests; with `drain` let running ones finish, else end them as `cancelled`."""

    @abstractmethod
    def models(self) -> tuple[ModelCard, ...]:
        """What is served here."""

    @abstractmethod
    def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        """The request's events, in the order `stockpot.events` states.

        Raises RequestError (also UnknownModel, ContextLengthExceeded, QueueFull, ShuttingDown) before the
        first event, and EngineFailed or UpstreamError at any time. What the backend cannot honour of the
        request it refuses with UnsupportedField. Closing the stream (`aclose`) cancels the request:
        its place in the batch is free within one step, a connection to another server is closed.
        """

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        """Vectors of the inputs. Raises as `generate` does; UnsupportedField where there are none."""
        raise UnsupportedField(
            f"The model {request.generation.model!r} gives no embeddings; name one that does.", param="model"
        )

    def load(self) -> Load:
        """What the backend itself knows of its load; cheap."""
        return Load()

    @abstractmethod
    async def tokenize(
        self, model: str, content: str | ChatRequest, *, special: bool, tenant: str = ""
    ) -> list[int]:
        """Token ids of a text (`special`: control tokens in it are recognised), or of a rendered chat."""

    @abstractmethod
    def health(self) -> Health:
        """Cheap; called by probes."""

    @abstractmethod
    def cache_stats(self) -> Mapping[str, Any]:
        """Figures of the caches behind this backend, JSON-ready, for `stockpot cache stats` and /metrics."""

    def cache_admin(self) -> CacheAdmin | None:
        """What operators may do with the KV cache behind this backend; None where it has none of its own."""
        return None
