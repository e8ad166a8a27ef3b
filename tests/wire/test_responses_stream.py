"""Events of a backend as the stream of the Responses API: in the documented orders, and any other."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from stockpot.clock import SystemClock
from stockpot.errors import EngineFailed, QueueFull, StockpotError
from stockpot.events import Completed, Delta, Finished, FinishReason, Started, Timings, ToolCallDelta, Usage
from stockpot.wire.responses_answer import ResponseCollector, ResponseNarrator, response_begun
from stockpot.wire.shapes_responses import ResponsesShape

OVER = Completed(Usage(25, {"ram": 5}, 15), Timings(0.001, 0.002, 0.003))
BEGUN = response_begun(ResponsesShape(model="m", input="hi"), id="resp_0a", created_s=1_700_000_000)


def told(deltas: list[Delta], reason: FinishReason = "stop") -> list[dict[str, Any]]:
    """The events of a whole stream."""
    narrator = ResponseNarrator(BEGUN, logprobs=False, clock=SystemClock())
    stream = narrator.started(Started(25, {"ram": 5}, 0.0))
    stream += b"".join(map(narrator.delta, deltas))
    stream += narrator.finished(Finished(0, reason)) + narrator.completed(OVER) + narrator.last
    return parsed(stream)


def parsed(stream: bytes) -> list[dict[str, Any]]:
    """Checks what all streams have in common: names, and numbers without a gap."""
    events: list[dict[str, Any]] = []
    for number, block in enumerate(stream.decode().removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        events.append(event)
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


TEXT_ORDER = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
CALL_ORDER = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]


def test_text_in_the_documented_order() -> None:
    events = told([Delta(0, "Hi"), Delta(0, ""), Delta(0, " there!")])
    assert kinds(events) == ["created", "in_progress", *TEXT_ORDER, "completed"]
    assert events[0]["response"]["status"] == events[1]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[2]["item"] == {
        "type": "message",
        "id": "msg_0a00",
        "status": "in_progress",
        "content": [],
        "role": "assistant",
    }
    place = {"item_id": "msg_0a00", "output_index": 0, "content_index": 0}
    empty: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    whole = {**empty, "text": "Hi there!"}
    assert place.items() <= events[3].items()
    assert events[3]["part"] == empty
    assert (events[4]["delta"], events[5]["delta"]) == ("Hi", " there!")
    assert events[6]["text"] == "Hi there!"
    assert events[7]["part"] == whole
    assert events[8]["item"]["status"] == "completed"
    assert events[8]["item"]["content"] == [whole]
    assert events[9]["response"]["output"] == [events[8]["item"]]
    assert events[9]["response"]["usage"]["total_tokens"] == 40


def test_calls_in_the_documented_order() -> None:
    deltas = [
        Delta(0, "See:"),
        Delta(0, " "),
        Delta(0, "", tool_calls=(ToolCallDelta(0, "c1", "f"),)),
        Delta(0, "", tool_calls=(ToolCallDelta(0, arguments='{"a":'),)),
        Delta(0, "", tool_calls=(ToolCallDelta(0, arguments="1}"), ToolCallDelta(1, "c2", "g", "{"))),
        Delta(0, "", tool_calls=(ToolCallDelta(1, arguments="}"),)),
    ]
    events = told(deltas, "tool_calls")
    assert kinds(events) == ["created", "in_progress", *TEXT_ORDER, *CALL_ORDER, *CALL_ORDER, "completed"]
    assert events[9]["item"]["arguments"] == ""
    assert events[12]["arguments"] == '{"a":1}'
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", *["function_call"] * 2]


def test_reasoning_and_a_refusal() -> None:
    deltas = [Delta(0, "", reasoning="hmm"), Delta(0, "Well"), Delta(0, "", refusal="No.")]
    events = told(deltas)
    assert kinds(events)[2:-1] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "content_part.added",
        "refusal.delta",
        "refusal.done",
        "content_part.done",
        "output_item.done",
    ]
    assert events[14]["content_index"] == 1
    assert events[15]["refusal"] == "No."


def test_an_answer_cut_off() -> None:
    events = told([Delta(0, "Hi")], "length")
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-2]["item"]["status"] == "incomplete"


def test_an_empty_answer() -> None:
    assert kinds(told([])) == ["created", "in_progress", "completed"]


def test_failures() -> None:
    errors: list[tuple[StockpotError, str]] = [
        (EngineFailed("It stopped."), "server_error"),
        (QueueFull("Full."), "rate_limit_exceeded"),
    ]
    for error, code in errors:
        narrator = ResponseNarrator(BEGUN, logprobs=False, clock=SystemClock())
        events = parsed(narrator.delta(Delta(0, "Hi")) + narrator.failed(error))
        assert kinds(events) == ["created", "in_progress", *TEXT_ORDER[:3], "failed"]
        response = events[-1]["response"]
        assert response["status"] == "failed"
        assert response["error"]["code"] == code
        assert response["error"]["message"] == str(error)
        assert response["output"][0]["content"][0]["text"] == "Hi"


def test_a_failure_before_anything() -> None:
    narrator = ResponseNarrator(BEGUN, logprobs=False, clock=SystemClock())
    assert kinds(parsed(narrator.failed(EngineFailed("It stopped.")))) == ["created", "in_progress", "failed"]


_TEXTS = st.text(max_size=4)


def _deltas(pieces: list[tuple[str, str]]) -> list[Delta]:
    """Deltas in which calls follow one another."""
    deltas: list[Delta] = []
    calls = -1
    for kind, text in pieces:
        match kind:
            case "text":
                deltas.append(Delta(0, text))
            case "reasoning":
                deltas.append(Delta(0, "", reasoning=text))
            case "refusal":
                deltas.append(Delta(0, "", refusal=text))
            case _:
                calls += 1
                begin = ToolCallDelta(calls, f"c{calls}", "f", text)
                deltas.append(Delta(0, "", tool_calls=(begin, ToolCallDelta(calls, arguments="}"))))
    return deltas


@given(
    st.lists(st.tuples(st.sampled_from(("text", "reasoning", "refusal", "call")), _TEXTS), max_size=12),
    st.sampled_from(("stop", "length", "tool_calls", "content_filter")),
)
def test_every_stream_says_what_the_whole_answer_says(
    pieces: list[tuple[str, str]], reason: FinishReason
) -> None:
    """Items are added, filled and done in order, one at a time, and their deltas make up the answer."""
    deltas = _deltas(pieces)
    collector = ResponseCollector(BEGUN, logprobs=False, clock=SystemClock())
    for delta in deltas:
        collector.delta(delta)
    collector.finished(Finished(0, reason))
    whole = json.loads(msgspec.json.encode(collector.answer(OVER)))
    events = told(deltas, reason)
    final = events[-1]["response"]
    assert {**final, "completed_at": None} == {**whole, "completed_at": None}
    texts: dict[tuple[int, int], str] = {}
    open_item: int | None = None
    done: list[dict[str, Any]] = []
    for event in events[2:-1]:
        index = event["output_index"]
        if event["type"] == "response.output_item.added":
            assert open_item is None
            assert index == len(done)
            open_item = index
        elif event["type"] == "response.output_item.done":
            assert open_item == index
            done.append(event["item"])
            open_item = None
        else:
            assert open_item == index
            if event["type"].endswith(".delta"):
                place = (index, event.get("content_index", 0))
                texts[place] = texts.get(place, "") + event["delta"]
    assert open_item is None
    assert done == final["output"]
    for index, item in enumerate(done):
        if item["type"] == "function_call":
            assert texts[index, 0] == item["arguments"]
        else:
            for place, part in enumerate(item["content"]):
                assert texts[index, place] == part.get("text", part.get("refusal"))
