"""/v1/embeddings: what the backend is asked, what comes back, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from stockpot.backends.fake import FakeBackend
from stockpot.errors import UnknownModel
from stockpot.requests import EmbeddingRequest, Embeddings

Serve = Callable[..., AbstractContextManager[httpx2.Client]]

PATH = "/v1/embeddings"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": ["a", ""]}, "input"),
    ({"input": ["a", [1]]}, "input"),
    ({"input": [1, "a"]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": [True]}, "input"),
    ({"input": {"text": "a"}}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": None}, "input"),
    ({"encoding_format": "int8"}, "encoding_format"),
    ({"dimensions": 0}, "dimensions"),
    ({"timeout": 3600}, "timeout"),
    ({"model": ""}, "model"),
]


class EmbeddingBackend(FakeBackend):
    """The vector of an input is its length, its first and its last byte (or token), halved. `gives` is how it
    gives vectors, whatever it was asked for; None: as asked."""

    def __init__(self, gives: str | None = None) -> None:
        super().__init__()
        self.gives = gives
        self.asked: list[EmbeddingRequest] = []

    async def embed(self, request: EmbeddingRequest) -> Embeddings:
        self.asked.append(request)
        if request.generation.model != "fake":
            raise UnknownModel("Only 'fake' is served here.", param="model")
        inputs = [each.encode() if isinstance(each, str) else each for each in request.inputs]
        vectors = [[len(each) / 2, each[0] / 2, each[-1] / 2][: request.dimensions] for each in inputs]
        tokens = sum(map(len, inputs))
        if (self.gives or request.encoding_format) == "float":
            return Embeddings("fake", vectors, tokens)
        packed = [base64.b64encode(np.array(vector, "<f4").tobytes()).decode() for vector in vectors]
        return Embeddings("fake", packed, tokens)


@pytest.fixture(scope="module", params=[None, "float", "base64"])
def embedder(request: pytest.FixtureRequest) -> EmbeddingBackend:
    return EmbeddingBackend(request.param)


@pytest.fixture(scope="module")
def embedding(serve: Serve, embedder: EmbeddingBackend) -> Generator[httpx2.Client, None, None]:
    with serve(embedder) as client:
        yield client


@pytest.mark.parametrize(
    ("given", "vectors"),
    [
        ("ab", [[1.0, 48.5, 49.0]]),
        (["ab", "a"], [[1.0, 48.5, 49.0], [0.5, 48.5, 48.5]]),
        ([4, 5, 6], [[1.5, 2.0, 3.0]]),
        ([[4, 5, 6], [7]], [[1.5, 2.0, 3.0], [0.5, 3.5, 3.5]]),
    ],
)
def test_the_official_client(embedding: httpx2.Client, given: Any, vectors: list[list[float]]) -> None:
    """It asks for base64 where it is not told otherwise."""
    with openai.OpenAI(base_url=f"{embedding.base_url}/v1", api_key="unused", max_retries=0) as official:
        for answer in (
            official.embeddings.create(model="fake", input=given),
            official.embeddings.create(model="fake", input=given, encoding_format="float"),
        ):
            assert [entry.embedding for entry in answer.data] == vectors
            assert [entry.index for entry in answer.data] == list(range(len(vectors)))
            assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0


def test_the_body(embedding: httpx2.Client, embedder: EmbeddingBackend) -> None:
    body = {"model": "fake", "input": "ab", "dimensions": 2, "user": "u1", "input_type": "query"}
    answer = embedding.post(PATH, json=body, headers={"x-stockpot-task": "t-1"}).json()
    assert answer == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [1.0, 48.5]}],
        "model": "fake",
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
    asked = embedder.asked[-1]
    assert (asked.encoding_format, asked.dimensions) == ("float", 2)
    generation = asked.generation
    assert (generation.user, generation.session, generation.task) == ("u1", "u1", "t-1")
    # What is not read here is for the backend to know or to refuse.
    assert generation.extras == {"user": "u1", "input_type": "query"}


@pytest.mark.parametrize(
    ("fields", "param"),
    REFUSED,
)
def test_refusals(embedding: httpx2.Client, fields: dict[str, Any], param: str) -> None:
    response = embedding.post(PATH, json={"model": "fake", "input": "a", **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_an_unknown_model(embedding: httpx2.Client) -> None:
    response = embedding.post(PATH, json={"model": "other", "input": "a"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_backend_without_embeddings(client: httpx2.Client) -> None:
    response = client.post(PATH, json={"model": "fake", "input": "a"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


def test_a_client_that_goes_away_ends_its_request(serve: Serve) -> None:
    class Waiting(FakeBackend):
        """Never answers; `ended` is set when it need not."""

        def __init__(self) -> None:
            super().__init__()
            self.ended = threading.Event()

        async def embed(self, request: EmbeddingRequest) -> Embeddings:
            try:
                await asyncio.Event().wait()
            finally:
                self.ended.set()
            raise AssertionError

    backend = Waiting()
    with serve(backend) as client:
        with pytest.raises(httpx2.ReadTimeout):
            client.post(PATH, json={"model": "fake", "input": "a"}, timeout=0.2)
        assert backend.ended.wait(timeout=20)
