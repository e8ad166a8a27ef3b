"""Applies the rules to requests and answers: allow, redact, retry once, refuse; never silently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from stockpot.errors import ConfigurationError, UnsupportedField
from stockpot.events import Delta, Event, Finished, Notice
from stockpot.guards.answer_texts import HeldAnswer, Windows
from stockpot.guards.checks import Ask, ClassifierCheck, JudgeCheck, PatternCheck, SchemaCheck, load_function
from stockpot.guards.counts import GuardCounts, Told
from stockpot.guards.finders import Finder, Kind, ReadingTime, personal_kinds, secret_kinds, word_kinds
from stockpot.guards.redaction import RuleRefused, inspected, refusal
from stockpot.guards.request_texts import Cleaning, mapped, strings, texts
from stockpot.guards.rule import Rule, Scope
from stockpot.requests import AnyRequest, GenerationRequest
from stockpot.settings_guards import GuardSettings, Stage

INLINE_CHARACTERS = 4096
INLINE_PIECE_CHARACTERS = 512
"""Requests, and pieces of an answer, that are longer are read beside the event loop. Pieces cost more: where
each of their characters may be the beginning of what is not complete yet."""


def open_guards(settings: Mapping[str, GuardSettings], ask: Ask, counts: GuardCounts) -> Guards:
    """The rules of the settings. `ask` reaches the models that judge. Raises ConfigurationError."""
    return Guards([_rule(name, each, ask) for name, each in settings.items()], counts)


class Guards:
    """A `gateway.guarding.Guarding`."""

    def __init__(self, rules: Sequence[Rule], counts: GuardCounts) -> None:
        self._rules = tuple(rules)
        self._counts = counts

    async def check_input(self, request: AnyRequest, notices: list[Notice]) -> AnyRequest:
        """The request as the model may see it. Raises GuardRefused."""
        rules = self._covering(request, "input")
        if not rules:
            return request
        told = Told(notices)
        read = strings(request)
        characters = sum(map(len, read))
        time_left = ReadingTime()
        if characters <= INLINE_CHARACTERS:
            cleaned = self._cleaned(request, read, rules, told, time_left)
        else:
            try:
                cleaned = await asyncio.to_thread(self._cleaned, request, read, rules, told, time_left)
            finally:
                time_left.end()  # the thread of a request that is cancelled does not read on
        checks = [rule for rule in rules if rule.check is not None]
        if checks and (text := "\n\n".join(texts(cleaned))):
            for rule in checks:
                await self._checked(rule, text, "input", told)
        return cleaned

    def _cleaned(
        self,
        request: AnyRequest,
        read: Sequence[str],
        rules: Sequence[Rule],
        told: Told,
        time_left: ReadingTime,
    ) -> AnyRequest:
        """The request as the rules with finders leave it. Raises GuardRefused."""
        # All at once first: requests have hundreds of short texts, of which mostly none holds anything.
        # No finding of a single text can be missed: for every pattern this character is an edge.
        if not self._may_find("\0".join(read), rules, time_left):
            return request

        def clean(text: str) -> str:
            return inspected(text, rules, "input", told, self._counts, time_left=time_left)

        redacting = [rule for rule in rules if rule.action == "redact"]

        def quiet(text: str) -> str:
            return inspected(text, redacting, "input", Told([]), GuardCounts(), time_left=time_left)

        return mapped(request, Cleaning(clean, clean, quiet, clean))

    def _may_find(self, text: str, rules: Sequence[Rule], time_left: ReadingTime) -> bool:
        try:
            return any(rule.finder is not None and rule.finder.finds_any(text, time_left) for rule in rules)
        except TimeoutError:
            return True  # which is refused, or noted, at the first text

    def answers(self, request: AnyRequest) -> int:
        """How often a model may be asked for the answer."""
        return 1 + any(rule.action == "retry" for rule in self._covering(request, "output"))

    def answer(
        self,
        request: GenerationRequest,
        run: Callable[[], AsyncGenerator[Event]],
        notices: list[Notice],
    ) -> AsyncGenerator[Event]:
        """The events of `run` as the client may see them."""
        rules = self._covering(request, "output")
        if not rules:
            return run()
        if request.generation.logprobs is not None and any(
            rule.finder is not None and rule.action in ("redact", "refuse") for rule in rules
        ):
            raise UnsupportedField(
                "Log probabilities would show what this server's guards hold back; leave 'logprobs' out.",
                param="logprobs",
            )
        told = Told(notices)
        if any(rule.needs_whole_answer for rule in rules):
            return self._whole(rules, run, told)
        return self._streamed(rules, run, told)

    def _covering(self, request: AnyRequest, stage: Stage) -> tuple[Rule, ...]:
        return tuple(rule for rule in self._rules if rule.scope.covers(request.generation, stage))

    async def _checked(self, rule: Rule, text: str, stage: Stage, told: Told) -> None:
        assert rule.check is not None
        objection = await rule.check.objection(text)
        if objection is None:
            return
        self._counts.add(rule.name, stage, rule.action)
        if rule.action == "note":
            told.add(rule.name, "note", stage, [f"something that {objection}"])
        else:
            raise refusal(rule, stage, objection)

    async def _streamed(
        self, rules: Sequence[Rule], run: Callable[[], AsyncGenerator[Event]], told: Told
    ) -> AsyncGenerator[Event]:
        """Each text of the answer through a window of its own."""
        windows = Windows(rules, told, self._counts)
        async with aclosing(run()) as events:
            async for event in events:
                if isinstance(event, Delta):
                    for delta in await _passed(windows, event):
                        yield delta
                    continue
                if isinstance(event, Finished):
                    for delta in windows.rest(event.choice):
                        yield delta
                yield event

    async def _whole(
        self, rules: Sequence[Rule], run: Callable[[], AsyncGenerator[Event]], told: Told
    ) -> AsyncGenerator[Event]:
        """What says how a request waits goes out at once; the answer when all of it has passed."""
        is_first = True
        while True:
            answer = HeldAnswer()
            try:
                async with aclosing(self._streamed(rules, run, told)) as events:
                    async for event in events:
                        # A second try is in place already, as far as the client is told.
                        if not answer.holds(event) and is_first:
                            yield event
                for rule in rules:
                    if rule.check is not None:
                        for text in answer.texts(rule.check):
                            await self._checked(rule, text, "output", told)
            except RuleRefused as error:
                if not is_first or error.rule.action != "retry":
                    raise
                is_first = False
                told.add(error.rule.name, "retry", "output", ["what it does not allow"])
                continue
            for event in answer.events:
                yield event
            return


async def _passed(windows: Windows, delta: Delta) -> Iterable[Delta]:
    """What of a delta may go out now. Raises GuardRefused."""
    characters = len(delta.text) + len(delta.reasoning) + len(delta.refusal)
    characters += sum(len(call.arguments) for call in delta.tool_calls)
    if characters <= INLINE_PIECE_CHARACTERS:
        return windows.through(delta)
    return await asyncio.to_thread(lambda: list(windows.through(delta)))


def _rule(name: str, settings: GuardSettings, ask: Ask) -> Rule:
    scope = Scope(settings.on, frozenset(settings.models), frozenset(settings.teams))
    refuse = settings.when_it_fails == "refuse"
    match settings.rule:
        case "secrets":
            return Rule(name, settings.action, scope, Finder(_chosen(name, secret_kinds(), settings.kinds)))
        case "personal-data":
            return Rule(name, settings.action, scope, Finder(_chosen(name, personal_kinds(), settings.kinds)))
        case "block-list":
            return Rule(name, settings.action, scope, Finder(word_kinds(_words(name, settings))))
        case "pattern":
            check = PatternCheck(settings.pattern or "")
        case "json-schema":
            check = SchemaCheck(settings.schema_ or {})
        case "classifier":
            if settings.judge is not None:
                check = JudgeCheck(
                    ask,
                    settings.judge,
                    instruction=settings.instruction,
                    timeout_s=settings.timeout_s,
                    refuse=refuse,
                )
            else:
                check = ClassifierCheck(
                    load_function(settings.classifier or ""),
                    threshold=settings.threshold,
                    timeout_s=settings.timeout_s,
                    refuse=refuse,
                )
    # An answer that must match is one that a rule without `on` is about, too.
    if settings.rule in ("pattern", "json-schema"):
        scope = replace(scope, on="output")
    return Rule(name, settings.action, scope, check=check)


def _chosen(name: str, kinds: Iterable[Kind], wanted: Sequence[str]) -> list[Kind]:
    known = {kind.name: kind for kind in kinds}
    unknown = [each for each in wanted if each not in known]
    if unknown:
        raise ConfigurationError(
            f"guards.{name}.kinds names {unknown[0]!r}; there are {', '.join(sorted(known))}."
        )
    return [known[each] for each in wanted or known]


def _words(name: str, settings: GuardSettings) -> list[str]:
    words = list(settings.words)
    if settings.words_file is not None:
        try:
            words += settings.words_file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"guards.{name}.words_file cannot be read: {error}.") from error
    return words
