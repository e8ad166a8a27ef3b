"""The token ids of a prompt, asked of a backend that knows them, so that its KV events can be matched."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from stockpot.clock import Clock
from stockpot.requests import ChatRequest, GenerationRequest
from stockpot.routing.member import Member
from stockpot.routing.prefix_index import TokenChain
from stockpot.routing.text_index import TextChain

LOG = logging.getLogger(__name__)

SHORT_CHARACTERS = 1000
"""Prompts shorter than this are not worth asking for: as much is computed in the time."""
NEARLY_ALL = 0.8
"""A beginning that makes up this share of a prompt stands for it."""
WAIT_S = 0.25
GIVE_UP_S = 5.0
REST_S = 5.0
"""A backend that failed or was late is not asked for so long."""
AT_ONCE_MAX = 32
PROMPTS_MAX = 1024
TOKENS_MAX = 4_000_000
"""Of all prompts together; four bytes each, and the hashes of their blocks."""


@dataclass(frozen=True, slots=True)
class PromptTokensStats:
    """A snapshot; counts since the start."""

    prompts: int
    hits: int
    asked: int
    failed: int
    late: int


@dataclass(frozen=True, slots=True)
class _Known:
    chain: TokenChain
    tokens: int


class PromptTokens:
    """Token ids by the text they stand for. Identical prompts at one time are asked for once.

    A conversation that has grown a little is not asked for again: the ids of its beginning find the blocks it
    has had so far, which is what matters.
    """

    def __init__(self, clock: Clock, *, wait_s: float = WAIT_S) -> None:
        self._clock = clock
        self._wait_s = wait_s
        self._known: dict[int, _Known] = {}  # by link of the text; least recently used first
        self._tokens = 0
        self._asking: dict[int, asyncio.Task[list[int]]] = {}
        self._resting_until_s: dict[str, float] = {}
        self._hits = self._asked = self._failed = self._late = 0

    async def chain(
        self, text: TextChain, request: GenerationRequest, member: Member, model: str
    ) -> TokenChain | None:
        """The prompt's tokens, or those of nearly all of it; None where they cannot be had in time. Waits for
        `wait_s` at most, and never raises."""
        if text.characters < SHORT_CHARACTERS:
            return None
        link = text.links[-1]
        if (known := self._lookup(text)) is not None:
            self._hits += 1
            return known.chain
        if not isinstance(request, ChatRequest) and not isinstance(request.prompt, str):
            return self._keep(link, request.prompt)
        task = self._asking.get(link)
        if task is None:
            if (
                len(self._asking) >= AT_ONCE_MAX
                or self._resting_until_s.get(member.name, 0.0) > self._clock.monotonic()
            ):
                return None
            self._asked += 1
            task = asyncio.get_running_loop().create_task(_ask(request, member, model))
            self._asking[link] = task
            task.add_done_callback(lambda done: self._answered(link, member.name, done))
        done, _ = await asyncio.wait({task}, timeout=self._wait_s)
        if not done:
            self._late += 1
            self._rest(member.name)
            return None
        known = self._known.get(link)
        return known.chain if known is not None else None

    async def stop(self) -> None:
        """Leave off asking."""
        if tasks := set(self._asking.values()):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def stats(self) -> PromptTokensStats:
        return PromptTokensStats(len(self._known), self._hits, self._asked, self._failed, self._late)

    def forget(self, names: Sequence[str]) -> None:
        """These backends are here no more."""
        for name in names:
            self._resting_until_s.pop(name, None)

    def _lookup(self, text: TextChain) -> _Known | None:
        enough = NEARLY_ALL * text.characters
        for link, end in zip(reversed(text.links), reversed(text.ends), strict=True):
            if end < enough:
                return None
            if (known := self._known.pop(link, None)) is not None:
                self._known[link] = known
                return known
        return None

    def _keep(self, link: int, tokens: Sequence[int]) -> TokenChain | None:
        if len(tokens) > TOKENS_MAX:
            return None
        try:
            known = _Known(TokenChain(tokens), len(tokens))
        except (OverflowError, TypeError) as error:
            LOG.debug("token ids of a prompt that are none: %s", error)
            return None
        if (before := self._known.pop(link, None)) is not None:
            self._tokens -= before.tokens
        self._known[link] = known
        self._tokens += known.tokens
        while len(self._known) > PROMPTS_MAX or self._tokens > TOKENS_MAX:
            self._tokens -= self._known.pop(next(iter(self._known))).tokens
        return known.chain

    def _answered(self, link: int, name: str, task: asyncio.Task[list[int]]) -> None:
        """Runs before those who wait for the task go on."""
        del self._asking[link]
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            self._failed += 1
            self._rest(name)
            LOG.debug("backend %r gave no token ids: %s", name, error or type(error).__name__)
        else:
            self._keep(link, task.result())

    def _rest(self, name: str) -> None:
        self._resting_until_s[name] = self._clock.monotonic() + REST_S


async def _ask(request: GenerationRequest, member: Member, model: str) -> list[int]:
    content = request if isinstance(request, ChatRequest) else request.prompt
    assert isinstance(content, ChatRequest | str)
    async with asyncio.timeout(GIVE_UP_S):
        return await member.backend.tokenize(model, content, special=True, tenant=request.generation.tenant)
