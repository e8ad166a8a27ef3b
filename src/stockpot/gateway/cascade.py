"""A small model answers first; the strong one where that answer will not do, or the question looks hard.

The small model's answer is held back whole: what has been delivered cannot be taken back, and only a complete
answer can be validated. The strong model's streams.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from stockpot.clock import Clock
from stockpot.errors import StockpotError, cause_of
from stockpot.events import Completed, Delta, Event, Finished, Notice
from stockpot.gateway.answer_checks import Answer, objection
from stockpot.gateway.difficulty import Classifier, load_classifier
from stockpot.gateway.journey import Journey
from stockpot.gateway.retry import ELSEWHERE
from stockpot.requests import GenerationRequest
from stockpot.routing.plan import RoutePlan, Step
from stockpot.settings_gateway import CascadeSettings

Walk = Callable[[RoutePlan], AsyncGenerator[Event]]

_SURVIVABLE = ELSEWHERE | {"context_overflow"}
_HELD_CHARACTERS = 4 * 2**20


class Classifiers:
    """The measures of difficulty the routes name, each loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, Classifier] = {}

    def is_hard(self, cascade: CascadeSettings, request: GenerationRequest) -> bool:
        """Whether the strong model is to answer at once. Raises ConfigurationError."""
        if cascade.classifier is None:
            return False
        classifier = self._loaded.get(cascade.classifier)
        if classifier is None:
            classifier = self._loaded[cascade.classifier] = load_classifier(cascade.classifier)
        return classifier(request) >= cascade.difficulty


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
            why = held.objection()
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
            self._characters += len(event.text) + len(event.reasoning)
        return True

    def objection(self) -> str | None:
        """Why the answer will not do; one bad choice is enough."""
        if self.is_too_long:
            return f"the answer of the small model was longer than {_HELD_CHARACTERS} characters"
        for answer in self._answers():
            if wrong := objection(answer, self._generation.output_format, self._cascade):
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
