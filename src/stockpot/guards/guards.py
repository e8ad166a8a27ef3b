"""Applies the rules to requests and answers: allow, redact, retry once, refuse; never silently."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from stockpot.errors import ConfigurationError, GuardRefused, UnsupportedField
from stockpot.events import Delta, Event, Finished, Notice, ToolCallDelta
from stockpot.guards.checks import Ask, ClassifierCheck, JudgeCheck, PatternCheck, SchemaCheck, load_function
from stockpot.guards.counts import GuardCounts, Told
from stockpot.guards.finders import Finder, Kind, personal_kinds, secret_kinds, word_kinds
from stockpot.guards.redaction import StreamWindow, inspected, refusal
from stockpot.guards.rule import Rule, Scope
from stockpot.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    Message,
    TextPart,
)
from stockpot.settings_guards import GuardSettings, Stage


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
        texts: list[str] = []

        def clean(text: str) -> str:
            texts.append(text)
            return inspected(text, rules, "input", told, self._counts)

        cleaned = _mapped(request, clean)
        for rule in rules:
            if rule.check is not None:
                await self._checked(rule, "\n\n".join(texts), "input", told)
        return cleaned

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
        if request.generation.logprobs is not None and any(rule.action == "redact" for rule in rules):
            raise UnsupportedField(
                "Log probabilities would show what this server's guards redact; leave 'logprobs' out.",
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
        windows = _Windows(rules, told, self._counts)
        async with aclosing(run()) as events:
            async for event in events:
                if isinstance(event, Delta):
                    yield windows.through(event)
                elif isinstance(event, Finished):
                    rest = windows.rest(event.choice)
                    if rest is not None:
                        yield rest
                    yield event
                else:
                    yield event

    async def _whole(
        self, rules: Sequence[Rule], run: Callable[[], AsyncGenerator[Event]], told: Told
    ) -> AsyncGenerator[Event]:
        """What says how a request waits goes out at once; the answer when all of it has passed."""
        again = any(rule.action == "retry" for rule in rules)
        while True:
            held: list[Event] = []
            texts: dict[int, list[str]] = {}
            try:
                async with aclosing(self._streamed(rules, run, told)) as events:
                    async for event in events:
                        if isinstance(event, Delta):
                            texts.setdefault(event.choice, []).append(event.text)
                        if isinstance(event, Delta | Finished) or held:
                            held.append(event)
                        else:
                            yield event
                for rule in rules:
                    if rule.check is not None:
                        for parts in texts.values():
                            await self._checked(rule, "".join(parts), "output", told)
            except GuardRefused as error:
                if not again or not _may_retry(rules, error):
                    raise
                again = False
                told.add("retry", "retry", "output", ["what a rule does not allow"])
                continue
            for event in held:
                yield event
            return


def _may_retry(rules: Sequence[Rule], error: GuardRefused) -> bool:
    return any(rule.action == "retry" and f"guard {rule.name!r} " in str(error) for rule in rules)


class _Windows:
    """The windows of one answer: text, reasoning, refusal and the arguments of each tool call, by choice."""

    def __init__(self, rules: Sequence[Rule], told: Told, counts: GuardCounts) -> None:
        self._rules, self._told, self._counts = rules, told, counts
        self._windows: dict[tuple[int, str], StreamWindow] = {}

    def through(self, delta: Delta) -> Delta:
        def passed(channel: str, text: str) -> str:
            return self._window(delta.choice, channel).push(text) if text else ""

        calls = tuple(
            replace(call, arguments=passed(f"call {call.index}", call.arguments)) for call in delta.tool_calls
        )
        return replace(
            delta,
            text=passed("text", delta.text),
            reasoning=passed("reasoning", delta.reasoning),
            refusal=passed("refusal", delta.refusal),
            tool_calls=calls,
        )

    def rest(self, choice: int) -> Delta | None:
        """What the windows of a choice still hold."""
        rests = {key[1]: window.finish() for key, window in self._windows.items() if key[0] == choice}
        if not any(rests.values()):
            return None
        calls = tuple(
            ToolCallDelta(int(channel.removeprefix("call ")), arguments=text)
            for channel, text in rests.items()
            if channel.startswith("call ") and text
        )
        return Delta(
            choice,
            rests.get("text", ""),
            reasoning=rests.get("reasoning", ""),
            refusal=rests.get("refusal", ""),
            tool_calls=calls,
        )

    def _window(self, choice: int, channel: str) -> StreamWindow:
        key = (choice, channel)
        if key not in self._windows:
            self._windows[key] = StreamWindow(self._rules, self._told, self._counts)
        return self._windows[key]


def _mapped(request: AnyRequest, clean: Callable[[str], str]) -> AnyRequest:
    """The request with every text passed through `clean`. Raises GuardRefused for token ids: rules read
    text."""
    if isinstance(request, ChatRequest):
        messages = tuple(_mapped_message(message, clean) for message in request.messages)
        same = all(a is b for a, b in zip(messages, request.messages, strict=True))
        return request if same else replace(request, messages=messages)
    if isinstance(request, CompletionRequest):
        if not isinstance(request.prompt, str):
            raise _unreadable()
        return replace(request, prompt=clean(request.prompt))
    assert isinstance(request, EmbeddingRequest)
    texts: list[str] = []
    for each in request.inputs:
        if not isinstance(each, str):
            raise _unreadable()
        texts.append(clean(each))
    return replace(request, inputs=tuple(texts))


def _mapped_message(message: Message, clean: Callable[[str], str]) -> Message:
    content = clean(message.content)
    calls = tuple(replace(call, arguments=clean(call.arguments)) for call in message.tool_calls)
    if content == message.content and calls == message.tool_calls:
        return message
    parts = tuple(
        TextPart(clean(part.text)) if isinstance(part, TextPart) else part for part in message.parts
    )
    return replace(message, content=content, parts=parts, tool_calls=calls)


def _unreadable() -> GuardRefused:
    return GuardRefused(
        "This server's guards read text, and token ids are none; send the prompt as text.",
        code="guard_refused_input",
    )


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
