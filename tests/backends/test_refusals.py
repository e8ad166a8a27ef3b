"""What the engine in this process cannot do is refused by name; what asks for nothing is welcome."""

from __future__ import annotations

from typing import Any

import pytest

from stockpot.backends.embedded import EmbeddedBackend
from stockpot.engine.core import EngineLimits
from stockpot.engine.fake_driver import FakeDriver
from stockpot.errors import UnsupportedField
from stockpot.requests import (
    ChatRequest,
    CompletionRequest,
    Generation,
    ImagePart,
    Message,
    OpaquePart,
    Role,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

pytestmark = pytest.mark.anyio


def generation(**values: Any) -> Generation:
    return Generation("fake", "r", max_tokens=2, **values)


def chat(*, role: Role = "user", message: dict[str, Any] | None = None, **values: Any) -> ChatRequest:
    return ChatRequest(
        values.pop("generation", generation()), (Message(role, "x", **(message or {})),), **values
    )


CALL = ToolCall("c", "f", "{}")
AUDIO = OpaquePart("openai", {"type": "input_audio"})
DOCUMENT = OpaquePart("anthropic", {"type": "document"})
REFUSED: tuple[tuple[ChatRequest, str, str], ...] = (
    (chat(tools=(Tool("f"),)), "tools", "tool calls"),
    (chat(tool_choice=ToolChoice("required")), "tool_choice", "tool calls"),
    (chat(tool_choice=ToolChoice("named", "f")), "tool_choice", "tool calls"),
    (chat(role="assistant", message={"tool_calls": (CALL,)}), "messages[0].tool_calls", "tool calls"),
    (chat(role="tool", message={"tool_call_id": "c"}), "messages[0].role", "tool"),
    (
        chat(message={"parts": (TextPart("x"), ImagePart(url="u"))}),
        "messages[0].content[1].type",
        "image_url",
    ),
    (chat(message={"parts": (AUDIO,)}), "messages[0].content[0].type", "input_audio"),
    (
        chat(message={"parts": (DOCUMENT,)}, generation=generation(dialect="anthropic")),
        "messages[0].content[0].type",
        "document",
    ),
)
EXTRAS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"extras": {"store": False, "banana": 1}}, "banana"),
    ({"extras": {"store": True}}, "store"),
    ({"extras": {"use_beam_search": 0}}, "use_beam_search"),
    ({"extras": {"suffix": ""}}, "suffix"),
    ({"extras": {"user": "ann"}, "dialect": "anthropic"}, "user"),
    ({"extras": {"thinking": {"type": "enabled"}}, "dialect": "anthropic"}, "thinking"),
)


async def started() -> EmbeddedBackend:
    backend = EmbeddedBackend(FakeDriver(), EngineLimits(block_tokens=8), served_name="fake")
    await backend.start()
    return backend


async def test_tools_and_parts_are_refused_by_name() -> None:
    backend = await started()
    for request, param, words in REFUSED:
        with pytest.raises(UnsupportedField, match=words) as refusal:
            await anext(backend.generate(request))
        assert refusal.value.param == param
        if request.messages[0].parts or request.tools:
            with pytest.raises(UnsupportedField):
                await backend.tokenize("fake", request, special=False)
    await backend.stop(drain=True)


@pytest.mark.parametrize(("values", "param"), EXTRAS)
async def test_fields_that_ask_for_something_are_refused_by_name(values: dict[str, Any], param: str) -> None:
    backend = await started()
    with pytest.raises(UnsupportedField) as refusal:
        await anext(backend.generate(chat(generation=generation(**values))))
    assert refusal.value.param == param
    await backend.stop(drain=True)


async def test_what_asks_for_nothing_is_welcome() -> None:
    backend = await started()
    annotated = generation(extras={"user": "ann", "metadata": {}, "verbosity": None, "service_tier": "auto"})
    no_tools = chat(generation=annotated, tool_choice=ToolChoice("none"), parallel_tool_calls=True)
    infilling = CompletionRequest(generation(extras={"suffix": "", "best_of": 1}), "once")
    quiet = generation(dialect="anthropic", extras={"thinking": {"type": "disabled"}})
    for request in (no_tools, infilling, chat(generation=quiet)):
        assert [event async for event in backend.generate(request)]
    await backend.stop(drain=True)
