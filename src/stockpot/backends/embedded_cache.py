"""Operators' view of the embedded engine's KV cache."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from stockpot.backends.backend import Backend
from stockpot.backends.cache_admin import CacheAdmin, Figures, InvalidationOrder, PrefixSelector
from stockpot.backends.prompt_encoder import TokenIds
from stockpot.engine.core import EngineCore
from stockpot.engine.driver import Vocabulary
from stockpot.engine.engine import Engine
from stockpot.errors import ConfigurationError, QueueFull, RequestError
from stockpot.events import Completed
from stockpot.kv.block import TOKEN_BYTES, TokenKey, content_hash, token_key, tokens_of
from stockpot.kv.disk import DiskTier
from stockpot.kv.explanation import Divergence, Explanation
from stockpot.kv.invalidation import Invalidation
from stockpot.kv.operator_pins import OperatorPins
from stockpot.kv.prefix_tree import Node
from stockpot.kv.service import ENGINE_PATIENCE_S, CacheService
from stockpot.kv.tier import Block
from stockpot.requests import ChatRequest, CompletionRequest, Generation, Sampling

Result = TypeVar("Result")
Encode = Callable[[ChatRequest | CompletionRequest], Awaitable[TokenIds]]

RECORDS_COUNTED = 64
TEXT_TOKENS = 16
"""Shown of the beginning and of the end of a prefix."""


class EngineHost:
    """The engine's thread for the cache's own threads (`kv.service.CacheHost`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.pins = OperatorPins()
        # How many blocks the last records dropped, by epoch: the follower is often faster than who asked. On
        # the engine's thread alone.
        self.dropped: deque[tuple[int, int]] = deque(maxlen=RECORDS_COUNTED)

    def invalidate(self, records: Sequence[Invalidation]) -> int:
        def drop(core: EngineCore) -> int:
            counts = [(record.epoch, core.invalidate([record])) for record in records]
            self.dropped.extend(counts)
            return sum(blocks for _, blocks in counts)

        return self._do(drop)

    def resize(self, capacity_bytes: int) -> None:
        def tidy(core: EngineCore) -> None:
            if core.cache is not None:
                store = core.cache.store
                self.pins.expire(store, time.time())
                store.expire()
                if store.ram.capacity_bytes != capacity_bytes:
                    store.resize(capacity_bytes)

        self._do(tidy)

    def _do(self, errand: Callable[[EngineCore], Result]) -> Result:
        return self._engine.ask(errand).result(ENGINE_PATIENCE_S)


class EmbeddedCacheAdmin(CacheAdmin):
    """See `CacheAdmin`. `encode` makes token ids of a prompt as the engine would."""

    def __init__(
        self,
        backend: Backend,
        engine: Engine,
        host: EngineHost,
        service: CacheService,
        vocabulary: Vocabulary,
        *,
        encode: Encode,
        model: str,
    ) -> None:
        self._backend = backend
        self._engine = engine
        self._pins = host.pins
        self._dropped = host.dropped
        self._service = service
        self._vocabulary = vocabulary
        self._encode = encode
        self._model = model

    async def entries(self, *, limit: int, tenant: str | None) -> Sequence[Figures]:
        def collect(core: EngineCore) -> list[Node]:
            nodes = core.cache.store.nodes() if core.cache is not None else []
            ends = [n for n in nodes if not n.children and (tenant is None or n.head.tenant == tenant)]
            return sorted(ends, key=lambda node: node.used_s, reverse=True)[:limit]

        return [self._entry(node) for node in await self._ask(collect)]

    async def explain(self, request_id: str) -> Figures | None:
        explanation = self._service.cache.explanations.find(request_id)
        return None if explanation is None else self._explained(explanation)

    async def recent(self, count: int) -> Sequence[Figures]:
        return [
            {
                "request": each.request,
                "client_request": each.client_request,
                "tenant": each.tenant,
                "at_s": each.at_s,
                "prompt_tokens": each.prompt_tokens,
                "found_tokens": each.found_tokens,
                "first_cause": each.gaps[0].cause if each.gaps else "",
            }
            for each in self._service.cache.explanations.recent(count)
        ]

    async def pin(self, prefix: PrefixSelector, *, owner: str, for_s: float) -> Figures:
        key = await self._key(prefix)

        def pin(core: EngineCore) -> Figures | None:
            if core.cache is None:
                return None
            store = core.cache.store
            match = store.match(store.scope(prefix.tenant), key)
            if not match.tokens:
                return None
            return self._pins.add(store, match, owner=owner, expires_s=time.time() + for_s)

        pinned = await self._ask(pin)
        if pinned is None:
            raise RequestError(
                "Nothing of this prefix is in RAM; warm it first ('stockpot cache warm').",
                param="prefix",
                code="prefix_not_cached",
            )
        return {**pinned, "prefix_tokens": len(key) // TOKEN_BYTES}

    async def unpin(self, pin: str) -> bool:
        return await self._ask(
            lambda core: core.cache is not None and self._pins.remove(core.cache.store, pin)
        )

    async def pins(self) -> Sequence[Figures]:
        return await self._ask(lambda core: self._pins.listed(core.cache.store) if core.cache else [])

    async def invalidate(self, order: InvalidationOrder) -> Figures:
        value, tokens = order.value, 0
        if order.kind == "prefix":
            if order.prefix is None:
                raise RequestError("A prefix is needed for the kind 'prefix'; add it.", param="prefix")
            key = await self._key(order.prefix)
            value, tokens = content_hash(key).hex(), len(key) // TOKEN_BYTES
        follower = self._service.follower

        def append() -> Invalidation:
            return follower.append(
                order.kind, value, tokens=tokens, tenant=order.tenant, by=order.by, reason=order.reason
            )

        try:
            record = await asyncio.to_thread(append)
        except ValueError as error:
            raise RequestError(f"This cannot be invalidated: {error}.", param="value") from error

        # The follower would do it within a second; here it has happened when the answer goes out.
        def drop(core: EngineCore) -> int:
            before = sum(blocks for epoch, blocks in self._dropped if epoch == record.epoch)
            return before + core.invalidate([record])

        blocks = await self._ask(drop)
        await asyncio.to_thread(self._service.cache.drop_behind, [record])
        return {"epoch": record.epoch, "pending": record.pending, "blocks": blocks, "kind": order.kind}

    async def warm(self, prompt: ChatRequest | str, *, model: str, tenant: str) -> Figures:
        generation = Generation(
            model, f"warm-{time.time_ns()}", Sampling(temperature=0), max_tokens=1, tenant=tenant
        )
        request: ChatRequest | CompletionRequest
        if isinstance(prompt, ChatRequest):
            request = replace(prompt, generation=generation)
        else:
            request = CompletionRequest(generation, prompt)
        began_s = time.monotonic()
        done: Completed | None = None
        async with aclosing(self._backend.generate(request)) as events:
            async for event in events:
                done = event if isinstance(event, Completed) else done
        usage = done.usage if done is not None else None
        return {
            "prompt_tokens": usage.prompt_tokens if usage else 0,
            "cached_tokens": usage.cached_total if usage else 0,
            "seconds": time.monotonic() - began_s,
        }

    async def verify(self) -> Figures:
        disk, began_s = self._service.disk, time.monotonic()
        verdicts: Counter[str] = Counter()
        if disk is not None:
            verdicts = await asyncio.to_thread(_verify, disk)
        checked = sum(verdicts.values())
        sound = verdicts.pop("ok", 0)
        return {
            "checked": checked,
            "sound": sound,
            "refused": dict(verdicts),
            "seconds": time.monotonic() - began_s,
        }

    async def export(self, folder: str) -> Figures:
        if not Path(folder).is_absolute():
            raise RequestError(
                f"'folder' must be an absolute path on the server; got {folder!r}.", param="folder"
            )
        cache = self._service.cache

        def collect(_: EngineCore) -> list[Block]:
            found = cache.store.ram.read([node.id for node in cache.store.nodes()])
            return [block for block in found if isinstance(block, Block)]

        blocks = await self._ask(collect)
        try:
            return await asyncio.to_thread(self._service.export, Path(folder), blocks)
        except ConfigurationError as error:
            raise RequestError(str(error), param="folder") from error

    async def _ask(self, errand: Callable[[EngineCore], Result]) -> Result:
        try:
            return await asyncio.wait_for(asyncio.wrap_future(self._engine.ask(errand)), ENGINE_PATIENCE_S)
        except TimeoutError as error:
            raise QueueFull(
                f"The engine did not get to it within {ENGINE_PATIENCE_S:g} s; try again later.",
                retry_after_s=1,
            ) from error

    async def _key(self, prefix: PrefixSelector) -> TokenKey:
        if prefix.tokens is not None:
            request: ChatRequest | CompletionRequest = CompletionRequest(
                Generation(self._model, "prefix", tenant=prefix.tenant), list(prefix.tokens)
            )
        elif prefix.chat is not None:
            request = prefix.chat
        else:
            request = CompletionRequest(
                Generation(self._model, "prefix", tenant=prefix.tenant), prefix.text or ""
            )
        tokens = await self._encode(request)
        if not len(tokens):
            raise RequestError("The prefix has no tokens.", param="prefix")
        # What follows a text may join its last token: prompts that go on from there have another one.
        whole = prefix.text is None or len(tokens) == 1
        return token_key(tokens if whole else tokens[:-1])

    def _entry(self, node: Node) -> Figures:
        path = list(node.path())
        tokens = tokens_of(node.prompt()).tolist()
        return {
            "id": node.id.hex(),
            "tokens": node.end,
            "bytes": sum(each.size_bytes for each in path),
            "tenant": node.head.tenant,
            "tags": sorted(node.head.tags),
            "created_s": node.head.created_s,
            "used_s": node.used_s,
            "kept_until_s": node.kept_until_s or None,
            "pins": node.pins,
            "hits": node.hits,
            "request": node.request,
            "begins": self._text(tokens[:TEXT_TOKENS]),
            "ends": self._text(tokens[-TEXT_TOKENS:]),
        }

    def _explained(self, explanation: Explanation) -> Figures:
        figures: dict[str, Any] = asdict(explanation)
        figures["found_tokens"] = explanation.found_tokens
        figures["divergence"] = self._diverged(explanation.divergence)
        return figures

    def _diverged(self, divergence: Divergence | None) -> Figures | None:
        if divergence is None:
            return None
        at = divergence.position - divergence.shown_from
        return {
            "position": divergence.position,
            "request": divergence.request,
            "used_s": divergence.used_s,
            "before": self._text(divergence.ours[:at]),
            "ours": self._text(divergence.ours[at : at + 1]),
            "ours_after": self._text(divergence.ours[at + 1 :]),
            "theirs": self._text(divergence.theirs[at : at + 1]),
            "theirs_after": self._text(divergence.theirs[at + 1 :]),
            "our_token": divergence.ours[at] if at < len(divergence.ours) else None,
            "their_token": divergence.theirs[at] if at < len(divergence.theirs) else None,
        }

    def _text(self, tokens: Sequence[int]) -> str:
        pieces = (self._vocabulary.piece(token, special=True) for token in tokens)
        return b"".join(pieces).decode(errors="replace")


def _verify(disk: DiskTier) -> Counter[str]:
    return Counter(str(verdict) for _, verdict in disk.verify(quarantine=True))
