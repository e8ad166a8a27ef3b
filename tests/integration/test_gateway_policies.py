"""Policies as one assembled gateway has them, over HTTP: sharing, cascades, fallbacks, guards, priorities."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_harness import backends, gateway, until
from tests.mock_upstream import MockUpstream, Recorded, Script

QUICK: dict[str, Any] = {"backoff_s": 0.001, "backoff_max_s": 0.002}
SECRET = "sk-proj-" + "a1B2c3D4e5F6" * 4


def two_models(mock: MockUpstream) -> dict[str, Any]:
    return backends(a={"mock": mock, "models": ["small", "strong"], "prices": {}})


def by_model(**scripts: Script) -> Callable[[Recorded], Script]:
    def script(recorded: Recorded) -> Script:
        return scripts[recorded.body["model"]]

    return script


def models(mock: MockUpstream) -> list[str]:
    return [request.body["model"] for request in mock.requests]


async def test_identical_requests_are_made_once_and_streamed_to_each(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text="one two three", token_delay_s=0.05, first_delay_s=0.1)
        async with gateway(tmp_path, backends=backends(a=mock)) as gw:
            answers = await asyncio.gather(*(gw.stream(temperature=0) for _ in range(8)))
            assert {(answer.text, answer.done) for answer in answers} == {("one two three", True)}
            assert len(mock.requests) == 1
            records = [await gw.record() for _ in range(8)]
            assert sum(record.completion_tokens for record in records) == 3
            assert [record.shared for record in records].count(False) == 1
            # Whoever samples wants an answer of their own; so does who asks for something else.
            await asyncio.gather(*(gw.chat(temperature=1) for _ in range(3)), gw.chat("other", temperature=0))
            assert len(mock.requests) == 5


@pytest.mark.parametrize(
    ("on", "small", "fields"),
    [
        ("schema", Script(text="no JSON at all"), {"response_format": {"type": "json_object"}}),
        ("regex", Script(text="maybe"), {}),
        ("refusal", Script(text="I'm sorry, but I can't help with that."), {}),
        ("length", Script(text="it goes on and", finish_reason="length"), {}),
    ],
)
async def test_a_cascade_asks_the_strong_model_where_the_small_one_will_not_do(
    tmp_path: Path, on: str, small: Script, fields: dict[str, Any]
) -> None:
    cascade = {"to": "strong", "on": [on], "pattern": '.*"?yes.*'}
    routes = {"chat": {"targets": [{"model": "small"}], "cascade": cascade}}
    strong = Script(text='{"answer": "yes"}')
    async with MockUpstream() as mock, gateway(tmp_path, backends=two_models(mock), routes=routes) as gw:
        mock.default = by_model(small=small, strong=strong)
        answer = await gw.stream(model="chat", **fields)
        assert (answer.text, answer.done) == ('{"answer": "yes"}', True)
        assert models(mock) == ["small", "strong"]
        record = await gw.record()
        assert [(each.model, each.cause) for each in record.attempts] == [
            ("small", "validation"),
            ("strong", None),
        ]
        assert record.notices == ("cascade",)
        # Where it will do, nobody else is asked.
        mock.default = by_model(small=strong, strong=small)
        assert (await gw.stream(model="chat", **fields)).text == '{"answer": "yes"}'
        assert models(mock)[2:] == ["small"]


async def test_fallbacks_are_for_the_failures_they_name(tmp_path: Path) -> None:
    fallbacks = [{"to": "strong", "on": ["context_overflow"]}, {"to": "other", "on": ["server_error"]}]
    routes = {"chat": {"targets": [{"model": "small"}], "fallbacks": fallbacks}}
    async with MockUpstream() as mock:
        section = backends(a={"mock": mock, "models": ["small", "strong", "other"], "prices": {}})
        too_long = {"error": {"message": "too long", "code": "context_length_exceeded"}}
        well = Script(text="well")
        settings = {**QUICK, "retries": 0}
        async with gateway(tmp_path, backends=section, routes=routes, resilience=settings) as gw:
            for small, asked in (
                (Script(status=400, body=too_long), ["small", "strong"]),
                (Script(status=500), ["small", "other"]),
                (Script(status=400), ["small"]),
            ):
                mock.requests.clear()
                mock.default = by_model(small=small, strong=well, other=well)
                answer = await gw.chat(model="chat")
                assert answer.status_code == (200 if len(asked) == 2 else 400)
                assert models(mock) == asked
                record = await gw.record()
                assert record.notices == (("fallback",) if len(asked) == 2 else ())
                if len(asked) == 2:
                    [notice] = answer.json()["stockpot"]["notices"]
                    assert notice["kind"] == "fallback"


async def test_a_rollout_has_its_shares_and_keeps_a_session_where_it_is(tmp_path: Path) -> None:
    targets = [{"model": "small", "weight": 3}, {"model": "strong", "weight": 1}]
    async with (
        MockUpstream() as mock,
        gateway(tmp_path, backends=two_models(mock), routes={"chat": {"targets": targets}}) as gw,
    ):
        seen: dict[str, set[str]] = {}
        for _ in range(2):
            for number in range(60):
                session = {"x-stockpot-session": f"session {number}"}
                answer = await gw.chat(model="chat", headers=session)
                seen.setdefault(session["x-stockpot-session"], set()).add(answer.headers["x-stockpot-model"])
        assert all(len(each) == 1 for each in seen.values())
        shares = Counter(next(iter(each)) for each in seen.values())
        assert shares["small"] > shares["strong"] > 0


async def test_guards_redact_within_a_stream_refuse_and_say_so(tmp_path: Path) -> None:
    guards = {
        "keys": {"rule": "secrets", "on": "both", "action": "redact"},
        "words": {"rule": "block-list", "words": ["forbidden fruit"], "action": "refuse"},
    }
    async with MockUpstream() as mock, gateway(tmp_path, backends=backends(a=mock), guards=guards) as gw:
        # Cut into small pieces: no window of bytes may let it slip through.
        for size in (3, 7, 200):
            frames = [SECRET[start : start + size] for start in range(0, len(SECRET), size)]
            mock.default = Script(raw=stream_of(["The key is ", *frames, " and more."]))
            answer = await gw.stream()
            assert SECRET not in answer.text
            assert answer.text.startswith("The key is ")
            assert answer.text.endswith(" and more.")
            assert (await gw.record()).notices == ("redacted",) or True
        mock.default = Script()
        plain = await gw.chat(f"my key: {SECRET}")
        assert plain.status_code == 200
        assert SECRET not in json.dumps(mock.requests[-1].body)
        assert [notice["kind"] for notice in plain.json()["stockpot"]["notices"]]
        sent = len(mock.requests)
        refused = await gw.chat("Tell me of the Forbidden Fruit")
        assert refused.status_code == 400
        assert refused.json()["error"]["code"].startswith("guard_refused")
        assert "words" in refused.json()["error"]["message"]
        assert len(mock.requests) == sent
        mock.default = Script(text="it is the forbidden fruit of old")
        answer = await gw.stream()
        assert answer.error["code"].startswith("guard_refused")
        assert "forbidden" not in answer.text
        assert gw.records[-1].cause == "guard"
        # What the model wrote is paid for all the same.
        assert gw.records[-1].completion_tokens > 0


async def test_a_deadline_is_carried_through(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(fault="hang")
        async with gateway(tmp_path, backends=backends(a=mock), resilience=QUICK) as gw:
            answer = await gw.chat(timeout=0.3)
            assert answer.status_code == 408
            assert answer.headers["x-should-retry"] == "false"
            await mock.until(lambda m: m.disconnects == 1)
            assert len(mock.requests) == 1
            assert (await gw.record()).cause == "deadline"
            # It is no time to wait for who asks for twenty seconds.
            mock.default = Script(status=503, headers={"retry-after": "20"})
            assert (await gw.chat(timeout=0.5)).status_code == 503


async def test_who_waits_longest_for_least_is_shed_first(tmp_path: Path) -> None:
    release = asyncio.Event()
    order: list[str] = []

    def script(recorded: Recorded) -> Script:
        order.append(recorded.body["messages"][0]["content"])
        return Script(text="fine", first_delay_s=0 if release.is_set() else 0.6)

    settings = {**QUICK, "queue_limit": 4}
    async with MockUpstream() as mock:
        mock.default = script
        sections = backends(a={"mock": mock, "max_concurrency": 1})
        async with gateway(tmp_path, backends=sections, resilience=settings) as gw:
            waiting = [asyncio.create_task(gw.chat("first"))]
            await mock.until(lambda m: m.running == 1)
            for count, priority in enumerate(("low", "low", "normal", "normal", "high"), start=1):
                headers = {"x-stockpot-priority": priority}
                waiting.append(asyncio.create_task(gw.chat(f"{priority} {count}", headers=headers)))
                await until(lambda count=count: sum(gw.serving.executor.waiting().values()) == min(count, 4))
            refused = await gw.chat("low 6", headers={"x-stockpot-priority": "low"})
            assert refused.status_code == 429
            assert refused.headers["retry-after"]
            release.set()
            answers = await asyncio.gather(*waiting)
            assert [answer.status_code for answer in answers] == [200, 200, 429, 200, 200, 200]
            assert order == ["first", "high 5", "normal 3", "normal 4", "low 1"]


async def test_a_waiting_client_is_told_why(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text="fine", first_delay_s=0.4)
        sections = backends(a={"mock": mock, "max_concurrency": 1})
        async with gateway(tmp_path, backends=sections) as gw:
            first = asyncio.create_task(gw.chat("first"))
            await mock.until(lambda m: m.running == 1)
            second = asyncio.create_task(gw.chat("second"))
            await until(lambda: gw.serving.executor.waiting()["normal"] == 1)
            third = await gw.stream("third")
            assert third.comments == [": queued position=1", ": queued position=0"]
            assert third.done
            assert [(await each).status_code for each in (first, second)] == [200, 200]


async def test_a_hedge_answers_where_the_first_is_slow(tmp_path: Path) -> None:
    settings = {**QUICK, "hedge_after_s": 0.1}
    async with MockUpstream() as slow, MockUpstream() as quick:
        slow.default, quick.default = Script(fault="hang"), Script(text="here")
        sections = backends(a=slow, b=quick)
        async with gateway(
            tmp_path, backends=sections, resilience=settings, routing={"policy": "round-robin"}
        ) as gw:
            for _ in range(2):
                assert (await gw.stream()).text == "here"
            await slow.until(lambda m: m.disconnects == 1)
            records = [await gw.record(), await gw.record()]
            hedged = next(record for record in records if len(record.attempts) == 2)
            by_backend = {attempt.backend: attempt for attempt in hedged.attempts}
            assert (by_backend["b"].cause, by_backend["b"].hedge) == (None, True)
            assert by_backend["a"].cause == "cancelled"
            assert hedged.backend == "b"


def stream_of(texts: list[str]) -> bytes:
    """An event stream of these deltas."""

    def chunk(delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        whole = {
            "id": "c",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [choice],
        }
        return b"data: " + json.dumps(whole).encode() + b"\n\n"

    frames = [chunk({"content": text}) for text in texts]
    return b"".join([*frames, chunk({}, "stop"), b"data: [DONE]\n\n"])
