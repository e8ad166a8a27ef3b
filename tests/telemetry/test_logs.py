"""Logs: one line each, as text or JSON; one for each request, without its prompt."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.mock_upstream import MockUpstream, Script
from tests.telemetry.gateway_at_work import SECRET, answer, attempt, gateway, question, record

from stockpot.events import Recalled
from stockpot.records import Cost
from stockpot.telemetry.logs import JsonFormatter, RequestLog, TextFormatter, configure_logging

LOGGER = "stockpot.telemetry.logs"


@pytest.fixture(autouse=True)
def root_as_before() -> Iterator[None]:
    """`configure_logging` changes the root; pytest's own handlers stand there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def line(**changes: Any) -> logging.LogRecord:
    made = logging.LogRecord("stockpot.soup", logging.INFO, "soup.py", 1, "%s is ready", ("soup",), None)
    made.created, made.msecs = 1_700_000_000.25, 250.0
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_text_and_json_say_the_same() -> None:
    told = line(fields={"model": "m 1", "cost_usd": 0.000002, "shared": True})
    assert TextFormatter().format(told) == (
        '2023-11-14T22:13:20.250Z INFO stockpot.soup: soup is ready model="m 1" cost_usd=0.000002 shared=true'
    )
    assert json.loads(JsonFormatter().format(told)) == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "stockpot.soup",
        "message": "soup is ready",
        "model": "m 1",
        "cost_usd": 0.000002,
        "shared": True,
    }


def test_the_request_is_named_where_it_is_known() -> None:
    assert json.loads(JsonFormatter().format(line(request_id="r-1")))["request_id"] == "r-1"


def test_a_field_cannot_pass_for_the_line() -> None:
    assert json.loads(JsonFormatter().format(line(fields={"level": "debug"})))["level"] == "info"


def test_a_traceback_is_part_of_its_line() -> None:
    try:
        raise ValueError("burnt")
    except ValueError as error:
        failed = line(exc_info=(type(error), error, error.__traceback__))
    text = JsonFormatter().format(failed)
    assert "\n" not in text
    assert "ValueError: burnt" in json.loads(text)["exception"]
    assert TextFormatter().format(failed).endswith("ValueError: burnt")


@given(st.text(max_size=40))
def test_what_clients_send_stays_on_one_line(model: str) -> None:
    told = line(fields={"model": model, "team": "kitchen"})
    for text in (TextFormatter().format(told), JsonFormatter().format(told)):
        assert len(text.splitlines()) == 1
    assert json.loads(JsonFormatter().format(told))["model"] == model


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_programs_log_to_standard_error(log_format: Any, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", log_format)
    logging.getLogger("stockpot").info("ready")
    logging.getLogger("stockpot").debug("not told")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and "ready" in captured.err
    assert captured.err.startswith("{") == (log_format == "json")


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, dict[str, Any]]]:
    """Level and fields of the lines of requests."""
    return [(each.levelno, getattr(each, "fields", {})) for each in caplog.records if each.name == LOGGER]


def test_failures_of_backends_are_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    log = RequestLog()
    log.observe_request(record(attempt()))
    log.observe_request(record(attempt(cause="reset"), attempt("b")))
    log.observe_request(record(cause="overloaded"))
    log.observe_request(record(cause="invalid_request"))
    log.observe_request(record(attempt(cause="unauthenticated"), cause="unauthenticated"))
    log.observe_request(record(attempt(cause="cancelled"), cause="cancelled"))
    levels = [level for level, _ in logged(caplog)]
    assert levels == [logging.DEBUG, logging.INFO, logging.INFO, logging.DEBUG, logging.INFO, logging.DEBUG]
    facts = logged(caplog)[1][1]
    assert facts["attempts"] == "a:reset,b:ok"
    assert facts["request_id"] == "r-1" and facts["client_request_id"] == "mine"
    assert facts["key_id"] == "k1" and facts["team"] == "kitchen"
    assert facts["cost_usd"] == 0.004
    assert facts["prompt_tokens"] == 200
    assert "cause" not in facts


def test_what_caches_of_answers_did_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, LOGGER)
    log = RequestLog()
    hit = Recalled("semantic", "calibrated", "e2", 60.0, 0.97, 0.004, "", 80, 20, 500, 0.5)
    for each in (
        record(recalled=hit, cost=Cost(0, "none")),
        record(recalled=hit, shared=True),
        record(attempt(), recalled=Recalled("miss", "not_kept")),
        record(attempt()),
    ):
        log.observe_request(each)
    given, shared, missed, unasked = (facts for _, facts in logged(caplog))
    assert (given["recall"], given["recall_entry"], given["recall_similarity"]) == ("semantic", "e2", 0.97)
    assert (given["saved_tokens"], given["saved_usd"], given["saved_s"]) == (100, 5e-7, 0.5)
    assert (given["cost_usd"], given["cost_source"]) == (0, "none")
    assert shared["recall"] == "semantic" and "saved_usd" not in shared
    assert (missed["recall"], missed["recall_reason"]) == ("miss", "not_kept") and "saved_usd" not in missed
    assert not [name for name in unasked if name.startswith(("recall", "saved"))]


@pytest.mark.anyio
async def test_a_request_through_the_gateway_is_logged_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    async with MockUpstream() as mock, gateway({"a": {"url": mock.url}}) as serving:
        mock.default = Script(text="a very private answer")
        await answer(serving, question())
    (level, facts) = logged(caplog)[0]
    assert level == logging.DEBUG
    assert facts["backend"] == "a" and facts["attempts"] == "a:ok" and facts["completion_tokens"] == 4
    lines = [
        formatter.format(each) for each in caplog.records for formatter in (TextFormatter(), JsonFormatter())
    ]
    assert not [each for each in lines if SECRET in each or "private" in each]
