"""Taking findings out of texts: whole ones, and streams of which only what is settled may go out."""

from __future__ import annotations

from collections.abc import Sequence

from stockpot.errors import GuardRefused
from stockpot.guards.counts import GuardCounts, Told
from stockpot.guards.finders import ReadingTime, safe_cut
from stockpot.guards.rule import Rule
from stockpot.settings_guards import Stage

_OFTEN_CHARACTERS = 256


def inspected(
    text: str, rules: Sequence[Rule], stage: Stage, told: Told, counts: GuardCounts, *, time_left: ReadingTime
) -> str:
    """`text` as the rules with finders leave it. Raises GuardRefused."""
    for rule in rules:
        if rule.finder is None:
            continue
        try:
            found = rule.finder.find(text, time_left)
        except TimeoutError:
            unread(rule, stage, told, counts)
            continue
        if not found:
            continue
        kinds = sorted({finding.kind for finding in found})
        counts.add(rule.name, stage, rule.action, len(found))
        if rule.action in ("refuse", "retry"):
            raise refusal(rule, stage, f"contains {_listed(kinds)}")
        told.add(rule.name, rule.action, stage, kinds)
        if rule.action == "redact":
            pieces: list[str] = []
            at = 0
            for finding in found:
                pieces += [text[at : finding.start], f"[redacted:{finding.kind}]"]
                at = finding.end
            text = "".join(pieces) + text[at:]
    return text


def unread(rule: Rule, stage: Stage, told: Told, counts: GuardCounts) -> None:
    """A text that could not be read in time: only a rule that does nothing but note lets it pass. Raises
    GuardRefused."""
    counts.add(rule.name, stage, rule.action)
    if rule.action != "note":
        raise refusal(rule, stage, "could not be read in time")
    told.add(rule.name, "note", stage, ["texts that could not be read in time"])


class RuleRefused(GuardRefused):
    """The refusal of one rule."""

    def __init__(self, message: str, *, rule: Rule, code: str) -> None:
        super().__init__(message, code=code)
        self.rule = rule


def refusal(rule: Rule, stage: Stage, objection: str) -> RuleRefused:
    """The error of a rule, which never quotes what was found."""
    what = "request" if stage == "input" else "answer"
    advice = "Change it" if stage == "input" else "Ask differently"
    return RuleRefused(
        f"The guard {rule.name!r} refused the {what}: it {objection}. {advice}, or ask your operator about"
        f" the rule (guards.{rule.name}).",
        rule=rule,
        code="guard_refused_input" if stage == "input" else "guard_refused_output",
    )


class StreamWindow:
    """One growing text. What goes in comes out as soon as no rule can find anything more in it.

    To look is work in proportion to what is held. A little is looked at with each piece; what is long held
    already, because it may yet become a finding, again when it has grown by a quarter."""

    def __init__(self, rules: Sequence[Rule], told: Told, counts: GuardCounts) -> None:
        self._rules = rules
        self._finders = [rule.finder for rule in rules if rule.finder is not None]
        self._told = told
        self._counts = counts
        self._held: list[str] = []
        self._characters = 0
        self._next_look = 0  # how many characters there must be
        self._behind = ""  # the last characters given out: words must not seem to begin where the window does

    def push(self, text: str) -> str:
        """What may go out now. Raises GuardRefused."""
        self._held.append(text)
        self._characters += len(text)
        return self._release(final=False) if self._characters >= self._next_look else ""

    def finish(self) -> str:
        """The rest. Raises GuardRefused."""
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        time_left = ReadingTime()
        behind = len(self._behind)
        whole = self._behind + "".join(self._held)
        settled = len(whole) if final else max(self._cut(whole, time_left), behind)
        ready = whole[behind:settled]
        self._held = [whole[settled:]]
        self._characters = len(whole) - settled
        self._next_look = 0 if self._characters < _OFTEN_CHARACTERS else self._characters * 5 // 4
        if not ready:
            return ""
        # One character of context in front: nothing found reaches into it, since it was settled before.
        front = self._behind[-1:]
        clean = inspected(front + ready, self._rules, "output", self._told, self._counts, time_left=time_left)
        self._behind = whole[max(0, settled - 1) : settled]
        return clean[len(front) :]

    def _cut(self, whole: str, time_left: ReadingTime) -> int:
        try:
            return safe_cut(self._finders, whole, time_left)
        except TimeoutError:
            return len(whole)  # to be refused, or noted, when it is inspected: no time is left there either


def _listed(kinds: Sequence[str]) -> str:
    return ", ".join(kind.replace("_", " ") for kind in kinds)
