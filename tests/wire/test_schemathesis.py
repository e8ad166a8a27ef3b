"""The server does what its OpenAPI document says: requests made from the document, right and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from stockpot.backends.cache_admin import CacheAdmin, Figures, InvalidationOrder, PrefixSelector
from stockpot.backends.fake import FakeBackend, FakeBehaviour
from stockpot.requests import ChatRequest, EmbeddingRequest, Embeddings
from stockpot.wire.openapi import build_document

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

EXAMPLES = 8
CONFIGURATION: dict[str, Any] = {
    # Thousands of requests; the fuzzing finds the same here.
    "phases": {"coverage": {"enabled": False}},
    "checks": {
        # 501 and 503 are documented, and say what is switched off; see the test for the others.
        "not_a_server_error": {"enabled": False},
        # A schema cannot say all that makes a request a good one: which models there are, what excludes what.
        "positive_data_acceptance": {"enabled": False},
    },
}


class PlainAdmin(CacheAdmin):
    """An empty cache, of which everything can be asked."""

    async def entries(self, *, limit: int, tenant: str | None) -> Sequence[Figures]:
        return ()

    async def explain(self, request_id: str) -> Figures | None:
        return None

    async def recent(self, count: int) -> Sequence[Figures]:
        return ()

    async def pin(self, prefix: PrefixSelector, *, owner: str, for_s: float) -> Figures:
        return {"pin": "p1", "tokens": 0, "expires_s": for_s}

    async def unpin(self, pin: str) -> bool:
        return pin == "p1"

    async def pins(self) -> Sequence[Figures]:
        return ()

    async def invalidate(self, order: InvalidationOrder) -> Figures:
        return {"epoch": 1, "pending": False, "blocks": 0}

    async def warm(self, prompt: ChatRequest | str, *, model: str, tenant: str) -> Figures:
        return {"prompt_tokens": 1, "cached_tokens": 0, "seconds": 0.0}

    async def verify(self) -> Figures:
        return {"checked": 0, "sound": 0, "refused": {}, "seconds": 0.0}

    async def export(self, folder: str) -> Figures:
        return {"blocks": 0, "bytes": 0, "folder": folder}


class WholeBackend(FakeBackend):
    """Takes everything, and has what a fake otherwise has not: vectors, and a cache to administer."""

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        self._known(request.generation.model)
        return Embeddings("fake", [[0.5, 1.0]] * len(request.inputs), len(request.inputs))

    def cache_admin(self) -> CacheAdmin:
        return PlainAdmin()


@pytest.fixture(scope="module")
def base_url(serve: Serve) -> Generator[str, None, None]:
    with serve(WholeBackend(FakeBehaviour(accepts_all=True))) as client:
        yield str(client.base_url)


# `Any`: the library's own types are not whole.
library: Any = schemathesis
schema = library.openapi.from_dict(build_document(), config=library.Config.from_dict(CONFIGURATION))


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
def test_the_server_does_as_documented(case: Any, base_url: str) -> None:
    # Any name is a name; that of the model served here leads further than a 404.
    given: object = case.body
    if isinstance(given, dict):
        body = cast(dict[str, Any], given)
        model: Any = body.get("model")
        if isinstance(model, str) and 0 < len(model) <= 512:
            body["model"] = "fake"
    response = case.call(base_url=base_url)
    assert response.status_code < 500 or response.status_code in (501, 503), response.text
    case.validate_response(response)
