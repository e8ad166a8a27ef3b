"""Vectors from a model of a backend, by the gateway's own way to it."""

from __future__ import annotations

import asyncio
import base64
import uuid
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from stockpot.errors import StockpotError, UpstreamError
from stockpot.recall.vectors.embedder import Embedder, Vectors
from stockpot.requests import NO_RECALL, EmbeddingRequest, Embeddings, Generation

_TIMEOUT_S = 5.0
_BYTES_MAX = 8_000
"""Some four to a token, in UTF-8: of models that take 2,048 tokens and more."""


class BackendEmbedder(Embedder):
    """`embed` asks on nobody's allowance."""

    def __init__(
        self,
        model: str,
        embed: Callable[[EmbeddingRequest], Awaitable[Embeddings]],
        version: Callable[[str], str] = str,
    ) -> None:
        """`version` tells one version of the model from the next."""
        self._model = model
        self._embed = embed
        self._version = version
        self._dimensions: int | None = None

    @property
    def name(self) -> str:
        return f"model:{self._model}@{self._version(self._model)}"

    @property
    def dimensions(self) -> int | None:
        return self._dimensions

    def fits(self, text: str) -> bool:
        return len(text) <= _BYTES_MAX and len(text.encode("utf-8", "replace")) <= _BYTES_MAX

    async def embed(self, texts: Sequence[str]) -> Vectors:
        generation = Generation(
            self._model,
            f"recall-{uuid.uuid4().hex}",
            deadline_s=_TIMEOUT_S,
            task="recall-embedding",
            recall=NO_RECALL,
        )
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                answer = await self._embed(EmbeddingRequest(generation, list(texts)))
        except TimeoutError as error:
            raise self._wrong(f"gave no vectors within {_TIMEOUT_S:g} s", "timeout") from error
        try:
            rows = [_row(vector) for vector in answer.vectors]
        except (ValueError, TypeError) as error:
            raise self._wrong(f"gave what is no vector ({error})") from error
        if len(rows) != len(texts) or len({len(row) for row in rows}) != 1:
            raise self._wrong(f"gave {len(rows)} vectors for {len(texts)} texts, or of several lengths")
        matrix = np.stack(rows)
        norms = np.linalg.norm(matrix, axis=1, keepdims=True)
        if not np.isfinite(norms).all() or not norms.all():
            raise self._wrong("gave a vector of zeros, or numbers that are none")
        if self._dimensions not in (None, matrix.shape[1]):
            raise self._wrong(f"gave {matrix.shape[1]} dimensions, {self._dimensions} before")
        self._dimensions = matrix.shape[1]
        return (matrix / norms).astype(np.float32)

    def _wrong(self, what: str, cause: str = "format") -> StockpotError:
        message = f"The embedding model {self._model!r} {what}; look at its backend."
        return UpstreamError(
            message, cause="timeout" if cause == "timeout" else "format", backend=self._model
        )


def _row(vector: Sequence[float] | str) -> NDArray[np.float64]:
    """Numbers, or base64 of little-endian float32. Raises ValueError, TypeError."""
    if isinstance(vector, str):
        return np.frombuffer(base64.b64decode(vector, validate=True), dtype="<f4").astype(np.float64)
    row = np.asarray(vector, dtype=np.float64)
    if row.ndim != 1:
        raise ValueError(f"{row.ndim} dimensions deep")
    return row
