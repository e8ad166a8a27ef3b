"""Puts recall together as the settings say."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from stockpot.clock import Clock
from stockpot.recall.evidence.evidence import Evidence
from stockpot.recall.learning import Ask, Learner, Regenerate
from stockpot.recall.recall import Recall
from stockpot.recall.semantic import Semantic
from stockpot.recall.stores.open_store import open_store
from stockpot.recall.vectors.embedder import Embedder
from stockpot.recall.vectors.index import VectorIndex
from stockpot.records import Attempt
from stockpot.requests import EmbeddingRequest, Embeddings
from stockpot.settings import Settings
from stockpot.settings_recall import SemanticSettings

Embed = Callable[[EmbeddingRequest], Awaitable[Embeddings]]


def open_recall(
    settings: Settings,
    clock: Clock,
    *,
    version: Callable[[str], str],
    price: Callable[[Sequence[Attempt]], int],
    ask: Ask,
    regenerate: Regenerate,
    embed: Embed,
) -> Recall:
    """Its parts, not started yet. `embed` asks a model of a backend for vectors; for the others see `Recall`
    and `Learner`. Raises ConfigurationError."""
    recall = settings.recall
    store = open_store(recall, settings.data_dir / "recall", clock)
    if recall.semantic.mode == "off":
        return Recall(recall, store, clock, version=version, price=price)
    embedder = open_embedder(recall.semantic, embed, version)
    evidence = Evidence(recall.semantic)
    semantic = Semantic(
        recall.semantic,
        store=store,
        embedder=embedder,
        index=open_index(recall.semantic),
        evidence=evidence,
        clock=clock,
    )
    learner = Learner(recall.semantic, store, embedder, evidence, clock, ask=ask, regenerate=regenerate)
    return Recall(recall, store, clock, version=version, price=price, semantic=semantic, learner=learner)


def open_embedder(settings: SemanticSettings, embed: Embed, version: Callable[[str], str]) -> Embedder:
    """Not started yet."""
    if settings.embedding_model is not None:
        from stockpot.recall.vectors.backend_embedder import BackendEmbedder

        return BackendEmbedder(settings.embedding_model, embed, version)
    from stockpot.recall.vectors.minilm import MiniLm

    return MiniLm()


def open_index(settings: SemanticSettings) -> VectorIndex:
    """Not started yet. Raises ConfigurationError."""
    if settings.index_url is not None:
        from stockpot.recall.vectors.pgvector_index import PgvectorIndex

        return PgvectorIndex(settings.index_url.get_secret_value())
    from stockpot.recall.vectors.memory_index import MemoryIndex

    return MemoryIndex()
