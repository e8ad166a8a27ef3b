"""Where cache boundaries pay, for APIs that must be told (Anthropic, "Prompt caching").

Two of the four are enough for a conversation, whatever its length: one at its end, which the next request
will read, and one where the request before ended, so that what that one wrote is found exactly and not by
looking back over blocks, of which at most 20 are searched. The others mark what conversations share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

import msgspec

from stockpot.context.provider_facts import CacheRules
from stockpot.context.tokens import TokenCounter
from stockpot.requests import TOOLS, CacheBoundary, ChatRequest, Message, TextPart

_TTL_S = 300


def place_boundaries(
    request: ChatRequest, rules: CacheRules, counter: TokenCounter, shared: Sequence[CacheBoundary] = ()
) -> ChatRequest:
    """The request with boundaries as `rules` allow: its own first (of too many, those that stand last), then
    the end of the conversation and of the request before, then `shared` (the ends of stable sections, of
    which those further back count first). None before which there are too few tokens to be cached, or that
    stands on an empty block; and none that is kept longer than one before it, which the API refuses: those
    before are then kept as long."""
    if rules.is_own:
        return request
    if not rules.breakpoints_max:
        return replace(request, boundaries=())
    tokens = _Tokens(request, counter)
    wanted = [
        *reversed(_in_order(request.boundaries)),
        *_ends(request.messages),
        *reversed(_in_order(shared)),
    ]
    placed: dict[tuple[int, int], CacheBoundary] = {}
    for boundary in wanted:
        place = _place(boundary, request)
        if len(placed) == rules.breakpoints_max:
            break
        if place not in placed and tokens.before(boundary) >= rules.min_tokens and _holds(boundary, request):
            placed[place] = boundary
    return replace(request, boundaries=tuple(_longest_first([placed[place] for place in sorted(placed)])))


def _ends(messages: Sequence[Message]) -> Iterable[CacheBoundary]:
    """The end of the conversation, and where it ended when its last answer was asked for."""
    last = len(messages) - 1
    while last >= 0 and not _has_blocks(messages[last]):
        last -= 1
    if last < 0:
        return
    yield CacheBoundary(last, None, _TTL_S)
    answered = next((place for place in range(last, -1, -1) if messages[place].role == "assistant"), 0)
    while answered > 0 and (
        messages[answered - 1].role == "assistant" or not _has_blocks(messages[answered - 1])
    ):
        answered -= 1
    if answered > 0:
        yield CacheBoundary(answered - 1, None, _TTL_S)


class _Tokens:
    """How many precede a boundary, in the order in which the API reads: tools, then messages."""

    def __init__(self, request: ChatRequest, counter: TokenCounter) -> None:
        self._request = request
        self._counter = counter
        tools = [counter.count(msgspec.json.encode(tool).decode()) for tool in request.tools]
        self._tools = list(accumulate(tools, initial=0))
        messages = [counter.count(_text(message)) for message in request.messages]
        self._messages = list(accumulate(messages, initial=self._tools[-1]))

    def before(self, boundary: CacheBoundary) -> int:
        if boundary.message == TOOLS:
            tools = len(self._tools) - 1 if boundary.characters is None else boundary.characters + 1
            return self._tools[tools]
        if boundary.characters is None:
            return self._messages[boundary.message + 1]
        content = self._request.messages[boundary.message].content
        return self._messages[boundary.message] + self._counter.count(content[: boundary.characters])


def _text(message: Message) -> str:
    return message.content + "".join(f"\n{call.name}({call.arguments})" for call in message.tool_calls)


def _place(boundary: CacheBoundary, request: ChatRequest) -> tuple[int, int]:
    """Equal for two boundaries that stand at one place, and in order."""
    if boundary.message == TOOLS:
        last = len(request.tools) - 1
        return TOOLS, last if boundary.characters is None else boundary.characters
    length = len(request.messages[boundary.message].content)
    return boundary.message, length if boundary.characters is None else boundary.characters


def _holds(boundary: CacheBoundary, request: ChatRequest) -> bool:
    """Whether there is a block it can stand on."""
    if boundary.message == TOOLS:
        return bool(request.tools)
    return boundary.characters != 0 and _has_blocks(request.messages[boundary.message])


def _has_blocks(message: Message) -> bool:
    if message.role == "tool":
        return True
    filled = any(not isinstance(part, TextPart) or part.text for part in message.parts)
    return bool(message.content or message.tool_calls or filled)


def _in_order(boundaries: Sequence[CacheBoundary]) -> list[CacheBoundary]:
    end = float("inf")
    return sorted(
        boundaries, key=lambda one: (one.message, end if one.characters is None else one.characters)
    )


def _longest_first(boundaries: Sequence[CacheBoundary]) -> list[CacheBoundary]:
    """None is kept for less than one behind it."""
    ttl_s = 0
    made: list[CacheBoundary] = []
    for boundary in reversed(boundaries):
        ttl_s = max(ttl_s, boundary.ttl_s)
        made.append(replace(boundary, ttl_s=ttl_s))
    return made[::-1]
