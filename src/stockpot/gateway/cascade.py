"""A small model answers first; the strong one where that answer will not do, or the question looks hard.

The small model's answer is held back whole: what has been delivered cannot be taken back, and only a complete
answer can be validated. The strong model's streams.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from stockpot.clock import Clock
from stockpot.errors import StockpotError, cause_of
from stockpot.events import Completed, Delta, Event, Finished, Notice
from stockpot.gateway.answer_checks import Answer, check_pattern, objection
from stockpot.gateway.difficulty import Classifier, load_classifier
from stockpot.gateway.journey import Journey
from stockpot.gateway.retry import ELSEWHERE
from stockpot.requests import GenerationRequest
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_gateway import CascadeSettings

Walk = Callable[[RoutePlan], AsyncGenerator[Event]]

_SURVIVABLE = ELSEWHERE | {"context_overflow"}
_HELD_CHARACTERS = 4 * 2**20

_LOG = logging.getLogger(__name__)


def check_cascade(settings: CascadeSettings) -> None:
    """Raises ConfigurationError for a pattern that is none, or a classifier that cannot be loaded."""
    if settings.pattern is not None:
        check_pattern(settings.pattern)
    if settings.classifier is not None:
        load_classifier(settings.classifier)


class Classifiers:
    """The measures of difficulty the routes name, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, Classifier] = {}

    def is_hard(self, cascade: CascadeSettings, request: GenerationRequest) -> bool:
        """Whether the strong model is to answer at once. A classifier that fails has not found it hard."""
        name = cascade.classifier
        if name is None:
            return False
        try:
            if name not in self._loaded:
                self._loaded[name] = load_classifier(name)
            return bool(float(self._loaded[name](request)) >= cascade.difficulty)
        except Exception as error:  # noqa: BLE001  foreign code: whatever it raises, it has not decided
            _LOG.warning(
                "the classifier %r of a cascade failed, and %s is not asked at once (%s: %s)",
                *(name, cascade.to, type(error).__name__, error),
            )
            return False


async def run_cascade(
    plan: RoutePlan,
    cascade: CascadeSettings,
    request: GenerationRequest,
    journey: Journey,
    clock: Clock,
    *,
    hard: bool,
    walk: Walk,
) -> AsyncGenerator[Event]:
    """The small model (first step of the plan), then the strong one (`cascade.to`, and then the plan's other
    steps). Errors of the small model that another may survive are a reason to ask the strong one."""
    small = plan.steps[0].model
    strong = replace(
        plan,
        steps=(Step(cascade.to), *(step for step in plan.steps[1:] if step.model != cascade.to)),
        cascade=None,
    )
    why = "the question looks hard" if hard else None
    if not hard:
        held = _Held(cascade, request)
        try:
            async with aclosing(walk(replace(plan, steps=plan.steps[:1], cascade=None))) as events:
                async for event in events:
                    if not held.holds(event):
                        yield event
                    if held.is_too_long:
                        break
            why = await held.objection()
        except StockpotError as error:
            if cause_of(error) not in _SURVIVABLE:
                raise
            why = f"{small} failed ({cause_of(error)})"
        # Held back, nothing of it has reached the client yet.
        journey.first_token_s = None
        if why is None:
            journey.first_token_s = clock.monotonic() - journey.arrived_s
            for event in held.events:
                yield event
            return
        _mark_invalid(journey)
    journey.notices.append(Notice("cascade", f"{cascade.to} answers because {why}."))
    async with aclosing(walk(strong)) as events:
        async for event in events:
            yield event


class _Held:
    """The small model's answer."""

    def __init__(self, cascade: CascadeSettings, request: GenerationRequest) -> None:
        self.events: list[Event] = []
        self._cascade = cascade
        self._generation = request.generation
        self._characters = 0

    @property
    def is_too_long(self) -> bool:
        return self._characters > _HELD_CHARACTERS

    def holds(self, event: Event) -> bool:
        """Keep what is part of the answer; the rest tells a waiting client why it waits."""
        if not isinstance(event, Delta | Finished | Completed):
            return False
        self.events.append(event)
        if isinstance(event, Delta):
            self._characters += len(event.text) + len(event.reasoning) + len(event.refusal)
            self._characters += sum(len(call.arguments) for call in event.tool_calls)
        return True

    async def objection(self) -> str | None:
        """Why the answer will not do; one bad choice is enough."""
        if self.is_too_long:
            return f"the answer of the small model was longer than {_HELD_CHARACTERS} characters"
        for answer in self._answers():
            wrong = await objection(answer, self._generation.output_format, self._cascade)
            if wrong is not None:
                return f"the answer of the small model {wrong}"
        return None

    def _answers(self) -> Sequence[Answer]:
        answers: list[Answer] = []
        for choice in range(self._generation.choices):
            deltas = [e for e in self.events if isinstance(e, Delta) and e.choice == choice]
            reasons = [e.reason for e in self.events if isinstance(e, Finished) and e.choice == choice]
            answers.append(
                Answer(
                    text="".join(delta.text for delta in deltas),
                    refusal="".join(delta.refusal for delta in deltas),
                    calls=any(delta.tool_calls for delta in deltas),
                    reason=reasons[0] if reasons else "error",
                )
            )
        return answers


def _mark_invalid(journey: Journey) -> None:
    """The attempt whose answer was not used is in the accounts as failed, with what it cost. It is the last
    that succeeded, or that was given up for its length; a hedge that lost may stand behind it."""
    for cause in (None, "cancelled"):
        for place in reversed(range(len(journey.attempts))):
            if journey.attempts[place].cause == cause:
                journey.attempts[place] = replace(journey.attempts[place], cause="validation")
                return
