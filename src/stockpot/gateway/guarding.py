"""The seam to guards: they look at a request before the model does, at an answer before the client does."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from stockpot.events import Event, Notice
from stockpot.requests import AnyRequest, GenerationRequest


class Guarding(Protocol):
    """Applies the configured rules. Nothing is changed silently: whatever is, adds a Notice to `notices`."""

    async def check_input(self, request: AnyRequest, notices: list[Notice]) -> AnyRequest:
        """The request as the model may see it. Raises GuardRefused."""
        ...

    def answers(self, request: AnyRequest) -> int:
        """How often a model may be asked for the answer: 2 where a rule may have it tried again."""
        ...

    def answer(
        self,
        request: GenerationRequest,
        run: Callable[[], AsyncGenerator[Event]],
        notices: list[Notice],
    ) -> AsyncGenerator[Event]:
        """The events of `run` as the client may see them, held back only as far as a rule needs. `run` may be
        called a second time (and the first stream closed) while nothing of the answer has been given out.
        Raises GuardRefused; closing this closes the stream below."""
        ...


class _Open:
    """No rules."""

    async def check_input(self, request: AnyRequest, notices: list[Notice]) -> AnyRequest:
        del notices
        return request

    def answers(self, request: AnyRequest) -> int:
        del request
        return 1

    def answer(
        self,
        request: GenerationRequest,
        run: Callable[[], AsyncGenerator[Event]],
        notices: list[Notice],
    ) -> AsyncGenerator[Event]:
        del request, notices
        return run()


def no_guards() -> Guarding:
    """Where no rule is configured."""
    return _Open()
