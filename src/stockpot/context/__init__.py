"""Prompts built to be cached: `from stockpot import context`. No server is needed.

from stockpot import context

prompt = context.Context(system="You are a helpful cook.", tools=[...])
prompt.fact("time", "2026-11-25 08:42")
prompt.user("What can I make of leeks?")
client.chat.completions.create(**prompt.openai("gpt-5"))
"""

from stockpot.context.budget import Budget, BudgetExceeded, Fitted, Trimmed, fit
from stockpot.context.canonical import NotCanonical, canonical_json, canonical_text
from stockpot.context.chunks import Chunk, Selection, select_chunks
from stockpot.context.compaction import Decision, TokenPrices, decide_compaction
from stockpot.context.compression import Compressor, ExtractiveCompressor, LinguaCompressor
from stockpot.context.context import AppendOnly, Context, UnpairedCall
from stockpot.context.detection import BoundaryDetector, Suggestion
from stockpot.context.marker import MARKER, split_marked
from stockpot.context.prompt import Boundary, Document, Prompt, request_of
from stockpot.context.render import render_anthropic, render_openai, render_request
from stockpot.context.stable import VolatileText, VolatileTextWarning
from stockpot.context.state import State, StateError
from stockpot.context.summaries import Summaries, by_server
from stockpot.context.tokenizers import open_counter
from stockpot.context.tokens import EstimatedTokens, TokenCounter
from stockpot.context.volatile import Volatile, find_volatile

__all__ = [
    "MARKER",
    "AppendOnly",
    "Boundary",
    "BoundaryDetector",
    "Budget",
    "BudgetExceeded",
    "Chunk",
    "Compressor",
    "Context",
    "Decision",
    "Document",
    "EstimatedTokens",
    "ExtractiveCompressor",
    "Fitted",
    "LinguaCompressor",
    "NotCanonical",
    "Prompt",
    "Selection",
    "State",
    "StateError",
    "Suggestion",
    "Summaries",
    "TokenCounter",
    "TokenPrices",
    "Trimmed",
    "UnpairedCall",
    "Volatile",
    "VolatileText",
    "VolatileTextWarning",
    "by_server",
    "canonical_json",
    "canonical_text",
    "decide_compaction",
    "find_volatile",
    "fit",
    "open_counter",
    "render_anthropic",
    "render_openai",
    "render_request",
    "request_of",
    "select_chunks",
    "split_marked",
]
