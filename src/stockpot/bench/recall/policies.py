"""A stream of labelled questions under a policy: ours, a static cosine threshold, vCache's.

A question is answered by the nearest kept one, or generated; the answer of a kept question is right where
the labels agree.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import blake3

from stockpot.bench.recall.labelled import Kept, LabelledTexts
from stockpot.bench.recall.tally import Tally
from stockpot.bench.recall.vcache import VCachePolicy
from stockpot.recall.evidence.evidence import Evidence, Observation
from stockpot.recall.questions.question import Likeness, Question, compare, read_question
from stockpot.recall.questions.refusals import refusal_of
from stockpot.settings_recall import SemanticSettings

SCOPE = "bench"
"""Of all that is asked and learnt here."""
_COMPARED_MAX = 600_000
_ALIKE_TRIED = 3
"""Other entries near whose answers are compared with the new one, as `recall.learning` does."""
_RUNNING_FROM = 200
"""Answers given before the running error says anything."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a stream. `running_error` is the largest share of wrong answers among those given at any
    time after the first 200. `hits`: which questions were answered, in order (question, kept one)."""

    tally: Tally
    running_error: float
    refused: int = 0
    hits: tuple[tuple[int, int], ...] = ()


class _Account:
    def __init__(self, data: LabelledTexts) -> None:
        self._labels = data.labels
        self._asked = self._given = self._wrong = 0
        self._running_error = 0.0
        self._hits: list[tuple[int, int]] = []

    def same(self, number: int, kept: int) -> bool:
        return bool(self._labels[number] == self._labels[kept])

    def took(self, number: int, kept: int | None) -> None:
        """A question was asked, and answered by `kept`, or generated."""
        self._asked += 1
        if kept is None:
            return
        self._hits.append((number, kept))
        self._given += 1
        self._wrong += not self.same(number, kept)
        if self._given >= _RUNNING_FROM:
            self._running_error = max(self._running_error, self._wrong / self._given)

    def outcome(self, refused: int = 0) -> Outcome:
        tally = Tally(self._asked, self._given, self._wrong)
        return Outcome(tally, self._running_error, refused, tuple(self._hits))


class Reader:
    """Questions read and compared as the server does it, each once: a stream is played many times."""

    def __init__(self, data: LabelledTexts) -> None:
        self._questions = [read_question(text) for text in data.texts]
        self.refusals = [refusal_of(question) for question in self._questions]
        self.digests = [digest_of(text) for text in data.texts]
        self._compared: dict[int, Likeness] = {}

    def question(self, number: int) -> Question:
        return self._questions[number]

    def compare(self, asked: int, kept: int, similarity: float) -> Likeness:
        """What `question.compare` says. `similarity` belongs to the two."""
        pair = asked * len(self._questions) + kept
        likeness = self._compared.get(pair)
        if likeness is None:
            likeness = compare(self._questions[asked], self._questions[kept], similarity)
            if len(self._compared) < _COMPARED_MAX:
                self._compared[pair] = likeness
        return likeness


def digest_of(question: str) -> bytes:
    """As evidence knows a question."""
    return blake3.blake3(question.encode("utf-8", "surrogatepass")).digest(8)


def key_of(number: int) -> bytes:
    """An entry's key. Its first half is what an entry is known by outside."""
    return number.to_bytes(16, "big").ljust(32, b"\0")


def number_of(key: bytes) -> int:
    """The text whose entry has that key."""
    return int.from_bytes(key[:16], "big")


def ours(
    data: LabelledTexts, order: Sequence[int], settings: SemanticSettings, reader: Reader, seed: int
) -> Outcome:
    """The decision of `recall.semantic` on what `question.compare` and `evidence.Evidence` say, and what
    `recall.learning` learns from it; `semantic_run.through_semantic` is the same by the server's classes."""
    evidence = Evidence(settings)
    audits = random.Random(seed)
    kept, account = Kept(data), _Account(data)
    refused = 0
    for number in order:
        if reader.refusals[number] not in ("", *settings.allow):
            refused += 1
            account.took(number, None)
            continue
        near = kept.nearest(number, settings.candidates)
        likenesses = [reader.compare(number, candidate, cosine) for candidate, cosine in near]
        keys = [key_of(candidate) for candidate, _ in near]
        judgements = evidence.judge_all(SCOPE, list(zip(keys, likenesses, strict=True)))
        chosen = next((place for place, each in enumerate(judgements) if each.serve), None)
        is_hit = chosen is not None
        if chosen is not None:
            evidence.served(SCOPE, judgements[chosen])
            account.took(number, near[chosen][0])
        else:
            chosen = next((place for place, each in enumerate(likenesses) if not each.conflict), None)
            account.took(number, None)
            kept.add(number)
        if chosen is None or (is_hit and audits.random() >= settings.audit_share):
            continue
        same = account.same(number, near[chosen][0])
        others = [place for place in range(len(near)) if place != chosen][:_ALIKE_TRIED]
        alike = next(
            (keys[n] for n in others if not likenesses[n].conflict and account.same(number, near[n][0])), b""
        )
        evidence.learn(
            Observation(
                at=0.0,
                scope=SCOPE,
                entry=keys[chosen],
                question=reader.digests[number],
                likeness=likenesses[chosen],
                same=same,
                source="audited" if is_hit else "explored",
                support=judgements[chosen].support,
                made=b"" if is_hit else key_of(number),
                alike=b"" if is_hit or same else alike,
                stands_for=1 / settings.audit_share if is_hit else 1.0,
            )
        )
        evidence.refit_at_once_if_due(SCOPE)
    return account.outcome(refused)


def static(data: LabelledTexts, order: Sequence[int], threshold: float) -> Outcome:
    """The nearest kept question answers where its cosine is at least `threshold`."""
    kept, account = Kept(data), _Account(data)
    for number in order:
        nearest = kept.nearest(number, 1)
        hit = bool(nearest) and nearest[0][1] >= threshold
        account.took(number, nearest[0][0] if hit else None)
        if not hit:
            kept.add(number)
    return account.outcome()


def vcache(data: LabelledTexts, order: Sequence[int], delta: float, seed: int) -> Outcome:
    """vCache's policy and what it keeps (see `vcache`)."""
    policy = VCachePolicy(delta, seed)
    kept, account = Kept(data), _Account(data)
    for number in order:
        nearest = kept.nearest(number, 1)
        if not nearest:
            account.took(number, None)
            kept.add(number)
            continue
        entry, similarity = nearest[0]
        if policy.serves(entry, similarity):
            account.took(number, entry)
            continue
        account.took(number, None)
        same = account.same(number, entry)
        policy.learn(entry, similarity, same=same)
        if not same:
            kept.add(number)
    return account.outcome()


def without_hits(outcome: Outcome) -> Outcome:
    """Its figures alone."""
    return replace(outcome, hits=())
