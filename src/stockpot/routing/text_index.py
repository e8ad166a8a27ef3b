"""What a backend that tells nothing must have cached: the beginnings of the prompts it was sent.

A prompt is a chain of hashes over its text as it stands in the request: a link for each tool and message, and
within long ones one for every `CHUNK_CHARACTERS`. So two conversations share links exactly as far as they
begin alike. Tokens are reckoned from characters; nothing is known of templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from stockpot.requests import ChatRequest, CompletionRequest, GenerationRequest, ImagePart, Message, TextPart

CHUNK_CHARACTERS = 1024
CHARACTERS_PER_TOKEN = 4
CHUNK_TOKENS = CHUNK_CHARACTERS // CHARACTERS_PER_TOKEN
IMAGE_TOKENS = 256
"""A rough figure: providers reckon images from some 85 tokens to some 1,600."""


@dataclass(frozen=True, slots=True)
class TextChain:
    """A prompt: for each link its hash, which stands for all before it too, and the characters so far."""

    links: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def characters(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def tokens(self) -> int:
        return self.characters // CHARACTERS_PER_TOKEN


def chain_of(model: str, request: GenerationRequest) -> TextChain:
    """The chain of a request for one model."""
    links: list[int] = []
    ends: list[int] = []
    link, end = hash(model), 0
    pieces = _chat(request) if isinstance(request, ChatRequest) else _completion(request)
    for piece, characters in pieces:
        link = hash((link, piece))
        end += characters
        links.append(link)
        ends.append(end)
    return TextChain(tuple(links), tuple(ends))


class TextIndex:
    """Which links one backend was sent, at most `links_max`, and when. Least recently sent go first.

    Times are monotonic seconds; what was not sent again for `idle_s` counts as evicted there.
    """

    def __init__(self, links_max: int, *, idle_s: float) -> None:
        self._links_max = links_max
        self._idle_s = idle_s
        self._sent: dict[int, tuple[float, int]] = {}  # link -> when last, its characters
        self._characters = 0

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def tokens(self) -> int:
        """Of all that is remembered, each beginning counted once."""
        return self._characters // CHARACTERS_PER_TOKEN

    def limit(self, links_max: int) -> None:
        """Hold no more than this many links from now on."""
        self._links_max = links_max
        self._evict()

    def placed(self, chain: TextChain, now_s: float) -> None:
        """The prompt was sent to the backend."""
        # From the end, so that a beginning is always fresher than what hangs on it.
        for index in range(len(chain.links) - 1, -1, -1):
            link = chain.links[index]
            characters = chain.ends[index] - (chain.ends[index - 1] if index else 0)
            if self._sent.pop(link, None) is None:
                self._characters += characters
            self._sent[link] = (now_s, characters)
        self.forget(now_s)
        self._evict()

    def match(self, chain: TextChain, now_s: float, *, within_s: float | None = None) -> int:
        """Tokens from the beginning that were sent there, and within the last `within_s` seconds."""
        since_s = now_s - (self._idle_s if within_s is None else within_s)
        characters = 0
        for link, end in zip(chain.links, chain.ends, strict=True):
            sent = self._sent.get(link)
            if sent is None or sent[0] < since_s:
                break
            characters = end
        return characters // CHARACTERS_PER_TOKEN

    def forget(self, now_s: float) -> None:
        """Drop what has been idle for too long."""
        while self._sent:
            link = next(iter(self._sent))
            if self._sent[link][0] >= now_s - self._idle_s:
                return
            self._drop(link)

    def _evict(self) -> None:
        while len(self._sent) > self._links_max:
            self._drop(next(iter(self._sent)))

    def _drop(self, link: int) -> None:
        self._characters -= self._sent.pop(link)[1]


_Pieces = Iterator[tuple[object, int]]
"""What is hashed, and how many characters it stands for."""


def _chat(request: ChatRequest) -> _Pieces:
    # Tools first: templates and providers put them before the messages.
    for tool in request.tools:
        text = f"{tool.name}\0{tool.description}\0{_json(tool.parameters)}"
        yield ("tool", text), len(text)
    for message in request.messages:
        yield from _message(message)


def _message(message: Message) -> _Pieces:
    role = (message.role, message.name, message.tool_call_id)
    content = message.content
    for at in range(0, len(content) - CHUNK_CHARACTERS, CHUNK_CHARACTERS):
        yield (role, content[at : at + CHUNK_CHARACTERS]), CHUNK_CHARACTERS
    rest = content[(len(content) - 1) // CHUNK_CHARACTERS * CHUNK_CHARACTERS :] if content else ""
    yield (role, rest), len(rest)
    for part in message.parts:
        match part:
            case TextPart():
                pass  # is in the content
            case ImagePart():
                image = (part.url, part.media_type, part.data, part.detail)
                yield image, IMAGE_TOKENS * CHARACTERS_PER_TOKEN
            case _:
                text = _json(part.value)
                yield ("part", text), len(text)
    for call in message.tool_calls:
        yield ("call", call.name, call.arguments), len(call.name) + len(call.arguments)


def _completion(request: CompletionRequest) -> _Pieces:
    prompt = request.prompt
    size = CHUNK_CHARACTERS if isinstance(prompt, str) else CHUNK_TOKENS
    characters_each = 1 if isinstance(prompt, str) else CHARACTERS_PER_TOKEN
    for at in range(0, len(prompt), size):
        piece: str | Sequence[int] = prompt[at : at + size]
        yield piece if isinstance(piece, str) else tuple(piece), len(piece) * characters_each


def _json(value: Any) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (OverflowError, TypeError):  # JSON allows integers that this encoder does not
        return repr(value)
