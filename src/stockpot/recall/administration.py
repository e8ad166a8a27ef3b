"""What operators see and do of the answers that are kept, and what callers say about those they got."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stockpot.caller import Caller
from stockpot.clock import Clock
from stockpot.recall.admissible import scopes_of_caller
from stockpot.recall.answer import DamagedAnswer, text_of, unpack
from stockpot.recall.entry import Entry, Selector, entry_id
from stockpot.recall.recall import Given, Recall

_EXCERPT_CHARACTERS = 120
_USD = 1e-9


@dataclass(frozen=True, slots=True)
class Feedback:
    """What came of it. `removed`: the entry is given no more; `learnt`: it counts as evidence."""

    entry: str
    removed: bool
    learnt: bool


class RecallAdministration:
    """On the event loop. Figures are JSON-ready and count from the start of the process."""

    def __init__(self, recall: Recall, clock: Clock) -> None:
        self._recall = recall
        self._clock = clock
        self._since = clock.wall()

    async def report(self) -> dict[str, Any]:
        """Hits, errors with their bounds, savings, the worst entries."""
        recall = self._recall
        await recall.store.flush()  # what waits to be written is kept already, to whoever asks
        counts, settings, stored = recall.counts, recall.settings, recall.store.stats()
        found = counts.outcomes
        looked_up = sum(found[outcome] for outcome in ("exact", "semantic", "miss"))
        hits = found["exact"] + found["semantic"]
        return {
            "since": self._since,
            "exact": settings.exact,
            "semantic": await self._semantic_report(),
            "lookups": looked_up,
            "hits": {"exact": found["exact"], "semantic": found["semantic"]},
            "hit_share": hits / looked_up if looked_up else 0.0,
            "would_be_hits": counts.would,
            "misses": found["miss"],
            "bypassed": found["bypass"],
            "reasons": dict(counts.reasons.most_common()),
            "kept": counts.kept,
            "not_kept": dict(counts.not_kept.most_common()),
            "feedback": {"right": counts.feedback_right, "wrong": counts.feedback_wrong},
            "saved": {
                "prompt_tokens": counts.saved_prompt_tokens,
                "completion_tokens": counts.saved_completion_tokens,
                "usd": round(counts.saved_nanousd * _USD, 9),
                "seconds": round(counts.saved_s, 3),
            },
            "store": {
                "entries": stored.entries,
                "size_bytes": stored.size_bytes,
                "capacity_bytes": settings.capacity_bytes,
                "evicted": stored.evicted,
                "expired": stored.expired,
                "lost": stored.lost,
                "reachable": stored.reachable,
            },
        }

    async def _semantic_report(self) -> dict[str, Any] | None:
        recall = self._recall
        semantic, learner, settings = recall.semantic, recall.learner, recall.settings.semantic
        if semantic is None or learner is None:
            return None
        seen = semantic.evidence.report()
        error, lower, upper = seen.audited_error
        learnt = learner.counts
        worst: list[dict[str, Any]] = []
        for each in seen.worst:
            entry = await recall.store.by_id(entry_id(each.entry))
            question = "" if entry is None else _excerpt(entry.question)
            worst.append(
                {"id": entry_id(each.entry), "question": question, "right": each.right, "wrong": each.wrong}
            )
        return {
            "mode": settings.mode,
            "max_error": settings.max_error,
            "confidence": settings.confidence,
            "embedder": semantic.embedder.name,
            "indexed": len(semantic.index),
            "decisions": seen.decisions,
            "observations": seen.observations,
            "given": seen.given,
            "estimated_error": seen.estimated_error,
            "estimated_error_upper": seen.estimated_error_upper,
            "audited": seen.audited,
            "audited_wrong": seen.audited_wrong,
            "audited_error": error,
            "audited_error_lower": lower,
            "audited_error_upper": upper,
            "explored": learnt.explored,
            "undecided": learnt.undecided,
            "not_compared": learnt.failed + learnt.dropped,
            "worst": worst,
        }

    async def entries(self, limit: int, tenant: str | None) -> list[dict[str, Any]]:
        """What can be given, latest first."""
        found: list[dict[str, Any]] = []
        async for entry in self._recall.store.entries(limit=limit if tenant is None else None):
            if tenant is None or entry.tenant == tenant:
                found.append(self._facts(entry))
            if len(found) >= limit:
                break
        return found

    async def entry(self, id: str) -> dict[str, Any] | None:
        """One of them, with its answer."""
        entry = await self._recall.store.by_id(id)
        if entry is None:
            return None
        try:
            text = text_of(unpack(entry.answer))
        except DamagedAnswer as error:
            text = f"({error})"
        return {**self._facts(entry), "question": entry.question, "context": entry.context, "answer": text}

    async def invalidate(self, selector: Selector) -> int:
        """How many will not be given any more. With a writer's entries goes the evidence it caused. Raises
        StockpotError where it could not be done."""
        return len(await self._recall.invalidate(selector))

    async def feedback(
        self, caller: Caller, *, entry: str | None, request_id: str | None, right: bool
    ) -> Feedback | None:
        """What a caller says of an answer it got: by the request, or by the entry. None: there is no such
        answer, or it is not the caller's to judge (which is which is not told).

        A wrong one is taken out, and counts as evidence where it had been given by meaning. Of who is not
        trusted with the tenant's answers (`untrusted_tags`) the word about those is counted, and no more.
        """
        recall = self._recall
        given = None if request_id is None else recall.given(request_id)
        if request_id is not None:
            entry = None if given is None else entry_id(given.key)
        found = None if entry is None else await recall.store.by_id(entry)
        scopes = scopes_of_caller(caller, recall.settings)
        if found is None or found.scope not in scopes.read:
            return None
        if given is not None and found.created_at != given.created_at:
            return None  # made anew since: of that one nothing was said
        recall.counts.feedback_right += right
        recall.counts.feedback_wrong += not right
        if found.scope != scopes.write:
            return Feedback(found.id, removed=False, learnt=False)
        learnt = self._learn(caller, given, right=right)
        if not right:
            await recall.invalidate(Selector(id=found.id, tenant=found.tenant))
        return Feedback(found.id, removed=not right, learnt=learnt)

    def _learn(self, caller: Caller, given: Given | None, *, right: bool) -> bool:
        learner = self._recall.learner
        if learner is None or given is None or given.look_up is None:
            return False
        hit, asked = given.look_up.hit, given.look_up.asked
        if hit is None or asked is None:
            return False
        learner.learn(hit, asked.question.text, "feedback", caller.key_id, same=right)
        return True

    def _facts(self, entry: Entry) -> dict[str, Any]:
        now = self._clock.wall()
        return {
            "id": entry.id,
            "tenant": entry.tenant,
            "writer": entry.writer,
            "own_scope": entry.scope != entry.tenant,
            "model": entry.model,
            "age_s": round(max(now - entry.created_at, 0.0), 3),
            "expires_in_s": round(entry.expires_at - now, 3),
            "size_bytes": entry.size_bytes,
            "prompt_tokens": entry.prompt_tokens,
            "completion_tokens": entry.completion_tokens,
            "cost_usd": round(entry.cost_nanousd * _USD, 9),
            "tags": sorted(entry.tags),
            "by_meaning": bool(entry.partition),
            "question": _excerpt(entry.question),
        }


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARACTERS else f"{text[: _EXCERPT_CHARACTERS - 1]}…"
