"""Puts recall into a server: versions of models, what attempts cost, whom to ask, its metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from stockpot.clock import Clock
from stockpot.gateway.gateway import Gateway
from stockpot.records import Attempt
from stockpot.routing.member import Member
from stockpot.settings import Settings
from stockpot.telemetry.recall_metrics import Audited, RecallFigures, RecallMetrics

if TYPE_CHECKING:
    from stockpot.recall.recall import Recall

_VERSION_DETAILS = ("fingerprint", "encoding", "binding", "library", "kv_cell_type")


def open_recall_of(
    settings: Settings,
    gateway: Callable[[], Gateway],
    current: Callable[[], Settings],
    clock: Clock,
    *,
    ask: Callable[[Gateway, str, str, str], Awaitable[str]],
) -> Recall | None:
    """Not started yet; None where nothing is kept. `gateway` and `current` (the settings in force) are there
    by the time it is used. Raises ConfigurationError."""
    if not settings.recall.enabled:
        return None
    # Imported where it is wanted: the embedder and its libraries take a while.
    from stockpot.recall.open_recall import open_recall

    def price(attempts: Sequence[Attempt]) -> int:
        pricing = gateway().course.pricing
        return sum(pricing.cost(attempt).nanousd for attempt in attempts)

    return open_recall(
        settings,
        clock,
        version=lambda model: version_of(gateway().course.members, current(), model),
        price=price,
        ask=lambda model, instruction, text: ask(gateway(), model, instruction, text),
        regenerate=lambda request: gateway().unguarded(request),
        embed=lambda request: gateway().embed(request),
    )


def version_of(members: Sequence[Member], settings: Settings, model: str) -> str:
    """What tells one version of a model from the next: of our own engine the weights and how they are run, of
    others what the operator says."""
    parts: set[str] = set()
    for member in members:
        if not member.serves(model):
            continue
        if member.settings is None:
            cards = (card for card in member.backend.models() if card.id == model)
            parts.update("/".join(str(card.details.get(name)) for name in _VERSION_DETAILS) for card in cards)
        else:
            parts.add(settings.recall.versions.get(model, ""))
    return ";".join(sorted(parts))


def recall_metrics_of(recall: Recall) -> RecallMetrics:
    """An observer of requests, and families for /metrics."""
    semantic, learner = recall.semantic, recall.learner
    audited: Callable[[], Audited] | None = None
    if semantic is not None and learner is not None:

        def seen() -> Audited:
            report = semantic.evidence.report()
            error = report.estimated_error if report.given else None
            upper = report.estimated_error_upper if report.given else None
            return Audited(learner.counts.audited, learner.counts.audited_wrong, error, upper)

        audited = seen
    figures = RecallFigures(
        stored=recall.store.stats,
        capacity_bytes=lambda: recall.settings.capacity_bytes,
        unkept=lambda: dict(recall.counts.not_kept),
        audited=audited,
    )
    return RecallMetrics(figures)
