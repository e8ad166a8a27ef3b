"""One rule as the guards apply it: what it looks at, and what happens where it finds something."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from stockpot.guards.finders import Finder
from stockpot.requests import Generation
from stockpot.settings_guards import Action, Stage


@dataclass(frozen=True, slots=True)
class Scope:
    """To which requests a rule applies; empty: to all."""

    on: Stage
    models: frozenset[str] = frozenset()
    teams: frozenset[str] = frozenset()

    def covers(self, generation: Generation, stage: Stage) -> bool:
        return (
            self.on in (stage, "both")
            and (not self.models or generation.model in self.models)
            and (not self.teams or generation.caller.team in self.teams)
        )


@dataclass(frozen=True, slots=True)
class Rule:
    """`name` is what clients are told. Exactly one of `finder` (places in a text) and `check` (the whole
    text) is there."""

    name: str
    action: Action
    scope: Scope
    finder: Finder | None = None
    check: Check | None = None

    @property
    def needs_whole_answer(self) -> bool:
        """Whether nothing of an answer may be given out before all of it is there."""
        return self.check is not None or self.action == "retry"


class Check(ABC):
    """Looks at a whole text. `is_about_form`: of an answer it is the text, empty or not, and tool calls are
    none; else it is all that is said."""

    is_about_form: ClassVar[bool] = False

    @abstractmethod
    async def objection(self, text: str) -> str | None:
        """What is wrong with it, as the end of a sentence about the text and without quoting it; None:
        nothing. Never raises: a check that fails decides itself what that means."""
