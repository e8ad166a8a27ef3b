"""Boundaries stand where they pay, within the API's rules; and are found in traffic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.context import BoundaryDetector, Context
from stockpot.context.detection import ObservedPiece, observed
from stockpot.context.placement import place_boundaries
from stockpot.context.prompt import request_of
from stockpot.context.provider_facts import CacheRules, all_rules, rules_for
from stockpot.context.tokens import EstimatedTokens
from stockpot.requests import CacheBoundary, ChatRequest, Generation, Message

CLAUDE = rules_for("anthropic", "claude-sonnet-4-5")
COUNTER = EstimatedTokens()
TURNS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 2000)), min_size=1, max_size=8)


def marks(body: dict[str, Any]) -> list[tuple[int, str]]:
    """Blocks with a boundary (counted over the whole request), and for how long."""
    system: list[dict[str, Any]] = body.get("system", [])
    blocks = [*body.get("tools", []), *system]
    for message in body["messages"]:
        blocks += message["content"]
    return [
        (place, block["cache_control"]["ttl"])
        for place, block in enumerate(blocks)
        if "cache_control" in block
    ]


def written_text(body: dict[str, Any], block: int) -> str:
    """All up to a block, without the marks."""
    blocks = [*body.get("tools", []), *body.get("system", [])]
    for message in body["messages"]:
        blocks += [{**part, "role": message["role"]} for part in message["content"]]
    kept = [
        {key: value for key, value in each.items() if key != "cache_control"} for each in blocks[: block + 1]
    ]
    return str(kept)


@given(
    TURNS,
    st.integers(0, 9000),
    st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["5m", "1h"])), max_size=6),
)
def test_rules_of_the_api_hold_and_each_request_reads_what_the_last_one_wrote(
    turns: list[tuple[int, int]], system: int, wanted: list[tuple[int, str]]
) -> None:
    tools = [{"name": "find", "parameters": {"type": "object"}}]
    context = Context(system="s" * system, tools=tools, documents={"d": "word " * (system // 9)})
    before: list[str] = []
    for number, (calls, characters) in enumerate(turns):
        context.user("u" * characters)
        for ttl in [ttl for turn, ttl in wanted if turn == number]:
            context.boundary(ttl=ttl)
        body = context.anthropic("claude-sonnet-4-5", max_tokens=10)
        found = marks(body)
        assert len(found) <= 4
        ttls = [ttl for _, ttl in found]
        assert ttls == sorted(ttls, key=lambda ttl: ttl != "1h")  # 1h before 5m
        assert body == context.anthropic("claude-sonnet-4-5", max_tokens=10)
        written = [written_text(body, place) for place, _ in found]
        if before and len(wanted) < 3:
            # What the request before wrote last is exactly at one of ours, however many blocks lie between.
            assert before[-1] in written
        before = written
        ids = [f"{number}-{call}" for call in range(calls)]
        if ids:
            context.assistant(tool_calls=[{"id": id, "name": "find", "arguments": "{}"} for id in ids])
            for id in ids:
                context.tool_result(id, "r")
        else:
            context.assistant("a")
            continue
        body = context.anthropic("claude-sonnet-4-5", max_tokens=10)
        written = [written_text(body, place) for place, _ in marks(body)]
        if before and len(wanted) < 3:
            assert before[-1] in written
        before = written
        context.assistant("done")


def test_nothing_is_marked_below_the_minimum_nor_on_an_empty_block() -> None:
    short = ChatRequest(Generation("m", ""), (Message("user", "hi"),))
    assert place_boundaries(short, CLAUDE, COUNTER).boundaries == ()
    long = ChatRequest(
        Generation("m", ""),
        (Message("user", "x" * 9000), Message("assistant", "")),
        boundaries=(CacheBoundary(1, None, 300), CacheBoundary(0, 0, 300)),
    )
    assert [
        (each.message, each.characters) for each in place_boundaries(long, CLAUDE, COUNTER).boundaries
    ] == [(0, None)]


def test_other_providers_get_none_and_our_own_engine_keeps_what_was_asked_for() -> None:
    context = Context(system="s" * 9000)
    context.boundary("1h")
    context.user("hi")
    request = request_of(context.prompt, Generation("m", ""))
    assert place_boundaries(request, rules_for("openai", "gpt-5"), COUNTER).boundaries == ()
    assert place_boundaries(request, rules_for("stockpot", "x"), COUNTER) == request
    assert "cache_control" not in str(context.openai("gpt-5"))
    assert "cache_control" in str(context.openai("m", server="stockpot"))


@pytest.mark.parametrize(
    ("provider", "model", "minimum"),
    [
        ("", "claude-opus-4-5-20251101", 4096),
        ("", "claude-opus-4-20250514", 1024),
        ("", "anthropic/claude-haiku-4-5", 4096),
        ("", "claude-opus-5-5", 512),
        ("anthropic", "claude-of-next-year", 1024),
        ("", "gpt-5.6-mini", 1024),
        ("", "gemini-2.5-pro", 2048),
        ("vllm", "anything", 16),
        ("", "llama-3", 1),
        ("somebody", "m", 1),
    ],
)
def test_the_rules_of_a_model(provider: str, model: str, minimum: int) -> None:
    assert rules_for(provider, model).min_tokens == minimum


def test_every_line_of_the_table_is_dated_and_has_a_source() -> None:
    for rules in all_rules():
        assert rules.source
        assert rules.as_of.startswith("2026-")
        assert 0 <= rules.read_price <= 1 <= rules.write_price <= rules.write_price_1h
        assert isinstance(rules, CacheRules)


PIECES = st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 900)), max_size=6), max_size=30)


@given(PIECES, st.integers(5, 60))
def test_what_is_suggested_is_shared_by_as_many_as_is_said(
    prompts: list[list[tuple[int, int]]], nodes: int
) -> None:
    detector = BoundaryDetector(nodes_max=nodes)
    seen = [[ObservedPiece(bytes([key]), 500) for key, _ in prompt] for prompt in prompts]
    for pieces in seen:
        detector.add(pieces)
        assert len(detector) <= nodes + 6
    for each in detector.suggest(min_tokens=500, min_requests=2):
        heads = [tuple(pieces[: each.pieces]) for pieces in seen if len(pieces) >= each.pieces]
        assert any(heads.count(head) >= each.requests for head in heads)
        assert each.tokens == 500 * each.pieces
        assert each.saved_tokens == (each.requests - 1) * each.tokens


def test_the_end_of_a_shared_system_prompt_is_found_in_traffic() -> None:
    detector = BoundaryDetector()
    for number in range(5):
        context = Context(system="s" * 8000, documents={"d": "x" * 8000})
        context.user(f"question {number}")
        detector.add(observed(request_of(context.prompt, Generation("m", "")), COUNTER))
    context = Context(system="s" * 8000)
    context.user("another")
    found = detector.boundaries(request_of(context.prompt, Generation("m", "")), COUNTER)
    assert [(each.message, each.characters) for each in found] == [(0, None)]
    (suggested,) = detector.suggest()
    assert (suggested.pieces, suggested.requests, suggested.branches) == (1, 5, 5)
