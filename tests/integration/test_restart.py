"""Servers that are killed, and what the next one finds."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from tests.integration.conftest import StartServer
from tests.integration.servers import Server, story

KILLS = 10
PROMPTS = [story(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The answers of a server without any cache."""
    server = Server(tmp_path_factory.mktemp("cold"), cache=False).start()
    yield {prompt: server.ask(prompt)[0] for prompt in PROMPTS}
    server.kill()


def test_the_next_process_answers_warm_from_disk(
    tmp_path: Path, cold: dict[str, str], start_server: StartServer
) -> None:
    first = start_server(tmp_path)
    assert first.ask(PROMPTS[0])[0] == cold[PROMPTS[0]]
    first.written()
    first.kill()
    second = start_server(tmp_path)
    text, cached = second.ask(PROMPTS[0])
    assert text == cold[PROMPTS[0]]
    assert cached["disk"] > 200


def test_killed_at_any_moment_under_load_nothing_wrong_is_served(
    tmp_path: Path, cold: dict[str, str], start_server: StartServer
) -> None:
    rng = random.Random(1)
    warm = 0
    wrong: list[tuple[str, str]] = []
    for kill in range(KILLS):
        server = start_server(tmp_path)
        if kill:
            assert server.admin("POST", "verify")["refused"] == {}

        def load(server: Server = server, seed: int = kill) -> None:
            nonlocal warm
            picks = random.Random(seed)
            with suppress(httpx2.HTTPError):  # killed meanwhile
                while True:
                    prompt = picks.choice(PROMPTS)
                    text, cached = server.ask(prompt)
                    warm += bool(cached.get("disk"))
                    if text != cold[prompt]:
                        wrong.append((text, cold[prompt]))

        # One at a time: side by side, where cells lie decides between tokens that are nearly as likely (see
        # tests/engine/test_exactness.py), and a wrong answer could not be told from that.
        client = threading.Thread(target=load)
        client.start()
        time.sleep(rng.uniform(0.05, 1.2))
        server.kill()
        client.join()
    assert wrong == []
    assert warm > 0
