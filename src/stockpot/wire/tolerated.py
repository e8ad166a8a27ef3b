"""Fields that are part of a request's own shape, and the values at which they make no difference.

They stand where no backend is given them: in messages, in `stream_options`, under names that are gone. What a
backend may know, it judges itself (`backends/refusals.py`). The rule is the same: honoured or refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from stockpot.backends.refusals import NO_TOOLS, Tolerated

_NEWER = "the older form of tools; send 'tools' and 'tool_choice' instead"

LEGACY: Mapping[str, Tolerated] = {
    "functions": Tolerated(([],), _NEWER),
    "function_call": Tolerated(("none", "auto"), _NEWER),
}

# What clients send back with an answer of ours that they put into the next request.
MESSAGE: Mapping[str, Tolerated] = {
    "refusal": Tolerated((None,), "says that there was none"),
    "tool_calls": Tolerated(([],), "only a message of the role 'assistant' has tool calls"),
    "tool_call_id": Tolerated((None,), "only a message of the role 'tool' answers a tool call"),
    "function_call": Tolerated((None,), NO_TOOLS),
    "audio": Tolerated((None,), "text only"),
    "annotations": Tolerated(([],), "says that there were none"),
    "reasoning_content": Tolerated((), "models are not shown what they thought in earlier turns"),
    "reasoning": Tolerated((), "models are not shown what they thought in earlier turns"),
}

STREAM_OPTIONS: Mapping[str, Tolerated] = {
    "include_obfuscation": Tolerated((False,), "this is what happens anyway"),
}
