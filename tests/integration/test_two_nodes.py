"""Two servers with one Redis: one need not compute what the other has; both forget what one invalidates."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.integration.conftest import StartServer
from tests.integration.servers import Server, story, until
from tests.redis_server import RedisServer

PROMPT = story(1)


@pytest.fixture
def nodes(tmp_path: Path, redis: RedisServer, start_server: StartServer) -> list[Server]:
    settings = {
        "STOCKPOT_CACHE__REDIS__URL": redis.url,
        "STOCKPOT_CACHE__DISK__CAPACITY_BYTES": "0",
        "STOCKPOT_CACHE__REDIS__TIMEOUT_S": "5",
    }
    return [start_server(tmp_path / name, **settings) for name in ("a", "b")]


def test_one_answers_what_only_the_other_has_seen_and_both_forget_together(nodes: list[Server]) -> None:
    a, b = nodes
    text, cached = a.ask(PROMPT)
    assert cached == {}
    a.written()
    again, cached = b.ask(PROMPT)
    assert again == text
    assert cached["redis"] > 200

    # Everything that was known is forgotten on both, and what is computed then is shared anew.
    order = a.admin("POST", "invalidate", kind="all", by="ann")
    assert order["pending"] is False
    until(lambda: b.admin("GET", "stats")["ram_blocks"] == 0)
    again, cached = b.ask(PROMPT)
    assert (again, cached) == (text, {})
    b.written()
    again, cached = a.ask(PROMPT)
    assert again == text
    assert cached["redis"] > 200


def test_a_node_that_was_away_catches_up(nodes: list[Server]) -> None:
    a, b = nodes
    text, _ = b.ask(PROMPT)
    b.written()
    assert b.ask(PROMPT)[1]["ram"] > 200
    b.signal(signal.SIGSTOP)
    beginning = PROMPT[: PROMPT.index(".", 60) + 1]  # ends with a token of its own
    a.admin("POST", "invalidate", kind="prefix", text=beginning, by="ann")
    b.signal(signal.SIGCONT)
    until(lambda: b.admin("GET", "stats")["ram_blocks"] == 0)
    again, cached = b.ask(PROMPT)
    assert again == text
    assert sum(cached.values()) <= 64
