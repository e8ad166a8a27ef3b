"""A provider's prompt cache as its documentation describes it, to make figures of usage for a corpus.

It knows nothing of the doctor: prompts are compared as the texts a model would read, four bytes a token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_TOKEN_BYTES = 4
_LOOKBACK = 20


@dataclass(frozen=True, slots=True)
class Counted:
    """Tokens of a prompt, those read from the cache, and those written to it."""

    prompt: int
    cached: int
    written: int


class AutomaticCache:
    """As OpenAI's: the longest prefix seen within `ttl_s`, from 1,024 tokens on, in steps of 128. One cache
    for each of `place` (a server)."""

    def __init__(self, *, minimum: int = 1024, step: int = 128, ttl_s: float = 300.0) -> None:
        self._minimum, self._step, self._ttl_s = minimum, step, ttl_s
        self._seen: list[tuple[float, str, bytes]] = []

    def ask(self, body: Json, at_s: float, place: str = "", *, forget: bool = False) -> Counted:
        """One request; `forget`: the cache has lost all of it before."""
        text = _text(body)
        if forget:
            self._seen = [each for each in self._seen if each[1] != place]
        alive = [each for each in self._seen if at_s - each[0] <= self._ttl_s and each[1] == place]
        shared = max((_shared(each[2], text) for each in alive), default=0) // _TOKEN_BYTES
        cached = shared - shared % self._step if shared >= self._minimum else 0
        self._seen = [*self._seen[-40:], (at_s, place, text)]
        return Counted(len(text) // _TOKEN_BYTES, cached, 0)


class MarkedCache:
    """As Anthropic's: what stands before a boundary is written; a boundary finds what was written at most 20
    blocks before it, within `ttl_s`."""

    def __init__(self, *, minimum: int = 1024, ttl_s: float = 300.0) -> None:
        self._minimum, self._ttl_s = minimum, ttl_s
        self._written: dict[bytes, float] = {}

    def ask(self, body: Json, at_s: float) -> Counted:
        blocks, marks = _blocks(body)
        prefixes: list[bytes] = []
        text = json.dumps([body.get("model"), body.get("tool_choice"), body.get("thinking")]).encode()
        for block in blocks:
            text += b"\0" + block
            prefixes.append(text)
        cached = 0
        for mark in marks:
            for place in range(mark, max(-1, mark - _LOOKBACK) - 1, -1):
                if place < 0:
                    break
                wrote_s = self._written.get(prefixes[place])
                if wrote_s is not None and at_s - wrote_s <= self._ttl_s:
                    cached = max(cached, len(prefixes[place]) // _TOKEN_BYTES)
                    self._written[prefixes[place]] = at_s
                    break
        written = 0
        for mark in marks:
            tokens = len(prefixes[mark]) // _TOKEN_BYTES
            if tokens >= self._minimum:
                if prefixes[mark] not in self._written or at_s - self._written[prefixes[mark]] > self._ttl_s:
                    written = max(written, tokens - cached)
                self._written[prefixes[mark]] = at_s
        return Counted(len(text) // _TOKEN_BYTES, cached, max(0, written))


def _text(body: Json) -> bytes:
    system = body.get("instructions") or body.get("system") or ""
    head = [body.get(name) for name in ("model", "response_format", "text", "tools")]
    turns = body.get("messages") if "messages" in body else body.get("input")
    return (json.dumps(head) + json.dumps(system) + json.dumps(turns)[:-1]).encode()


def _blocks(body: Json) -> tuple[list[bytes], list[int]]:
    blocks: list[bytes] = []
    marks: list[int] = []
    system: list[Json] | str = body.get("system") or []
    given: list[Json] = [*body.get("tools", ()), *([{"text": system}] if isinstance(system, str) else system)]
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        given += [{**part, "role": message["role"]} for part in parts]
    for each in given:
        if "cache_control" in each:
            marks.append(len(blocks))
        plain = {name: value for name, value in each.items() if name != "cache_control"}
        blocks.append(json.dumps(plain).encode())
    return blocks, marks


def _shared(one: bytes, other: bytes) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
