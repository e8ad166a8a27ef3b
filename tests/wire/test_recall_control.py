"""What a request may say of answers that are kept, in every dialect, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.errors import RequestError
from stockpot.events import Event
from stockpot.requests import AS_ALLOWED, ChatRequest, CompletionRequest, RecallControl
from stockpot.wire.recall_control import recall_control

Serve = Callable[..., AbstractContextManager[httpx2.Client]]
Headers = dict[str, str] | list[tuple[str, str]]

TURNS = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "fake", "messages": TURNS},
    "/v1/completions": {"model": "fake", "prompt": "hi"},
    "/v1/responses": {"model": "fake", "input": "hi", "store": False},
    "/v1/messages": {"model": "fake", "max_tokens": 8, "messages": TURNS},
}


class RecordingBackend(FakeBackend):
    """Remembers what it was allowed."""

    def __init__(self) -> None:
        super().__init__(FakeBehaviour(accepts_all=True))
        self.allowed: list[RecallControl] = []

    async def generate(self, request: ChatRequest | CompletionRequest) -> AsyncGenerator[Event]:
        self.allowed.append(request.generation.recall)
        async for event in super().generate(request):
            yield event


@pytest.fixture(scope="module")
def recording() -> RecordingBackend:
    return RecordingBackend()


@pytest.fixture(scope="module")
def recorded(recording: RecordingBackend, serve: Serve) -> Generator[httpx2.Client, None, None]:
    """A client of a server over `recording`."""
    with serve(recording) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_every_dialect_takes_them(
    recorded: httpx2.Client, recording: RecordingBackend, path: str, stream: bool
) -> None:
    headers = {
        "Cache-Control": "no-store, max-age=60",
        "X-Stockpot-Recall": "exact",
        "x-stockpot-max-error": "0.005",
        "x-stockpot-recall-tags": "handbook, product:a ,handbook",
    }
    response = recorded.post(path, json={**BODIES[path], "stream": stream}, headers=headers)
    assert response.status_code == 200, response.text
    assert recording.allowed[-1] == RecallControl(
        store=False,
        semantic=False,
        max_age_s=60.0,
        max_error=0.005,
        tags=frozenset({"handbook", "product:a"}),
    )


@pytest.mark.parametrize("path", BODIES)
def test_without_them_all_is_as_the_operator_has_it(
    recorded: httpx2.Client, recording: RecordingBackend, path: str
) -> None:
    assert recorded.post(path, json=BODIES[path]).status_code == 200
    assert recording.allowed[-1] is AS_ALLOWED


def test_the_official_clients_say_nothing_of_it(recorded: httpx2.Client, recording: RecordingBackend) -> None:
    url = str(recorded.base_url).rstrip("/")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}])
    assert recording.allowed[-1] is AS_ALLOWED
    with anthropic.Anthropic(base_url=url, api_key="unused") as client:
        client.messages.create(model="fake", max_tokens=8, messages=[{"role": "user", "content": "hi"}])
    assert recording.allowed[-1] is AS_ALLOWED


@pytest.mark.parametrize(
    ("value", "allowed"),
    [
        ("no-cache", RecallControl(read=False)),
        ("no-store", RecallControl(store=False)),
        ("only-if-cached", RecallControl(only=True)),
        ("NO-CACHE ,, No-Store", RecallControl(read=False, store=False)),
        ("max-age=0", RecallControl(max_age_s=0.0)),
        ('max-age="30"', RecallControl(max_age_s=30.0)),
        ("max-age = 30", RecallControl(max_age_s=30.0)),
        ("max-age=" + "9" * 400, RecallControl(max_age_s=2.0**31)),
        ("max-age=5, max-age=60", RecallControl(max_age_s=5.0)),
        # RFC 9111, 5.2.3: directives that are not known are passed over.
        ("max-stale=10, min-fresh=x, no-transform, community=UCI, private", AS_ALLOWED),
        ("", AS_ALLOWED),
        ("=, =no-store", AS_ALLOWED),
    ],
)
def test_directives(value: str, allowed: RecallControl) -> None:
    assert recall_control({"cache-control": value}) == allowed


def test_lines_of_one_name_are_one_list(recorded: httpx2.Client, recording: RecordingBackend) -> None:
    headers: Headers = [
        ("cache-control", "no-store"),
        ("cache-control", "max-age=5"),
        ("x-stockpot-recall-tags", "a"),
        ("x-stockpot-recall-tags", "b"),
    ]
    path = "/v1/chat/completions"
    assert recorded.post(path, json=BODIES[path], headers=headers).status_code == 200
    assert recording.allowed[-1] == RecallControl(store=False, max_age_s=5.0, tags=frozenset("ab"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache-control", "max-age"),
        ("cache-control", "max-age=-1"),
        ("cache-control", "max-age=1.5"),
        ("cache-control", "no-store, max-age=soon"),
        ("x-stockpot-recall", "always"),
        ("x-stockpot-recall", ""),
        ("x-stockpot-max-error", "1.5"),
        ("x-stockpot-max-error", "-0.1"),
        ("x-stockpot-max-error", "nan"),
        ("x-stockpot-max-error", "0_0.1"),
        ("x-stockpot-max-error", "1%"),
        ("x-stockpot-recall-tags", "y" * 129),
        ("x-stockpot-recall-tags", ",".join(f"t{index}" for index in range(17))),
        ("x-stockpot-recall-tags", "tab\there"),
    ],
)
def test_what_says_nothing_is_refused(
    recorded: httpx2.Client, recording: RecordingBackend, name: str, value: str
) -> None:
    asked = len(recording.allowed)
    for path, body in BODIES.items():
        response = recorded.post(path, json=body, headers={name: value})
        assert response.status_code == 400, response.text
        assert f"'{name}'" in response.json()["error"]["message"]
    assert len(recording.allowed) == asked


@given(st.dictionaries(st.sampled_from(["cache-control", "x-stockpot-max-error"]), st.text(max_size=60)))
def test_whatever_is_sent_allows_no_more(headers: dict[str, str]) -> None:
    try:
        allowed = recall_control(headers)
    except RequestError:
        return
    assert allowed.max_age_s is None or 0 <= allowed.max_age_s <= 2**31
    assert allowed.max_error is None or 0 <= allowed.max_error <= 1
    for word, is_off in (("no-cache", not allowed.read), ("no-store", not allowed.store)):
        directives = [each.strip().lower() for each in headers.get("cache-control", "").split(",")]
        assert is_off or word not in directives
