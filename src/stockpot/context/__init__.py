"""Prompts built to be cached: `from stockpot import context`. No server is needed.

from stockpot import context

prompt = context.Context(system="You are a helpful cook.", tools=[...])
prompt.fact("time", "2026-11-25 08:42")
prompt.user("What can I make of leeks?")
client.chat.completions.create(**prompt.openai("gpt-5"))
"""

from stockpot.context.canonical import NotCanonical, canonical_json, canonical_text
from stockpot.context.context import AppendOnly, Context, UnpairedCall
from stockpot.context.marker import MARKER, split_marked
from stockpot.context.prompt import Boundary, Document, Prompt, request_of
from stockpot.context.render import render_anthropic, render_openai, render_request
from stockpot.context.stable import VolatileText, VolatileTextWarning
from stockpot.context.state import State, StateError
from stockpot.context.tokens import EstimatedTokens, TokenCounter
from stockpot.context.volatile import Volatile, find_volatile

__all__ = [
    "MARKER",
    "AppendOnly",
    "Boundary",
    "Context",
    "Document",
    "EstimatedTokens",
    "NotCanonical",
    "Prompt",
    "State",
    "StateError",
    "TokenCounter",
    "UnpairedCall",
    "Volatile",
    "VolatileText",
    "VolatileTextWarning",
    "canonical_json",
    "canonical_text",
    "find_volatile",
    "render_anthropic",
    "render_openai",
    "render_request",
    "request_of",
    "split_marked",
]
