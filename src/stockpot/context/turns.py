"""A log in pieces that belong together: a call and its results never part, nor an answer and its question."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.context.tokens import TokenCounter
from stockpot.requests import Message

MESSAGE_TOKENS = 4
"""What a chat template puts around a message, about (OpenAI, "Counting tokens for chat API calls")."""


def rounds(log: Sequence[Message]) -> list[tuple[Message, ...]]:
    """From one turn of the user to the next: his words, what the model answers, the calls it makes and their
    results. What precedes the first is a round of its own."""
    made: list[list[Message]] = []
    for message in log:
        if message.role == "user" or not made:
            made.append([])
        made[-1].append(message)
    return [tuple(each) for each in made]


def message_tokens(message: Message, counter: TokenCounter) -> int:
    """Of its text, its calls, and what stands around them."""
    tokens = counter.count(message.content) + MESSAGE_TOKENS
    return tokens + sum(counter.count(f"{call.name}{call.arguments}") for call in message.tool_calls)


def log_tokens(log: Sequence[Message], counter: TokenCounter) -> int:
    """Of all."""
    return sum(message_tokens(message, counter) for message in log)
