"""One tree, as each API wants it: OpenAI's, Anthropic's, our own server's, and the engine's request.

The renderers are those of the gateway, so a prompt that goes straight to a provider and one that goes through
Stockpot are the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from stockpot.backends.anthropic_render import render_messages
from stockpot.backends.openai_render import Server, render_chat
from stockpot.context.placement import place_boundaries
from stockpot.context.prompt import STABLE, Boundary, Prompt, in_blocks, request_of
from stockpot.context.provider_facts import rules_for
from stockpot.context.tokens import EstimatedTokens, TokenCounter
from stockpot.requests import ChatRequest, Generation

Json = dict[str, Any]


def render_request(prompt: Prompt, generation: Generation) -> ChatRequest:
    """What the engine in this process is given, with its boundaries."""
    return request_of(prompt, generation)


def render_openai(prompt: Prompt, model: str, *, server: Server = "generic", **parameters: Any) -> Json:
    """The arguments of `client.chat.completions.create(**it)`, `parameters` among them as they are.

    Providers of this API place boundaries themselves, and are given none; `server="stockpot"` has them in
    the messages (`cache_control`).
    """
    body = _decoded(render_chat(request_of(prompt, Generation(model, "")), model, server))
    return {**body, **parameters}


def render_anthropic(
    prompt: Prompt,
    model: str,
    *,
    max_tokens: int,
    counter: TokenCounter | None = None,
    **parameters: Any,
) -> Json:
    """The arguments of `client.messages.create(**it)`, with at most four boundaries, placed where they pay.
    `counter` counts what is long enough to be cached (None: estimated)."""
    generation = Generation(model, "", max_tokens=max_tokens)
    ends = tuple(Boundary(name, count) for name in STABLE if (count := len(getattr(prompt, name))))
    shared = request_of(replace(prompt, boundaries=ends), generation).boundaries
    request = in_blocks(request_of(prompt, generation), prompt)
    placed = place_boundaries(request, rules_for("anthropic", model), counter or EstimatedTokens(), shared)
    return {**_decoded(render_messages(placed, model)), **parameters}


def _decoded(body: bytes) -> Json:
    return msgspec.json.decode(body, type=dict[str, Any])
