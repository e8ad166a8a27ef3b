"""Summaries of what leaves a log: by the model itself, in levels, and each made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from stockpot.context.compression import ExtractiveCompressor
from stockpot.context.tokens import TokenCounter
from stockpot.errors import ServerUnreachable
from stockpot.requests import Message

Summarise = Callable[[str, int], str]
"""A text and a bound in tokens: the summary."""

_KEPT_MAX = 1_000
_PIECE_TOKENS = 4_000
_SUMMARY_TOKENS = 500
"""Of a piece: always the same, or what was made before would not serve again."""
_INSTRUCTION = (
    "Summarise the conversation below for whoever continues it: decisions, facts, names, numbers, what is"
    " still open. Write at most {words} words, nothing else."
)
_WORDS_PER_TOKEN = 0.7
_TIMEOUT_S = 120.0


class Summaries:
    """Summaries by content: the same turns are summarised once. `summarise` may be a model (`by_server`), or
    None: sentences are taken out of the text."""

    def __init__(self, summarise: Summarise | None, counter: TokenCounter) -> None:
        self._counter = counter
        self._summarise = summarise or self._extract
        self._kept: OrderedDict[bytes, str] = OrderedDict()
        self.made = 0

    def of(self, turns: Sequence[Message], max_tokens: int) -> str:
        """At most `max_tokens`. What is longer than a piece is summarised piece by piece, and then the
        summaries: each level is kept, so that a log that has grown costs only what is new."""
        return self._of_texts([_text(message) for message in turns], max_tokens)

    def _of_texts(self, texts: Sequence[str], max_tokens: int) -> str:
        pieces = self._pieces(texts)
        if len(pieces) <= 1:
            return self._one(pieces[0] if pieces else "", max_tokens)
        return self._of_texts([self._one(piece, _SUMMARY_TOKENS) for piece in pieces], max_tokens)

    def _pieces(self, texts: Sequence[str]) -> list[str]:
        pieces: list[list[str]] = []
        size = 0
        for text in texts:
            tokens = self._counter.count(text)
            if not pieces or size + tokens > _PIECE_TOKENS:
                pieces.append([])
                size = 0
            pieces[-1].append(text)
            size += tokens
        return ["\n".join(piece) for piece in pieces]

    def _one(self, text: str, max_tokens: int) -> str:
        if self._counter.count(text) <= max_tokens:
            return text
        key = blake2b(f"{max_tokens}\0{text}".encode("utf-8", "replace"), digest_size=16).digest()
        made = self._kept.get(key)
        if made is None:
            self.made += 1
            # A model may say more than it was asked for; a bound is a bound.
            made = self._extract(self._summarise(text, max_tokens), max_tokens)
            self._kept[key] = made
            if len(self._kept) > _KEPT_MAX:
                self._kept.popitem(last=False)
        return made

    def _extract(self, text: str, max_tokens: int) -> str:
        return ExtractiveCompressor().compress(text, max_tokens, self._counter)


def by_server(url: str, model: str, *, api_key: str | None = None) -> Summarise:
    """Summaries by a model behind an OpenAI-compatible server. They raise ServerUnreachable."""

    def summarise(text: str, max_tokens: int) -> str:
        import httpx2

        words = max(10, int(max_tokens * _WORDS_PER_TOKEN))
        body = {
            "model": model,
            # The instruction first, the same for all: it is cached.
            "messages": [
                {"role": "system", "content": _INSTRUCTION.format(words=words)},
                {"role": "user", "content": text},
            ],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        address = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            response = httpx2.post(address, json=body, headers=headers, timeout=_TIMEOUT_S)
            answer: Any = response.json()
            return str(answer["choices"][0]["message"]["content"])
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerUnreachable(f"{address} gave no summary: {error!r}.") from error

    return summarise


def _text(message: Message) -> str:
    calls = "".join(f" [calls {call.name}({call.arguments})]" for call in message.tool_calls)
    return f"{message.role}: {message.content}{calls}"
