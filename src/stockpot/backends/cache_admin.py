"""The seam to what operators do with a KV cache: look, pin, warm, invalidate, verify, export, explain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stockpot.requests import ChatRequest

InvalidationKind = Literal["all", "tenant", "tag", "document", "model", "prefix"]

Figures = Mapping[str, Any]
"""JSON-ready. Times are Unix seconds unless their name says otherwise."""


@dataclass(frozen=True, slots=True)
class PrefixSelector:
    """A prefix of prompts: a text as /v1/completions takes it, token ids, or the beginning of a conversation.
    Exactly one is given. `tenant` is whose, "" the prompts that belong to nobody."""

    text: str | None = None
    tokens: Sequence[int] | None = None
    chat: ChatRequest | None = None
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class InvalidationOrder:
    """What to invalidate. `value` is the tenant, tag, document or model; `prefix` goes with that kind alone.
    `tenant` restricts a tag, document or prefix; None is all tenants."""

    kind: InvalidationKind
    value: str = ""
    prefix: PrefixSelector | None = None
    tenant: str | None = None
    by: str = ""
    reason: str = ""


class CacheAdmin(ABC):
    """On the event loop; never blocks it. Every method may raise RequestError for values that do not fit."""

    @abstractmethod
    async def entries(self, *, limit: int, tenant: str | None) -> Sequence[Figures]:
        """The prefixes in RAM, last used first: one for each end of a path (`id`, `tokens`, `bytes`,
        `tenant`, `tags`, `used_s`, `created_s`, `kept_until_s`, `pins`, `hits`, `request`, `text`: how it
        begins and ends)."""

    @abstractmethod
    async def explain(self, request_id: str) -> Figures | None:
        """Why a recent request was found as far as it was; None for one that is too long ago."""

    @abstractmethod
    async def recent(self, count: int) -> Sequence[Figures]:
        """The last requests that can be explained, newest first, a line each."""

    @abstractmethod
    async def pin(self, prefix: PrefixSelector, *, owner: str, for_s: float) -> Figures:
        """Keep what is in RAM of a prefix until unpinned or so much later: `pin`, `tokens` (how much of it is
        there), `expires_s`. Raises RequestError (code `prefix_not_cached`) where nothing of it is there."""

    @abstractmethod
    async def unpin(self, pin: str) -> bool:
        """Give a pin back; False for one that does not exist (any more)."""

    @abstractmethod
    async def pins(self) -> Sequence[Figures]:
        """All pins: `pin`, `owner`, `tokens`, `bytes`, `expires_s`."""

    @abstractmethod
    async def invalidate(self, order: InvalidationOrder) -> Figures:
        """Make what matches unusable on all nodes: `epoch`, `pending` (other nodes cannot be told yet),
        `blocks` (dropped from RAM here)."""

    @abstractmethod
    async def warm(self, prompt: ChatRequest | str, *, model: str, tenant: str) -> Figures:
        """Prefill a prompt so that it is in the cache: `prompt_tokens`, `cached_tokens`, `seconds`."""

    @abstractmethod
    async def verify(self) -> Figures:
        """Read and check every block on disk: `checked`, `sound`, `refused` (by cause), `seconds`."""

    @abstractmethod
    async def export(self, folder: str) -> Figures:
        """Write all blocks of RAM and disk into a folder that a server can use as its disk tier: `blocks`,
        `bytes`, `folder`."""
