"""Settings of recall: answers kept, and given again to the same question."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stockpot.settings_types import ModelName, Secret, Section

Refusable = Literal["time", "personal", "creative"]
"""Questions whose answer does not carry over to another asking: it depends on when, or on who asks, or a new
one is wanted each time."""


class SemanticSettings(Section):
    """Answers to questions that mean the same. `max_error` is the share of wrong answers the operator accepts
    among those given from the cache; an entry answers only while the evidence keeps the upper bound of its
    error below that."""

    mode: Literal["off", "shadow", "on"] = Field(
        default="off", description="shadow: decides, learns and reports, and gives nothing"
    )
    max_error: float = Field(
        default=0.01, gt=0, le=0.5, description="wrong answers among those given from the cache, at most"
    )
    error_of: Literal["given", "requests"] = Field(
        default="given",
        description="of what the share max_error counts: wrong answers among those given from the cache, or"
        " among all requests looked up (vCache's definition), which is laxer",
    )
    confidence: float = Field(
        default=0.95, gt=0.5, lt=1, description="with which the bound on the error holds"
    )
    audit_share: float = Field(
        default=0.05, ge=0, le=1, description="of the answers given, generated again to see if they agree"
    )
    embedding_model: ModelName | None = Field(
        default=None, description="a model of a backend that gives embeddings; None: the built-in MiniLM"
    )
    conversations: Literal["exact", "embedded"] = Field(
        default="exact",
        description="what precedes the last message must be the same, or (embedded) mean the same",
    )
    judge: ModelName | None = Field(
        default=None, description="a model that says whether two answers agree; None: their texts decide"
    )
    verifier: str | None = Field(
        default=None,
        description="module:function of two questions, a probability that they have one answer; it has the"
        " last word",
    )
    verifier_threshold: float = Field(default=0.9, gt=0, le=1)
    allow: tuple[Refusable, ...] = Field(
        default=(), description="kinds of questions that are refused otherwise"
    )
    candidates: int = Field(default=8, ge=1, le=100, description="nearest questions looked at")
    index_url: Secret | None = Field(
        default=None, description="postgresql:// with pgvector, shared by all nodes; None: in this process"
    )


class RecallSettings(Section):
    """Answers are kept with what they answer, readable by whoever can read the store: nothing is kept unless
    one of `exact` and `semantic.mode` says so."""

    exact: bool = Field(default=False, description="the same request gets the answer it got before")
    semantic: SemanticSettings = SemanticSettings()
    store: Secret | None = Field(
        default=None, description="redis:// shared by all nodes; None: SQLite in data_dir"
    )
    capacity_bytes: int = Field(
        default=2**30, ge=2**16, description="of answers kept; least recently used ones leave"
    )
    memory_bytes: int = Field(default=64 * 2**20, ge=0, description="of them, also kept in memory")
    answer_bytes_max: int = Field(default=2**20, ge=1024, description="longer answers are not kept")
    ttl_s: float = Field(default=86_400.0, gt=0, description="how long an answer is given")
    sampled: bool = Field(
        default=False, description="also answers that were drawn at random (a temperature, and no seed)"
    )
    scope: Literal["tenant", "key"] = Field(default="tenant", description="who shares answers")
    untrusted_tags: tuple[str, ...] = Field(
        default=(), description="what callers with one of these tags cause to be kept, they alone get"
    )
    models: tuple[ModelName, ...] | None = Field(default=None, description="None: all")
    versions: dict[ModelName, str] = Field(
        default_factory=dict[ModelName, str],
        description="of models on other servers, by their name here: a new one starts afresh",
    )

    @model_validator(mode="after")
    def _store_is_known(self) -> RecallSettings:
        if self.store is not None and not self.store.get_secret_value().startswith(
            ("redis://", "rediss://", "unix://")
        ):
            raise ValueError("store: give redis://, rediss:// or unix://, or leave it out for SQLite")
        url = self.semantic.index_url
        if url is not None and not url.get_secret_value().startswith(
            ("postgresql://", "postgresql+psycopg://")
        ):
            raise ValueError("semantic.index_url: give postgresql://, or leave it out for an index in memory")
        return self

    @property
    def enabled(self) -> bool:
        """Whether anything is kept."""
        return self.exact or self.semantic.mode != "off"
