"""What to do about each cause: one sentence, and where a template can be inferred, the change to it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from stockpot.doctor.finding import Cause

ADVICE: Mapping[Cause, str] = MappingProxyType(
    {
        "timestamp": "Take the time out of what should be stable, and tell it at the end of the"
        " prompt: context.fact('time', ...), or in the last user message.",
        "date": "A date in the stable part breaks the prefix of every conversation once a day:"
        " tell it at the end of the prompt (context.fact('date', ...)).",
        "uuid": "A random id in the prompt makes each one new: send it as metadata or a header,"
        " or tell it at the end (context.fact).",
        "counter": "A number that goes up breaks the prefix with each request: leave it out, or tell"
        " it at the end (context.fact).",
        "key_order": "The same JSON is written with its keys in another order: write it with sorted"
        " keys (context.canonical_json, json.dumps(..., sort_keys=True)).",
        "white_space": "The same text is written with other white space: render it once and keep it, or"
        " write JSON with fixed separators (context.canonical_json).",
        "unicode_form": "The same text comes in two forms of Unicode: bring it into one before it enters"
        " the prompt (Context(nfc=True), unicodedata.normalize).",
        "tool_added": "A tool was added in the middle of a conversation: declare all tools from the"
        " start, and restrict them with tool_choice or in words.",
        "tool_removed": "A tool was taken away in the middle of a conversation: keep the list as it is,"
        " and forbid its use in words or with tool_choice.",
        "tool_reordered": "The tools come in another order: sort them by name (Context does).",
        "tool_changed": "A tool's definition changed: keep definitions fixed for as long as a"
        " conversation lasts.",
        "system_changed": "The system prompt differs early: put what differs between users or turns behind"
        " what they share, or at the end of the prompt (context.fact).",
        "history_edited": "Earlier turns were changed: keep the log append-only, and say what is new at its"
        " end (context.fork, where history must change).",
        "history_truncated": "The oldest turns are dropped each time: drop many at once and rarely"
        " (context.fit), so that the beginning stays the same in between.",
        "model_changed": "Another model has another cache: stay with one for a conversation, and hand over"
        " with a summary.",
        "parameters_changed": "A parameter that is part of the prompt changed: keep it fixed for a"
        " conversation.",
        "image_reencoded": "The same image was sent with other bytes: encode it once, keep those bytes, or"
        " refer to it by an id or a stable address.",
        "ttl_expired": "The pause was longer than the provider keeps a prefix: ask for a longer time"
        ' (context.boundary(ttl="1h"), prompt_cache_retention), or keep it warm if that is'
        " cheaper.",
        "below_minimum": "The prompt is shorter than the provider caches: put more of what is stable"
        " before the boundary (examples, documents), or do without a cache.",
        "no_boundary": "This provider caches only what is marked, and nothing is, or too early: mark the"
        " end of the stable part and of the conversation (context.anthropic places both).",
        "beyond_lookback": "More blocks lie since the last boundary than the provider looks back over: set"
        " one where the request before ended, too (context.anthropic does).",
        "routed_elsewhere": "The prefix lies on another server: send a session's requests to one (a session"
        " id, prefix-aware routing).",
        "evicted": "The prefix had gone though it was the same and in time: give the cache more"
        " room, or route by prefix; with a provider, send related requests closer together"
        " or with one prompt_cache_key.",
    }
)

_PLACEHOLDER: Mapping[str, str] = MappingProxyType(
    {"timestamp": "time", "date": "date", "uuid": "id", "counter": "number"}
)
_LINES_AROUND = 2
_SHOWN_LINES = 60


def patch_for(cause: Cause, text: str, start: int, end: int, path: str) -> str:
    """A unified diff of the template a text was made from: characters [start, end) moved on, so they stand
    for a variable, which goes to the end of the prompt. "" where there is none."""
    if cause not in _PLACEHOLDER or not 0 <= start < end <= len(text):
        return ""
    name = _PLACEHOLDER[cause]
    template = text[:start] + "{" + name + "}" + text[end:]
    before = template.splitlines()
    line = template[:start].count("\n")
    column = start - (template.rfind("\n", 0, start) + 1)
    fixed = _without(before[line], column, column + len(name) + 2)
    after = [*before[:line], *([fixed] if fixed.strip() else []), *before[line + 1 :]]
    moved = before[line].strip() if not fixed.strip() else "{" + name + "}"
    return "\n".join(
        (
            *_diff(before, after, path),
            "--- a/last user message",
            "+++ b/last user message",
            "@@ at its end @@",
            f"+{name}: {moved}" if moved.startswith("{") else f"+{moved}",
        )
    )


def sorted_patch(text: str, fixed: str, path: str) -> str:
    """A diff from JSON as it was written to the same in canonical form."""
    return "\n".join(_diff(text.splitlines(), fixed.splitlines(), path))


def _without(line: str, start: int, end: int) -> str:
    """The line without its variable; what only introduced it ("Current time: ") goes, too."""
    rest = line[:start].rstrip(" :=-(").rstrip() + line[end:].lstrip(" )")
    introduction = line[:start].strip(" :=-(#*[]<>").lower()
    few_words = len(introduction.split()) <= 4 and len(line[end:].strip(" .)]>}Z,;")) == 0
    return "" if few_words else rest


def _diff(before: list[str], after: list[str], path: str) -> list[str]:
    lines = difflib.unified_diff(before, after, f"a/{path}", f"b/{path}", lineterm="", n=_LINES_AROUND)
    return [line[:400] for line in list(lines)[:_SHOWN_LINES]]
