"""What is written down when a request is admitted: how much of its prompt was found, and why not more."""

from __future__ import annotations

from collections.abc import Mapping

from stockpot.engine.sequence import Sequence
from stockpot.events import CacheTier
from stockpot.kv.cache import KVCache
from stockpot.kv.explanation import Divergence, Explanation, Gap, diverged, found_of


def explain_admission(
    cache: KVCache | None, sequence: Sequence, reused: Mapping[CacheTier, int], *, now_s: float
) -> None:
    """Keep the explanation of a request that was admitted now (Unix time) and reused so many tokens by
    tier."""
    task, scope = sequence.task, sequence.task.scope
    if cache is None or scope is None:
        return
    key, tokens = sequence.reusable_key(), sum(reused.values())
    outcomes = tuple(sequence.outcomes)
    divergence: Divergence | None = None
    gaps: tuple[Gap, ...] = ()
    if tokens < sequence.reusable_tokens:
        match = cache.store.match(scope, key)
        node = cache.store.departure(scope, key, match)
        if node is not None:
            # A block used up to the place of departure was used by this very request just now.
            used_s = node.used_before_s if node in match.nodes else node.used_s
            divergence = diverged(key, node.prompt(), request=node.request, used_s=used_s)
        gaps = cache.evidence.gaps(
            scope, key, tokens, block_tokens=cache.limits.block_tokens, outcomes=outcomes
        )
    if sequence.reusable_tokens < sequence.length - 1:
        gaps = (*gaps, Gap(sequence.reusable_tokens, sequence.length - 1, "not marked"))
    cache.explanations.add(
        Explanation(
            request=task.request_id,
            client_request=task.client_request,
            tenant=task.labels.tenant,
            at_s=now_s,
            prompt_tokens=len(task.prompt),
            found=found_of(reused),
            divergence=divergence,
            gaps=gaps,
            tiers=outcomes,
            waited_s=sequence.waited_s,
        )
    )
