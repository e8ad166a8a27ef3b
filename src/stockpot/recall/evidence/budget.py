"""How many wrong answers a scope has probably been given, and how many it may have been."""

from __future__ import annotations

import math

from stockpot.recall.evidence.calibration import HORIZON, Terms

_REMEMBERED = 20_000
"""Requests, about; a quiet year must not pay for a bad day."""
_FORGIVEN_MAX = 3.0
"""Wrong answers with which an account begins, at most. Without any, the first answer could never be given: of
few answers even one wrong is more than any share accepted."""
_SHARE_PRIOR = (1.0, 4.0)
"""Requests that could be given an answer, of so many, that are taken to have been before the first."""
_FORM_PRIOR = (200.0, 1_000.0)
"""Requests with a candidate that is equal in form, of so many, taken to have been before the first."""
_CONFIRMED = 2.0
"""Wrong ones that as many answers would have among them at the error accepted, and that have none."""
_PRIOR = 3.0
"""Wrong ones in audits, as many as estimated, with which an account begins: one surprise is chance."""
_AUDITS_REMEMBERED = 100
_CHECKS = 20
"""Enough to notice, nearly always, that every fifth is wrong; few enough to cost little after mere chance."""


class Budget:
    """Of one scope. It is charged with the estimated error of each answer given; what audits find corrects
    the estimates: `surprise` is by how much more were wrong among the audited than was estimated (the mean
    of a gamma posterior over the factor, prior mean 1; never less than 1, so that luck makes nothing lax).
    """

    def __init__(self) -> None:
        self._requests = 0.0
        self._comparable = 0.0
        self._equal_form = 0.0
        self._eligible = 0.0
        self.given = 0.0
        self.charged = 0.0
        self.checks_due = 0
        self._right_in_a_row = 0
        self._confirmed_for = 1.0
        self._audited_wrong = 0.0
        self._audited_expected = 0.0

    @property
    def surprise(self) -> float:
        return max(1.0, (_PRIOR + self._audited_wrong) / (_PRIOR + self._audited_expected))

    def looked_up(self, *, comparable: bool = True, equal_form: bool = False) -> None:
        """One more request was looked up. There was a candidate to compare with, or not; one that is equal in
        form, or not."""
        keep = 1 - 1 / _REMEMBERED
        self._requests = self._requests * keep + 1
        self._comparable = self._comparable * keep + comparable
        self._equal_form = self._equal_form * keep + equal_form
        self._eligible *= keep
        self.given *= keep
        self.charged *= keep

    def found_eligible(self) -> None:
        """For the last one there is an answer that may be given, as far as the evidence goes."""
        self._eligible += 1

    def allows(self, error: float, terms: Terms, max_error: float) -> bool:
        """Whether one more answer, wrong with chance `error`, keeps the number of wrong ones below what is
        accepted. The upper bound of that number is taken as Poisson's: mean and z times its root. What is
        forgiven is borrowed from what will be accepted over the horizon: where few requests could be given
        an answer, that is little."""
        share = 1.0 if terms.of_requests else self._eligible_share
        forgiven = min(_FORGIVEN_MAX, max_error * HORIZON * share)
        counted = self._requests if terms.of_requests else self.given + 1
        charged = self.charged + error
        return charged + terms.z * math.sqrt(charged) <= forgiven + max_error * counted

    def is_confirmed(self, terms: Terms, max_error: float) -> bool:
        """Whether what passed the bound has held once on what was not used to choose it: as many that could
        have been given were right in a row as have `_CONFIRMED` wrong among them at the error accepted. A
        threshold that passed by luck seldom gets past this, and it costs little."""
        needed = _CONFIRMED * (self._eligible_share if terms.of_requests else 1.0) / max_error
        if self._right_in_a_row >= needed:
            self._confirmed_for = min(self._confirmed_for, max_error)
        return max_error >= self._confirmed_for

    def confirmed_before(self) -> None:
        """By evidence that is not remembered in full: answers were given already."""
        self._confirmed_for = 0.0

    @property
    def comparable_share(self) -> float:
        """Of the requests of late, which had a candidate to compare with."""
        return self._comparable / self._requests if self._comparable else 1.0

    @property
    def form_share(self) -> float:
        """Of the requests, which have a candidate that is equal in form."""
        return (_FORM_PRIOR[0] + self._equal_form) / (_FORM_PRIOR[1] + self._requests)

    @property
    def _eligible_share(self) -> float:
        return min(1.0, (_SHARE_PRIOR[0] + self._eligible) / (_SHARE_PRIOR[1] + self._requests))

    def give(self, error: float) -> None:
        """An answer was given."""
        self.given += 1
        self.charged += error

    def audit(self, error: float, *, wrong: bool, was_given: bool) -> None:
        """An answer that was given, or by the evidence could have been, by estimate wrong with chance
        `error`, has been compared with a new one. A wrong one has the next ones checked before any is given,
        until `_CHECKS` in a row were right: so an abrupt change costs about 1 / `audit_share` wrong answers,
        the wait for the first audit that shows it, and few more."""
        keep = 1 - 1 / _AUDITS_REMEMBERED
        self._right_in_a_row = 0 if wrong else self._right_in_a_row + 1
        self._audited_wrong = self._audited_wrong * keep + wrong
        self._audited_expected = self._audited_expected * keep + error
        if wrong and (was_given or self.checks_due):
            self.checks_due = _CHECKS

    def check(self) -> None:
        """One that could have been given is made anew instead."""
        self.checks_due = max(0, self.checks_due - 1)
