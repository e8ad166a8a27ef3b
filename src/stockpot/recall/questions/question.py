"""What a question asks, as far as it can be read from its words: what may answer it must agree on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stockpot.recall.questions.features import Features, conflict_between, read_features
from stockpot.recall.questions.spelling import is_slip

_SLIPS_MAX = 3
_CONTEXT_MAX = 32_000
"""Characters of a conversation that are read; a longer one is like no other."""


@dataclass(frozen=True, slots=True)
class Question:
    """`text` is the last message, `context` the conversation before it where that need not be the same
    (a line each, `role: text`), else "". `features` are read by `read_question`."""

    text: str
    context: str = ""
    features: Features | None = None
    said: tuple[tuple[str, Features], ...] = ()
    """Who said what before, without what is only politeness."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """How two questions compare. `similarity` is the cosine of their vectors, `context_similarity` that of
    what precedes them (1 where it is the same).

    `conflict` names what rules out one answer for both ("numbers", "negation", ...; "": nothing found).
    `equal_form`: they differ in nothing that carries meaning (case, punctuation, politeness, spelling,
    word forms that are known to be the same). `distance` in 0..1 is how much of their words they do not
    share, `length_ratio` the shorter's length over the longer's.
    """

    similarity: float
    context_similarity: float = 1.0
    conflict: str = ""
    equal_form: bool = False
    distance: float = 0.0
    length_ratio: float = 1.0
    same_kind: bool = True


def read_question(text: str, context: str = "") -> Question:
    """Reads the words once, for all comparisons."""
    said: list[tuple[str, Features]] = []
    for line in _messages(context[: _CONTEXT_MAX + 1]):
        role, _, message = line.partition(": ")
        features = read_features(message)
        if features.normal.form or features.content:
            said.append((role, features))
    return Question(text, context, read_features(text), tuple(said))


def compare(a: Question, b: Question, similarity: float, context_similarity: float = 1.0) -> Likeness:
    """How alike they are. Symmetric."""
    one, other = _features(a), _features(b)
    same = _is_same(one, other)
    conflict = "" if same else conflict_between(one, other)
    if a.context != b.context:
        same = same and _is_same_context(a, b)
        if not same and not conflict:
            conflict = _context_conflict(a, b)
    words, others = set(one.normal.plain), set(other.normal.plain)
    union = len(words | others)
    shorter, longer = sorted((len(one.normal.plain), len(other.normal.plain)))
    return Likeness(
        similarity=similarity,
        context_similarity=context_similarity,
        conflict=conflict,
        equal_form=same,
        distance=0.0 if same or not union else 1 - len(words & others) / union,
        length_ratio=shorter / longer if longer else 1.0,
        same_kind=one.kind == other.kind,
    )


def _features(question: Question) -> Features:
    return question.features or read_features(question.text)


def _is_same(a: Features, b: Features) -> bool:
    """Equal by transformations that are known to keep the meaning: nothing else is."""
    if a.normal.form == b.normal.form:
        return True
    if not (a.normal.is_english and b.normal.is_english):
        return False
    names = frozenset(form for name in (*a.names, *b.names) for form in (name, name + "s"))
    return _is_same_but_slips(a.normal.form, b.normal.form, names) or _is_same_but_slips(
        a.normal.plain, b.normal.plain, names
    )


def _is_same_but_slips(a: Sequence[str], b: Sequence[str], names: frozenset[str]) -> bool:
    if len(a) != len(b):
        return False
    differing = [(one, other) for one, other in zip(a, b, strict=True) if one != other]
    if len(differing) > min(_SLIPS_MAX, max(1, len(a) // 3)):
        return False
    return all(one not in names and other not in names and is_slip(one, other) for one, other in differing)


def _messages(context: str) -> list[str]:
    """A message each: a line that begins with a role, and the lines below it."""
    messages: list[str] = []
    for line in context.splitlines():
        if line.startswith(("user: ", "assistant: ")) or not messages:
            messages.append(line)
        else:
            messages[-1] += "\n" + line
    return messages


def _is_same_context(a: Question, b: Question) -> bool:
    """Message by message the same; the whole of it has been read."""
    if max(len(a.context), len(b.context)) > _CONTEXT_MAX or len(a.said) != len(b.said):
        return False
    return all(
        role == other_role and _is_same(one, other)
        for (role, one), (other_role, other) in zip(a.said, b.said, strict=True)
    )


def _context_conflict(a: Question, b: Question) -> str:
    """Whether what is named before disagrees in what both speak of."""
    for role in ("user", "assistant"):
        one = [features for said_by, features in a.said if said_by == role]
        other = [features for said_by, features in b.said if said_by == role]
        numbers = [frozenset(n for each in side for n in each.numbers) for side in (one, other)]
        if numbers[0] - numbers[1] and numbers[1] - numbers[0]:
            return "context"
        names = [{n for each in side for n in each.names} for side in (one, other)]
        if names[0] - names[1] and names[1] - names[0]:
            return "context"
    return ""
