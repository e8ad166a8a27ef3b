"""Cache boundaries of a request, as numbers of prompt tokens.

A boundary stands at a place in a message and applies to the leading prompt tokens that lie wholly before it.
It never changes the tokens of the prompt: the text is encoded as a whole, and the tokens are compared with
those of what precedes the boundary. Requests without boundaries pay nothing for this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stockpot.backends.prompt_encoder import PromptEncoder, TokenIds
from stockpot.engine.chat_template import ChatTemplate, PromptPart
from stockpot.requests import CacheBoundary, ChatRequest, TokenBoundary


@dataclass(frozen=True, slots=True)
class BoundedPrompt:
    """A prompt in pieces, and in `heads` the pieces of what precedes each of its `boundaries`."""

    pieces: Sequence[PromptPart]
    boundaries: Sequence[CacheBoundary] = ()
    heads: Sequence[Sequence[PromptPart]] = ()

    def is_quick(self, encoder: PromptEncoder, tenant: str = "") -> bool:
        """Whether `encode` now takes no longer than handing it to a thread."""
        return encoder.is_quick({piece for pieces in (self.pieces, *self.heads) for piece in pieces}, tenant)

    def encode(
        self, encoder: PromptEncoder, tenant: str = "", *, begin: Sequence[int] = ()
    ) -> tuple[TokenIds, tuple[TokenBoundary, ...]]:
        """The prompt's tokens, `begin` before all others, and its boundaries, nearest to the start first."""
        tokens = encoder.encode(self.pieces, tenant)
        counts = [_common_tokens(encoder.encode(head, tenant), tokens) for head in self.heads]
        boundaries = [
            _at(len(begin) + count, boundary) for count, boundary in zip(counts, self.boundaries, strict=True)
        ]
        if begin:
            tokens = np.concatenate((np.array(begin, np.int32), tokens))
        return tokens, tuple(sorted(boundaries, key=lambda boundary: boundary.tokens))


def chat_prompt(template: ChatTemplate, encoder: PromptEncoder, request: ChatRequest) -> BoundedPrompt:
    """The prompt of a chat. Raises RequestError where the template refuses the conversation or one of its
    boundaries."""
    parts = template.render_parts(request.messages, request.template_arguments)
    if not request.boundaries:
        return BoundedPrompt(encoder.pieces(parts))
    text = "".join(part.text for part in parts)
    places = template.boundary_places(request.messages, request.template_arguments, request.boundaries, text)
    return _bounded(encoder, parts, request.boundaries, places)


def text_prompt(
    encoder: PromptEncoder, text: str, boundaries: Sequence[CacheBoundary] = (), *, literal: bool = False
) -> BoundedPrompt:
    """The prompt that is a text as it stands; `literal`: control tokens spelled in it are plain text."""
    places = [len(text) if b.characters is None else b.characters for b in boundaries]
    return _bounded(encoder, [PromptPart(text, literal)], boundaries, places)


def token_boundaries(tokens: int, boundaries: Sequence[CacheBoundary]) -> tuple[TokenBoundary, ...]:
    """Boundaries of a prompt of `tokens` token ids: all stand at its end."""
    return tuple(_at(tokens, boundary) for boundary in boundaries)


def shared_tokens(boundaries: Sequence[TokenBoundary]) -> int:
    """How many leading tokens are declared shared across tenants: the last shared boundary decides."""
    return max((boundary.tokens for boundary in boundaries if boundary.shared), default=0)


def _bounded(
    encoder: PromptEncoder,
    parts: Sequence[PromptPart],
    boundaries: Sequence[CacheBoundary],
    places: Sequence[int],
) -> BoundedPrompt:
    pieces = encoder.pieces(parts)
    return BoundedPrompt(pieces, tuple(boundaries), [_head(pieces, characters) for characters in places])


def _head(pieces: Sequence[PromptPart], characters: int) -> list[PromptPart]:
    """The first `characters` characters of a prompt; a piece that reaches beyond them is cut."""
    head: list[PromptPart] = []
    for piece in pieces:
        if characters <= 0:
            break
        head.append(PromptPart(piece.text[:characters], piece.literal))
        characters -= len(piece.text)
    return head


def _common_tokens(one: TokenIds, other: TokenIds) -> int:
    shortest = min(len(one), len(other))
    different = np.flatnonzero(one[:shortest] != other[:shortest])
    return int(different[0]) if len(different) else shortest


def _at(tokens: int, boundary: CacheBoundary) -> TokenBoundary:
    return TokenBoundary(tokens, boundary.ttl_s, boundary.shared, boundary.tags)
