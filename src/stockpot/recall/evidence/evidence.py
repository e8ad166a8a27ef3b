"""When a kept answer may be given to a like question: decided from evidence, with a bound on the error.

The idea is vCache's (Schroeder et al., arXiv 2502.03771): answer only while the upper bound of the error
stays below what the operator accepts, else generate, compare and learn. There each entry learns alone. Here
a scope's entries share what they learn (`calibration.Calibration`), an entry's own record counts on top, and
what has been learnt of which answers are the same lets the neighbourhood of a question vote
(`support.Support`).

The claim: of the answers given by meaning in a scope at most the share `max_error` is wrong (or, with
`error_of` "requests", of all requests looked up at most that share is answered wrongly), with `confidence`,
counted over `calibration.HORIZON` requests. It is a claim on the mean; a single answer's own estimated error
is at most `_OWN_ERROR_MAX` times that. It assumes what the calibration does: what is asked next is like what
was seen of late. So what passed the bound is confirmed first: the next that could be given are made anew,
until enough were right in a row (`budget.Budget.is_confirmed`). Where the assumption breaks later - another
kind of question, answers that changed, somebody who plants traps - an audit shows it once about 1 /
`audit_share` wrong answers were given; then the budget has what comes next checked instead of given. Without
audits nothing can show it.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stockpot.recall.evidence.bounds import clopper_pearson, count_upper, gamma_upper
from stockpot.recall.evidence.budget import Budget
from stockpot.recall.evidence.calibration import HORIZON, Calibration, CurvePoint, Terms
from stockpot.recall.evidence.fitting import fit
from stockpot.recall.evidence.support import Standing, Support, features_of, support_of
from stockpot.recall.questions.question import Likeness
from stockpot.settings_recall import SemanticSettings

Source = Literal["explored", "audited", "feedback"]
"""Where a piece of evidence comes from: an answer that was generated though a candidate was there, one that
was generated again after the candidate had been given, what somebody said about an answer given."""

_OBSERVATIONS_MAX = 100_000
_OF_A_SCOPE_MAX = 16_384
_SCOPES_MAX = 4_096
_STANDINGS_MAX = 200_000
"""Entries with a record; about 200 bytes each. The least recently looked at start afresh."""
_OWN_ERROR_MAX = 4.0
_RETIRED_AT = 2
_RIGHT_MAX = 20.0
"""What an entry can earn: no number of right answers makes up for a wrong one entirely."""
_ENTRY_PRIOR = 10.0
"""Right answers an entry that was wrong once is taken to have given unseen."""
_FORM_PRIOR = 300.0
"""Questions in other words that mean the same, none of them wrong, which "equal in form" is taken to be
worth."""
_WORST_SHOWN = 10
_ALONE = Support()


@dataclass(frozen=True, slots=True)
class Observation:
    """Whether `entry`'s answer was right for another question (`question`: its digest, 8 bytes; the same pair
    counts once). `scope` is whose evidence it is: nobody learns from another tenant. `writer` caused it; one
    writer's weight is bounded. `support` is that of the judgement, and `made` the key of the entry that keeps
    the answer it was compared with, if one does: where they are the same, both entries answer the same. Where
    they are not, `alike` may name another entry near whose answer agrees with it. `stands_for` is of how
    many such requests it is the only one observed: 1 / `audit_share` where that share is audited."""

    at: float
    scope: str
    entry: bytes
    question: bytes
    likeness: Likeness
    same: bool
    source: Source
    writer: str = ""
    support: Support = _ALONE
    made: bytes = b""
    alike: bytes = b""
    stands_for: float = 1.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """`serve`: the answer may be given. `error` is its estimated probability of being wrong, `error_upper`
    the upper bound that was compared with what is accepted; `reason` a word for programs and reports: why it
    may (equal_form, evidence), or why not (conflict, retired, no_evidence, error, own_error,
    budget, checking). `support` belongs into the observation that comes of it."""

    serve: bool
    error: float
    error_upper: float
    reason: str
    support: Support = _ALONE


@dataclass(frozen=True, slots=True)
class WorstEntry:
    """An entry's record."""

    entry: bytes
    right: int
    wrong: int


@dataclass(frozen=True, slots=True)
class EvidenceReport:
    """`decisions` by the reason of the first candidate that may answer, else of the nearest. `given` and
    `estimated_error` are of what was given of late; `audited_error` is the share of wrong ones with its
    Clopper-Pearson bounds at the confidence of the settings."""

    decisions: dict[str, int]
    observations: int
    given: int
    estimated_error: float
    estimated_error_upper: float
    audited: int
    audited_wrong: int
    audited_error: tuple[float, float, float]
    worst: tuple[WorstEntry, ...]
    curve: tuple[CurvePoint, ...]


class _Scope:
    """What is known to one scope."""

    def __init__(self, terms: Terms) -> None:
        self.calibration = Calibration(_OF_A_SCOPE_MAX, terms)
        self.budget = Budget()
        self.decisions: Counter[str] = Counter()
        self.given = 0
        self.charged = 0.0
        self.audited = 0
        self.audited_wrong = 0
        self.form_seen = 0
        self.form_wrong = 0


class Evidence:
    """Of one process, all scopes kept apart, in memory: `rebuild` has it from what the store kept. On one
    thread; nothing here waits. A judgement takes some ten microseconds a candidate."""

    def __init__(self, settings: SemanticSettings) -> None:
        self._settings = settings
        self._terms = _terms_of(settings)
        self._scopes: OrderedDict[str, _Scope] = OrderedDict()
        self._observations = 0
        self._standings: OrderedDict[bytes, Standing] = OrderedDict()

    def take(self, settings: SemanticSettings) -> None:
        """From now on by these."""
        self._settings, self._terms = settings, _terms_of(settings)

    def judge(
        self, scope: str, key: bytes, likeness: Likeness, *, max_error: float | None = None
    ) -> Judgement:
        """A candidate alone: with nothing around it that could vote."""
        return self.judge_all(scope, [(key, likeness)], max_error=max_error)[0]

    def judge_all(
        self,
        scope: str,
        candidates: Sequence[tuple[bytes, Likeness]],
        *,
        max_error: float | None = None,
    ) -> list[Judgement]:
        """Each of the candidates for one question, the nearest first; a request without any is to be told
        too. `max_error` can only be stricter than what the operator accepts."""
        accepted = self._settings.max_error if max_error is None else min(max_error, self._settings.max_error)
        known = self._scope(scope)
        # One that conflicts asks something else: whatever its answer is, it says nothing about the others'.
        voting = [(key, likeness) for key, likeness in candidates if not likeness.conflict]
        groups = [self._group(key) for key, _ in voting]
        likenesses = [likeness for _, likeness in voting]
        known.budget.looked_up(
            comparable=bool(voting), equal_form=any(each.equal_form for each in likenesses)
        )
        known.calibration.take(self._terms)
        judged: list[Judgement] = []
        vote = 0
        for key, likeness in candidates:
            if likeness.conflict:
                judged.append(Judgement(False, 1.0, 1.0, "conflict"))
                continue
            support = support_of(vote, groups, likenesses)
            vote += 1
            judged.append(self._judged(known, key, likeness, support, accepted))
        if judged:
            shown = next((each for each in judged if each.serve), judged[0])
            known.decisions[shown.reason] += 1
            if any(each.serve or each.reason in ("budget", "checking") for each in judged):
                known.budget.found_eligible()
            if any(each.reason == "checking" for each in judged):
                known.budget.check()
        return judged

    def served(self, scope: str, judgement: Judgement) -> None:
        """That answer was given."""
        known = self._scope(scope)
        known.budget.give(judgement.error)
        known.given += 1
        known.charged += judgement.error

    def learn(self, observation: Observation) -> None:
        """Takes a piece of evidence in; `refit_if_due` has what follows from it for others. A pair that was
        seen counts once: only that it is wrong after all is news."""
        self._take_in(self._scope(observation.scope), observation)

    async def refit_if_due(self, scope: str) -> None:
        """Where enough was learnt since the last time. It is computed in a thread: what else runs waits for
        the copying only, a fraction of a millisecond."""
        known = self._scopes.get(scope)
        if known is not None and known.calibration.refit_is_due:
            fitted = await asyncio.to_thread(fit, known.calibration.sample())
            known.calibration.install(fitted, known.budget.comparable_share)

    def refit_at_once_if_due(self, scope: str) -> None:
        """The same here and now, for who serves nobody meanwhile."""
        known = self._scopes.get(scope)
        if known is not None and known.calibration.refit_is_due:
            known.calibration.refit(known.budget.comparable_share)

    def forget(self, key: bytes) -> None:
        """The entry is gone. What was learnt from it about others stays."""
        self._standings.pop(key, None)

    def rebuild(self, observations: Iterable[Observation]) -> None:
        """All anew from these, oldest first. What has been given before is not known: budgets start
        afresh."""
        self._scopes.clear()
        self._standings.clear()
        self._observations = 0
        for observation in observations:
            self._take_in(self._scope(observation.scope), observation)
        for scope in self._scopes.values():
            scope.budget = Budget()
            if scope.audited:
                scope.budget.confirmed_before()
            scope.calibration.refit()

    def adopt(self, other: Evidence) -> None:
        """What `other` knows takes the place of what is known here; `other` is used no more."""
        self._scopes, self._standings = other._scopes, other._standings
        self._observations = other._observations

    def report(self, scope: str | None = None) -> EvidenceReport:
        """Of one scope, or of all together (then without a curve, for each has its own)."""
        scopes = list(self._scopes.values()) if scope is None else [self._scope(scope)]
        decisions: Counter[str] = Counter()
        for each in scopes:
            decisions.update(each.decisions)
        given = sum(each.given for each in scopes)
        charged = sum(each.charged for each in scopes)
        audited = sum(each.audited for each in scopes)
        wrong = sum(each.audited_wrong for each in scopes)
        lower, upper = clopper_pearson(wrong, audited, self._settings.confidence)
        return EvidenceReport(
            decisions=dict(decisions),
            observations=sum(len(each.calibration) for each in scopes),
            given=given,
            estimated_error=charged / given if given else 0.0,
            estimated_error_upper=_share_upper(charged, given, self._terms.z),
            audited=audited,
            audited_wrong=wrong,
            audited_error=(wrong / audited if audited else 0.0, lower, upper),
            worst=self._worst(scope),
            curve=() if scope is None else tuple(scopes[0].calibration.curve),
        )

    def _judged(
        self, known: _Scope, key: bytes, likeness: Likeness, support: Support, accepted: float
    ) -> Judgement:
        standing = self._standings.get(key)
        if standing is not None and standing.wrong >= _RETIRED_AT:
            return Judgement(False, 1.0, 1.0, "retired", support)
        estimate = known.calibration.estimate(features_of(likeness, support, standing))
        reason = "evidence"
        if likeness.equal_form and not support.contradicted:
            by_form = self._by_form(known)
            if estimate is None or by_form[1] < estimate[1]:
                estimate, reason = by_form, "equal_form"
        if estimate is None:
            return Judgement(False, 1.0, 1.0, "no_evidence", support)
        error, upper = (min(1.0, each * known.budget.surprise) for each in estimate)
        if standing is not None and standing.wrong:
            own = standing.wrong / (standing.wrong + standing.right + _ENTRY_PRIOR)
            error, upper = max(error, own), max(upper, own)
        if upper > accepted:
            reason = "error"
        elif error > _OWN_ERROR_MAX * accepted:
            reason = "own_error"
        elif not known.budget.allows(error, self._terms, accepted):
            reason = "budget"
        elif known.budget.checks_due or (
            reason == "evidence" and not known.budget.is_confirmed(self._terms, accepted)
        ):
            reason = "checking"
        else:
            return Judgement(True, error, upper, reason, support)
        return Judgement(False, error, upper, reason, support)

    def _by_form(self, known: _Scope) -> tuple[float, float]:
        """Estimated error of questions that are equal in form, and its upper bound: what comes with the
        product, corrected by what this scope saw."""
        of = _FORM_PRIOR + known.form_seen
        error = (0.5 + known.form_wrong) / of
        answers = HORIZON * known.budget.form_share
        counted = count_upper(error, error / of, answers, self._terms.z) / answers
        return error, max(counted, gamma_upper(error, error / of, self._terms.z))

    def _take_in(self, known: _Scope, observation: Observation) -> None:
        calibration, likeness = known.calibration, observation.likeness
        standing = self._standing(observation.scope, observation.entry)
        like = observation.entry if observation.same else observation.alike
        if observation.made and like and observation.source == "explored":
            self._standing(observation.scope, observation.made).group = self._group(like)
        wrong = not observation.same
        seen = calibration.seen(observation.entry, observation.question)
        audited = observation.source == "audited"
        features = features_of(likeness, observation.support, standing)
        estimate = calibration.estimate(features)
        if likeness.equal_form:
            estimate = min(self._by_form(known), estimate or (1.0, 1.0))
        if audited:
            known.audited += 1
            known.audited_wrong += wrong
        if estimate is not None and estimate[1] <= self._settings.max_error and not standing.wrong:
            known.budget.audit(estimate[0], wrong=wrong, was_given=observation.source != "explored")
        if seen is not None and not (seen and wrong):
            return
        standing.wrong += wrong
        standing.right = min(_RIGHT_MAX, standing.right + (not wrong)) if seen is None else standing.right
        if likeness.equal_form:
            known.form_seen += seen is None
            known.form_wrong += wrong
        if seen is not None:
            calibration.correct(observation.entry, observation.question)
        elif wrong or observation.source != "feedback":
            # Who says that an answer was right chose to: as a sample that would count for too much.
            before = len(calibration)
            calibration.add(
                features,
                observation.entry,
                observation.question,
                observation.writer,
                wrong=wrong,
                stands_for=observation.stands_for,
            )
            self._observations += len(calibration) - before
            self._bound(observation.scope)

    def _group(self, key: bytes) -> bytes:
        standing = self._standings.get(key)
        if standing is None:
            return key
        self._standings.move_to_end(key)
        return standing.group

    def _standing(self, scope: str, key: bytes) -> Standing:
        standing = self._standings.get(key)
        if standing is None:
            standing = self._standings[key] = Standing(scope, key)
            if len(self._standings) > _STANDINGS_MAX:
                self._standings.popitem(last=False)
        return standing

    def _scope(self, scope: str) -> _Scope:
        known = self._scopes.get(scope)
        if known is None:
            known = self._scopes[scope] = _Scope(self._terms)
            self._bound(scope)
        else:
            self._scopes.move_to_end(scope)
        return known

    def _bound(self, kept: str) -> None:
        """The scopes that nothing was asked in for the longest start afresh when there is too much of all."""
        while self._observations > _OBSERVATIONS_MAX or len(self._scopes) > _SCOPES_MAX:
            oldest = next(iter(self._scopes))
            if oldest == kept:
                return
            self._observations -= len(self._scopes.pop(oldest).calibration)

    def _worst(self, scope: str | None) -> tuple[WorstEntry, ...]:
        wrong = [
            WorstEntry(key, int(standing.right), standing.wrong)
            for key, standing in self._standings.items()
            if standing.wrong and (scope is None or standing.scope == scope)
        ]
        wrong.sort(key=lambda each: (-each.wrong, each.right))
        return tuple(wrong[:_WORST_SHOWN])


def _share_upper(charged: float, given: int, z: float) -> float:
    """The upper bound of the share of wrong ones among `given`, of which `charged` are estimated to be."""
    if not given:
        return 1.0
    return min(1.0, max(charged, count_upper(charged / given, 0.0, given, z)) / given)


def _terms_of(settings: SemanticSettings) -> Terms:
    return Terms(settings.confidence, of_requests=settings.error_of == "requests")
