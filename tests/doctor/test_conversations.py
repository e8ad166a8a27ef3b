"""Requests find their conversation, tenants never meet, memory is bounded; what is the same is no break."""

from __future__ import annotations

import json
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stockpot.context.tokens import EstimatedTokens
from stockpot.doctor.conversations import Conversations
from stockpot.doctor.diagnosis import Diagnosis
from stockpot.doctor.doctor import examine
from stockpot.doctor.exchange import Exchange
from stockpot.doctor.finding import Checked, Pair
from stockpot.doctor.readers.files import ReadCounts, read_lines

LONG = "Follow the rules of the house. " * 60


def read(bodies: list[dict[str, Any]]) -> list[Exchange]:
    return list(read_lines([json.dumps(body).encode() for body in bodies], "f", ReadCounts()))


def chat(system: str, *said: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    return {"model": "m", "messages": [{"role": "system", "content": system}, *messages], **more}


TEXTS = st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=5)


@given(
    st.lists(st.tuples(st.integers(0, 2), TEXTS), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_interleaved_conversations_find_themselves_and_are_no_breaks(
    spoken: list[tuple[int, list[str]]], chance: random.Random
) -> None:
    waiting = [
        [
            chat(LONG, *[f"{number} {text}" for text in texts[: 2 * turn + 1]], tenant=f"t{tenant}")
            for turn in range((len(texts) + 1) // 2)
        ]
        for number, (tenant, texts) in enumerate(spoken)
    ]
    bodies: list[dict[str, Any]] = []
    owners: list[int] = []
    while any(waiting):
        number = chance.choice([place for place, left in enumerate(waiting) if left])
        bodies.append(waiting[number].pop(0))
        owners.append(number)
    conversations, diagnosis = Conversations(), Diagnosis(EstimatedTokens())
    for exchange in read(bodies):
        found = conversations.add(exchange)
        if isinstance(found, Pair):
            assert found.earlier.tenant == found.later.tenant
            if found.relation == "conversation":
                assert owners[found.earlier.line - 1] == owners[found.later.line - 1]
            assert diagnosis.check(found).finding is None
    assert conversations.counts.conversations == len({*owners})


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), max_size=60), st.integers(1, 6))
def test_what_is_known_is_bounded(asked: list[tuple[int, int]], most: int) -> None:
    conversations = Conversations(conversations_max=most, memory_bytes=20_000)
    for exchange in read([chat(f"s{system}", f"q{number}", session=number) for number, system in asked]):
        conversations.add(exchange)
        known = conversations._known  # pyright: ignore[reportPrivateUsage]
        assert len(known.conversations) <= most
        assert known.size_bytes == sum(each.last.size_bytes for each in known.conversations.values())
        listed = sum(map(len, conversations._by_end.values()))  # pyright: ignore[reportPrivateUsage]
        assert listed <= len(known.conversations)


def causes(*bodies: dict[str, Any]) -> list[str]:
    found: list[Checked] = []
    examine(read(list(bodies)), told=found.append)
    return [each.finding.cause for each in found if each.finding is not None]


def test_branches_retries_and_other_questions_are_no_breaks() -> None:
    first = chat(LONG, "hello")
    talk = chat(LONG, "hello", "hi", "how are you?")
    assert causes(first, first, talk, talk) == []
    assert causes(first, talk, chat(LONG, "hello", "hi", "what is new?")) == []
    assert causes(first, chat(LONG, "another question")) == []
    assert causes(first, chat("Make a title of this. " * 50, "hello")) == []
    assert causes(chat("short", "a"), chat("shirt", "a", "b", "c")) == []


def test_a_changed_envelope_is_not_seen_by_a_model() -> None:
    one = {"messages": [{"role": "user", "content": "caf\u00e9 " * 90}], "model": "m"}
    parts = [{"type": "text", "text": "caf\u00e9 " * 90, "cache_control": {"type": "ephemeral"}}]
    other = {
        "model": "m",
        "messages": [
            {"content": parts, "role": "user"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "y"},
        ],
    }
    lines = [json.dumps(one, ensure_ascii=False).encode(), json.dumps(other).encode()]
    found: list[Checked] = []
    examine(read_lines(lines, "f", ReadCounts()), told=found.append)
    assert [each.pair.relation for each in found] == ["conversation"]
    assert found[0].finding is None


def test_the_place_is_told_to_the_path_into_a_schema() -> None:
    def tool(limit: int) -> list[dict[str, Any]]:
        schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"maximum": limit}}}
        return [{"type": "function", "function": {"name": "find", "parameters": schema}}]

    found: list[Checked] = []
    bodies = [chat(LONG, "hi", tools=tool(5)), chat(LONG, "hi", "yes", "go", tools=tool(50))]
    examine(read(bodies), told=found.append)
    finding = found[0].finding
    assert finding is not None
    assert finding.cause == "tool_changed"
    assert finding.place.path == "tools[0].function.parameters.properties.b.maximum"
    assert finding.tokens_lost > 300


def test_what_was_recorded_decides_whether_anything_was_lost() -> None:
    def at(time: str, cached: int) -> dict[str, Any]:
        usage = {"prompt_tokens": 600, "prompt_tokens_details": {"cached_tokens": cached}}
        return chat(f"Now: {time}. {LONG}", "hi", usage=usage)

    assert causes(at("10:00:01", 0), at("10:00:07", 0)) == ["timestamp"]
    assert causes(at("10:00:01", 0), at("10:00:07", 590)) == []
