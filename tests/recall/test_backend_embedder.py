"""Answers of backends that are no vectors are errors of the backend, whatever is wrong with them."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from stockpot.errors import UpstreamError
from stockpot.recall.vectors.backend_embedder import BackendEmbedder
from stockpot.requests import EmbeddingRequest, Embeddings


@pytest.mark.parametrize(
    "vectors",
    [
        ["not base64 at all!"],
        [base64.b64encode(b"12345").decode()],
        [[1.0, "x"]],
        [[[1.0], [2.0]]],
        [None],
        [[]],
        [""],
        [[1.0, float("inf")]],
        [[1.0], [1.0]],
    ],
)
async def test_what_is_no_vector_is_told(vectors: Any) -> None:
    async def embed(request: EmbeddingRequest) -> Embeddings:
        return Embeddings("e", vectors, 1)

    with pytest.raises(UpstreamError, match="'e'"):
        await BackendEmbedder("e", embed).embed(["a"])


async def test_great_numbers_are_numbers() -> None:
    async def embed(request: EmbeddingRequest) -> Embeddings:
        return Embeddings("e", [[3e30, 4e30]], 1)

    assert (await BackendEmbedder("e", embed).embed(["a"])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)]
    ]


def test_what_is_long_in_tokens_does_not_fit() -> None:
    async def embed(request: EmbeddingRequest) -> Embeddings:
        raise AssertionError

    embedder = BackendEmbedder("e", embed)
    assert embedder.fits("word " * 1_500)
    assert not embedder.fits("word " * 2_000)
    assert not embedder.fits("漢字" * 1_500)
    assert embedder.fits("\ud800")
