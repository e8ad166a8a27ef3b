"""Events of a backend as the Anthropic API tells them: the orders its documentation shows, and any other."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.events import (
    Completed,
    Delta,
    Finished,
    FinishReason,
    Started,
    Timings,
    ToolCallDelta,
    Usage,
)
from stockpot.wire.anthropic_answer import MessageCollector, MessageNarrator, arguments_of

OVER = Completed(Usage(25, {"ram": 5}, 15), Timings(0.001, 0.002, 0.003))

TEXT = [Delta(0, "Hello"), Delta(0, ""), Delta(0, "!")]
TOOL = [
    Delta(0, "Okay, let's check"),
    Delta(0, " the weather:"),
    Delta(0, "", tool_calls=(ToolCallDelta(0, "toolu_01T1x", "get_weather"),)),
    Delta(0, "", tool_calls=(ToolCallDelta(0, arguments='{"location":'),)),
    Delta(0, "", tool_calls=(ToolCallDelta(0, arguments=' "San'),)),
    Delta(0, "", tool_calls=(ToolCallDelta(0, arguments=' Francisco, CA"}'),)),
]
THINKING = [
    Delta(0, "", reasoning="Let me solve this step by step:"),
    Delta(0, "", reasoning="\n\n1. First"),
    Delta(0, "", signature="EqQBCgIYAhIM1gbcDa9GJwZA2b3h"),
    Delta(0, "27 * 453 = 12,231"),
]


def start(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def piece(index: int, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def stop(index: int) -> dict[str, Any]:
    return {"type": "content_block_stop", "index": index}


# The orders of "Streaming messages" in Anthropic's API reference (basic, tool use, extended thinking) from
# `message_start` to `message_delta`, without what is optional there: `ping` and empty first pieces.
DOCUMENTED: list[tuple[list[Delta], FinishReason, str, list[dict[str, Any]]]] = [
    (
        TEXT,
        "stop",
        "end_turn",
        [
            start(0, type="text", text=""),
            piece(0, type="text_delta", text="Hello"),
            piece(0, type="text_delta", text="!"),
            stop(0),
        ],
    ),
    (
        TOOL,
        "tool_calls",
        "tool_use",
        [
            start(0, type="text", text=""),
            piece(0, type="text_delta", text="Okay, let's check"),
            piece(0, type="text_delta", text=" the weather:"),
            stop(0),
            start(1, type="tool_use", id="toolu_01T1x", name="get_weather", input={}),
            piece(1, type="input_json_delta", partial_json='{"location":'),
            piece(1, type="input_json_delta", partial_json=' "San'),
            piece(1, type="input_json_delta", partial_json=' Francisco, CA"}'),
            stop(1),
        ],
    ),
    (
        THINKING,
        "stop",
        "end_turn",
        [
            start(0, type="thinking", thinking="", signature=""),
            piece(0, type="thinking_delta", thinking="Let me solve this step by step:"),
            piece(0, type="thinking_delta", thinking="\n\n1. First"),
            piece(0, type="signature_delta", signature="EqQBCgIYAhIM1gbcDa9GJwZA2b3h"),
            stop(0),
            start(1, type="text", text=""),
            piece(1, type="text_delta", text="27 * 453 = 12,231"),
            stop(1),
        ],
    ),
    ([], "length", "max_tokens", []),
]


def told(deltas: list[Delta], end: Finished, *, started: Started | None = None) -> list[dict[str, Any]]:
    """The events a client reads, each under the name that its data repeats."""
    narrator = MessageNarrator(id="msg_1", model="m")
    if started is not None:
        assert narrator.started(started) == b""
    stream = b"".join([narrator.delta(delta) for delta in deltas])
    stream += narrator.finished(end) + narrator.completed(OVER)
    events: list[dict[str, Any]] = []
    for block in stream.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def collected(deltas: list[Delta], end: Finished, over: Completed = OVER) -> dict[str, Any]:
    collector = MessageCollector(id="msg_1", model="m")
    for delta in deltas:
        collector.delta(delta)
    collector.finished(end)
    return json.loads(msgspec.json.encode(collector.answer(over)))


@pytest.mark.parametrize(("deltas", "reason", "stop_reason", "expected"), DOCUMENTED)
def test_documented_orders(
    deltas: list[Delta], reason: FinishReason, stop_reason: str, expected: list[dict[str, Any]]
) -> None:
    events = told(deltas, Finished(0, reason), started=Started(25, {"ram": 5}, 0.0))
    first, *blocks, end, last = events
    assert first["type"] == "message_start"
    message = first["message"]
    assert message["usage"].pop("cache_creation")
    assert message == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": 20,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 5,
            "output_tokens": 0,
        },
    }
    assert blocks == expected
    assert end["delta"] == {"stop_reason": stop_reason, "stop_sequence": None}
    assert (end["usage"]["input_tokens"], end["usage"]["output_tokens"]) == (20, 15)
    assert end["stockpot"]["cached_tokens"]["ram"] == 5
    assert last == {"type": "message_stop"}


def test_what_a_remote_prompt_holds_is_told_at_the_end() -> None:
    first, *_, end, _ = told(TEXT, Finished(0, "stop"))
    assert first["message"]["usage"]["input_tokens"] == 0
    assert end["usage"]["input_tokens"] == 20


@pytest.mark.parametrize(
    ("deltas", "end", "stop_reason", "stop_sequence"),
    [
        (TEXT, Finished(0, "stop", stop_sequence="END"), "stop_sequence", "END"),
        (TEXT, Finished(0, "content_filter"), "refusal", None),
        ([Delta(0, "", refusal="No.")], Finished(0, "stop"), "refusal", None),
        (TOOL, Finished(0, "stop"), "tool_use", None),
        (TOOL, Finished(0, "length"), "max_tokens", None),
    ],
)
def test_why_an_answer_ended(
    deltas: list[Delta], end: Finished, stop_reason: str, stop_sequence: str | None
) -> None:
    whole = collected(deltas, end)
    delta = told(deltas, end)[-2]["delta"]
    for answer in (whole, delta):
        assert (answer["stop_reason"], answer["stop_sequence"]) == (stop_reason, stop_sequence)


def test_counts_are_divided_as_the_api_divides_them() -> None:
    usage = Usage(100, {"ram": 20, "upstream": 10}, 7, promised_tokens={300: 30, 3600: 15})
    assert collected(TEXT, Finished(0, "stop"), Completed(usage, OVER.timings))["usage"] == {
        "input_tokens": 25,
        "cache_creation_input_tokens": 45,
        "cache_read_input_tokens": 30,
        "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 15},
        "output_tokens": 7,
    }


def test_a_call_without_an_id_gets_one_and_broken_arguments_are_kept() -> None:
    deltas = [
        Delta(0, "", tool_calls=(ToolCallDelta(0, name="a"),)),
        Delta(0, "", tool_calls=(ToolCallDelta(1, name="b", arguments='{"x": 1'),)),
        Delta(0, "", tool_calls=(ToolCallDelta(2, name="c", arguments="[1]"),)),
    ]
    content = collected(deltas, Finished(0, "length"))["content"]
    assert [block["input"] for block in content] == [{}, {"INVALID_JSON": '{"x": 1'}, {"INVALID_JSON": "[1]"}]
    assert len({block["id"] for block in content}) == 3
    assert all(block["id"].startswith("toolu_") for block in content)


def _calling(index: int, words: str) -> Delta:
    return Delta(0, "", tool_calls=(ToolCallDelta(index, f"call-{index}", f"tool-{index}", words),))


_WORDS = st.text('ab\n"é', min_size=1, max_size=3)
_NONE = st.just("")
_DELTAS = st.lists(
    st.one_of(
        st.builds(Delta, st.just(0), _WORDS),
        st.builds(Delta, st.just(0), _NONE, reasoning=_WORDS),
        st.builds(Delta, st.just(0), _NONE, signature=_WORDS),
        st.builds(Delta, st.just(0), _NONE, refusal=_WORDS),
        st.builds(Delta, st.just(0), _WORDS, reasoning=_WORDS),
        st.builds(_calling, st.integers(0, 2), _WORDS),
    ),
    max_size=12,
)


@given(_DELTAS)
def test_a_stream_tells_what_a_whole_answer_holds(deltas: list[Delta]) -> None:
    end = Finished(0, "stop")
    first, *blocks, _, last = told(deltas, end)
    assert (first["type"], last["type"]) == ("message_start", "message_stop")
    gathered: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    running: int | None = None
    for event in blocks:
        index = event["index"]
        if event["type"] == "content_block_start":
            assert running is None
            assert index == len(gathered)
            running = index
            gathered.append(event["content_block"])
        elif event["type"] == "content_block_stop":
            assert running == index
            running = None
        elif event["delta"]["type"] == "input_json_delta":
            inputs[index] = inputs.get(index, "") + event["delta"]["partial_json"]
        else:
            assert running == index
            name = event["delta"]["type"].removesuffix("_delta")
            gathered[index][name] += event["delta"][name]
    assert running is None
    for index, text in inputs.items():
        gathered[index]["input"] = arguments_of(text)
    assert gathered == collected(deltas, end)["content"]
