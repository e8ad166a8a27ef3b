"""What goes wrong behind the gateway, as clients see it and the ledger has it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_harness import backends, bearer, gateway, until
from tests.mock_upstream import Fault, MockUpstream, Recorded, Script

QUICK: dict[str, Any] = {"backoff_s": 0.001, "backoff_max_s": 0.002}
ONCE: dict[str, Any] = {**QUICK, "retries": 0}
IN_TURN: dict[str, Any] = {"policy": "round-robin"}

# Script, cause where a stream was asked for, cause where not (None: no failure then).
BEFORE: dict[str, tuple[Script, str | None, str | None]] = {
    "reset": (Script(fault="reset"), "reset", "reset"),
    "hang": (Script(fault="hang"), "timeout", "timeout"),
    "broken JSON": (Script(fault="broken_json"), "format", "format"),
    "broken SSE": (Script(fault="broken_sse"), "format", "format"),
    "closed before its first token": (Script(fault="close"), "truncated", "truncated"),
    "500": (Script(status=500), "server_error", "server_error"),
    "503": (Script(status=503), "overloaded", "overloaded"),
    "429": (Script(status=429, headers={"retry-after": "1"}), "rate_limited", "rate_limited"),
    "error as its first event": (Script(fault="error_event"), "server_error", None),
    "a page of HTML": (Script(body=b"<html>"), "format", "format"),
    "nothing at all": (Script(raw=b""), "truncated", "format"),
    "key refused": (Script(status=401), "unauthenticated", "unauthenticated"),
}
WITHIN: tuple[tuple[Fault, str], ...] = (
    ("close", "truncated"),
    ("hang_midway", "timeout"),
    ("broken_json", "format"),
    ("broken_sse", "format"),
    ("error_event", "server_error"),
)


def failing(mock: MockUpstream, **extra: Any) -> dict[str, Any]:
    return {"mock": mock, "first_byte_timeout_s": 0.4, "idle_timeout_s": 0.4, **extra}


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        (name, stream)
        for name, (_, *causes) in BEFORE.items()
        for stream in (True, False)
        if causes[not stream]
    ],
)
async def test_what_fails_before_the_first_token_is_answered_by_another(
    tmp_path: Path, name: str, stream: bool
) -> None:
    script, *causes = BEFORE[name]
    cause = causes[not stream]
    async with MockUpstream() as bad, MockUpstream() as good:
        bad.default, good.default = script, Script(text="all is well")
        sections = backends(a=failing(bad), b=good)
        async with gateway(tmp_path, backends=sections, routing=IN_TURN, resilience=QUICK) as gw:
            for _ in range(2):  # in turn: one of the two begins where it fails
                if stream:
                    answer = await gw.stream()
                    assert (answer.text, answer.error, answer.done) == ("all is well", None, True)
                else:
                    response = await gw.chat()
                    assert response.json()["choices"][0]["message"]["content"] == "all is well"
                    assert response.headers["x-stockpot-backend"] == "b"
            records = [await gw.record(), await gw.record()]
            assert all(record.cause is None and record.backend == "b" for record in records)
            tried = [attempt.cause for record in records for attempt in record.attempts if attempt.cause]
            assert tried == [cause]
            assert gw.serving.executor.condition("a").failures == {cause: 1}
            assert [row["requests"] for row in await gw.usage()] == [2]


@pytest.mark.parametrize(("fault", "cause"), WITHIN)
async def test_what_fails_within_an_answer_ends_it_and_is_never_spliced(
    tmp_path: Path, fault: Fault, cause: str
) -> None:
    async with MockUpstream() as bad, MockUpstream() as good:
        bad.default = Script(text="one two three four", fault=fault, fault_after=2)
        good.default = Script(text="something else")
        async with gateway(
            tmp_path, backends=backends(a=failing(bad), b=good), routing=IN_TURN, resilience=QUICK
        ) as gw:
            answers = [await gw.stream(), await gw.stream()]
            broken, whole = sorted(answers, key=lambda each: each.done)
            assert (whole.text, whole.error, whole.done) == ("something else", None, True)
            # A connection that is lost may take with it what has just come.
            assert "one two".startswith(broken.text)
            if fault != "close":
                assert broken.text == "one two"
            assert broken.error is not None
            assert not broken.done
            records = {record.backend: record for record in [await gw.record(), await gw.record()]}
            assert records["a"].cause == cause
            [attempt] = records["a"].attempts
            # What came is paid for, and said to be reckoned here.
            assert (attempt.cause, attempt.estimated) == (cause, True)
            assert attempt.completion_tokens == len(broken.text.split())
            assert records["a"].cost.nanousd > 0


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/chat/completions", "openai"),
        ("/v1/completions", "openai"),
        ("/v1/responses", "openai"),
        ("/v1/messages", "anthropic"),
    ],
)
async def test_errors_have_the_shape_of_the_clients_dialect(tmp_path: Path, path: str, shape: str) -> None:
    async with (
        MockUpstream() as mock,
        gateway(tmp_path, backends=backends(a=failing(mock)), resilience=ONCE) as gw,
    ):
        for script, status in (
            (Script(status=500), 502),
            (Script(status=429, headers={"retry-after": "7"}), 429),
            (Script(status=400, body={"error": {"message": "too odd", "param": "x"}}), 400),
        ):
            for stream in (False, True):
                # Each on its own gateway's backend: a 429 leaves it alone for a while.
                mock.default = script
                answer = await gw.client.post(path, json=body_for(path, stream=stream))
                assert answer.status_code in (status, 429), answer.text
                detail = answer.json()
                if shape == "anthropic":
                    assert detail["type"] == "error"
                    assert set(detail["error"]) >= {"type", "message"}
                else:
                    assert set(detail["error"]) == {"message", "type", "param", "code"}
                if answer.status_code == 429:
                    assert 1 <= int(answer.headers["retry-after"]) <= 7


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_a_stream_that_breaks_says_so_in_its_dialect(tmp_path: Path, path: str) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text="one two three", fault="close", fault_after=2)
        async with gateway(tmp_path, backends=backends(a=failing(mock)), resilience=ONCE) as gw:
            answer = await gw.stream_of(path, body_for(path, stream=True))
            assert answer.status == 200
            assert not answer.done
            last = answer.events[-1]
            if path == "/v1/responses":
                assert last["type"] in ("error", "response.failed")
            elif path == "/v1/messages":
                assert last["type"] == "error"
                assert last["error"]["type"] == "api_error"
            else:
                assert last["error"]["code"] == "upstream_truncated"
            assert (await gw.record()).cause == "truncated"


async def test_a_slow_drip_is_read_as_it_comes(tmp_path: Path) -> None:
    async with MockUpstream() as mock:
        mock.default = Script(text="tiny pieces of é and 😀", drip_bytes=1, token_delay_s=0.0)
        async with gateway(tmp_path, backends=backends(a=mock)) as gw:
            assert (await gw.stream()).text == "tiny pieces of é and 😀"
            mock.default = Script(text="now stalls", drip_bytes=1, token_delay_s=30.0)
            answer = await gw.stream(timeout=0.3)
            assert (answer.text, answer.error["code"]) == ("", "deadline_exceeded")
            await mock.until(lambda m: m.disconnects == 1)
            assert [(await gw.record()).cause, (await gw.record()).cause] == [None, "deadline"]


async def test_a_storm_of_errors_opens_the_breaker_and_health_closes_it(tmp_path: Path) -> None:
    settings = {**ONCE, "breaker_failures": 3, "breaker_open_s": 0.2}
    async with MockUpstream() as mock:
        mock.default = Script(status=500)
        async with gateway(tmp_path, backends=backends(a=mock), resilience=settings) as gw:
            for _ in range(3):
                assert (await gw.chat()).status_code == 502
            assert gw.serving.executor.condition("a").breaker == "open"
            sent = len(mock.requests)
            refused = await gw.chat()
            assert refused.status_code == 502
            assert "left alone after failures" in refused.json()["error"]["message"]
            assert len(mock.requests) == sent
            # What is tried then is one request; it fails, and all is as it was.
            await until(lambda: gw.serving.executor.condition("a").breaker != "open")
            assert (await gw.chat()).status_code == 502
            assert gw.serving.executor.condition("a").breaker == "open"
            assert len(mock.requests) == sent + 1
            mock.default = Script(text="well again")
            await until(lambda: gw.serving.executor.condition("a").breaker != "open")
            assert (await gw.chat()).status_code == 200
            assert gw.serving.executor.condition("a").breaker == "closed"


async def test_retries_are_bounded_by_a_budget_over_all_requests(tmp_path: Path) -> None:
    settings = {**QUICK, "retries": 3, "retry_budget": 0.1, "breaker_failures": 10_000}
    async with MockUpstream() as mock:
        mock.default = Script(status=500)
        async with gateway(tmp_path, backends=backends(a=mock), resilience=settings) as gw:
            answers = await asyncio.gather(*(gw.chat(f"request {number}") for number in range(100)))
            assert {answer.status_code for answer in answers} == {502}
            # Ten in reserve, a tenth of a hundred requests, and one for each second this took.
            assert 100 < len(mock.requests) < 160
            attempts = sum([len((await gw.record()).attempts) for _ in range(100)])
            assert attempts == len(mock.requests)


async def test_retry_after_is_heeded_for_all_requests(tmp_path: Path) -> None:
    async with MockUpstream() as mock, MockUpstream() as other:
        mock.default = Script(status=429, headers={"retry-after": "60"})
        async with gateway(
            tmp_path, backends=backends(a=mock, b=other), routing=IN_TURN, resilience=QUICK
        ) as gw:
            for _ in range(6):
                assert (await gw.chat()).status_code == 200
            assert len(mock.requests) == 1
            assert gw.serving.executor.condition("a").resting == ("m",)


async def test_what_was_reserved_returns_when_a_request_fails(tmp_path: Path) -> None:
    """One request at a time, and limits below what eight reserve: each must give back what was not used."""
    faults = [Script(status=500), Script(fault="reset"), Script(fault="hang"), Script(fault="broken_json")]

    def script(request: Recorded) -> Script:
        return faults[int(request.body["messages"][0]["content"])]

    settings = {**ONCE, "breaker_failures": 100}
    async with MockUpstream() as mock:
        mock.default = script
        async with gateway(tmp_path, backends=backends(a=failing(mock)), resilience=settings) as gw:
            limits = {"concurrency": 1, "tokens_per_day": 900, "usd_per_day": 0.0015}
            key = bearer((await gw.create_key(limits=limits))["key"])
            for number in (0, 1, 2, 3) * 2:
                answer = await gw.chat(str(number), headers=key, max_tokens=100)
                assert answer.status_code in (502, 504), answer.text
            mock.default = Script(text="in the end")
            answer = await gw.chat("0", headers=key, max_tokens=100)
            assert answer.status_code == 200, answer.text
            [row] = await gw.usage()
            assert (row["requests"], row["failures"]) == (9, 8)


async def test_a_backend_that_is_away_and_comes_back(tmp_path: Path) -> None:
    mock = MockUpstream()
    async with mock:
        port = mock.port
    settings = {**ONCE, "breaker_open_s": 0.1, "breaker_failures": 1}
    section = backends(a=mock)
    assert str(port) in section["a"]["url"]
    async with gateway(tmp_path, backends=section, resilience=settings) as gw:
        refused = await gw.chat()
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        assert (await gw.client.get("/health")).status_code in (200, 503)
        async with mock:
            await until(lambda: gw.serving.gateway.health().ready)
            assert (await gw.chat()).status_code == 200


def body_for(path: str, *, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "m", "stream": stream}
    if path == "/v1/completions":
        return {**body, "prompt": "hello there"}
    if path == "/v1/responses":
        return {**body, "input": "hello there", "store": False}
    body["messages"] = [{"role": "user", "content": "hello there"}]
    return {**body, "max_tokens": 50} if path == "/v1/messages" else body
