"""`Context`: a prompt that is built to be cached. Stable sections first, then a log that only grows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stockpot.context.canonical import canonical_json, canonical_text
from stockpot.context.prompt import Boundary, Document, Prompt, Section
from stockpot.context.stable import (
    Checks,
    stable_documents,
    stable_examples,
    stable_texts,
    stable_tools,
)
from stockpot.context.state import State, told_text
from stockpot.errors import StockpotError
from stockpot.requests import Message, Part, TextPart, Tool, ToolCall

if TYPE_CHECKING:
    from stockpot.context.budget import Budget, Fitted
    from stockpot.context.compaction import TokenPrices
    from stockpot.context.summaries import Summaries
    from stockpot.context.tokens import TokenCounter

_TTLS_S = {"5m": 300, "1h": 3600}
_BOUNDARIES_MAX = 64


class AppendOnly(StockpotError):
    """What is in a context cannot be changed; a fork can differ."""


class UnpairedCall(StockpotError):
    """A tool call without its result, or a result without its call."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What the model knows after a turn."""

    facts: Mapping[str, str]
    state: State | None


class Context:
    """The sections are fixed when it is made, in order of stability: system, tools, examples, documents. Then
    turns are appended, and nothing that is in ever changes: the prompt of a turn begins with the whole prompt
    of the turn before. To change history, `fork`.

    `facts` (the time, the user's state) and the task's `state` change all the time: they are told at the end,
    in the next turn of the user or of a tool, when they have changed, and stay there.

    `nfc` brings text into normal form C. `checks`: what moves on (a time, a random id) in a stable section is
    an error with the fix, a warning, or nothing. Tools are in order of their names, schemas in canonical
    JSON. Arguments of a call that are text stay as the model wrote them, for an engine has just that cached.

    Not for several threads. Raises StockpotError where something does not fit.
    """

    def __init__(
        self,
        *,
        system: str | Sequence[str] = (),
        tools: Iterable[Tool | Mapping[str, Any]] = (),
        examples: Iterable[Message | tuple[str, str]] = (),
        documents: Iterable[Document] | Mapping[str, str] = (),
        state: Mapping[str, Any] | None = None,
        nfc: bool = False,
        checks: Checks = "error",
    ) -> None:
        self._nfc = nfc
        self._checks: Checks = checks
        self._prompt = Prompt(
            system=stable_texts(system, "the system prompt", nfc=nfc, checks=checks),
            tools=stable_tools(tools, nfc=nfc, checks=checks),
            examples=stable_examples(examples, nfc=nfc, checks=checks),
            documents=stable_documents(documents, nfc=nfc),
        )
        self.state = State(state)
        self._facts: dict[str, str] = {}
        self._told: list[_Told] = [_Told({}, None)]
        self._open_calls: dict[str, str] = {}

    @property
    def prompt(self) -> Prompt:
        """The tree as it is now; it never changes."""
        return self._prompt

    def __len__(self) -> int:
        """Turns in the log."""
        return len(self._prompt.log)

    # What is told

    def fact(self, name: str, value: object) -> None:
        """Something volatile, by name: told with the next turn if it is another value than was told last."""
        text = value if isinstance(value, str) else canonical_json(value)
        self._facts[_one_line(name)] = canonical_text(text, nfc=self._nfc)

    def user(self, content: str = "", *, parts: Sequence[Part] = (), name: str | None = None) -> None:
        """A turn of the user; `parts` where there is more than text (then `content` is not given)."""
        self._refuse_open_calls("The user speaks")
        texts = "".join(part.text for part in parts if isinstance(part, TextPart))
        message = Message("user", content or texts, name, tuple(parts))
        self._append(self._with_news(self._canonical(message)))

    def assistant(
        self, content: str = "", *, tool_calls: Iterable[ToolCall | Mapping[str, Any]] = ()
    ) -> None:
        """A turn of the model, as it came; calls as `ToolCall`, or as OpenAI has them in JSON."""
        self._refuse_open_calls("The model speaks")
        calls = tuple(call if isinstance(call, ToolCall) else _call_of(call) for call in tool_calls)
        ids = [call.id for call in calls]
        if len(set(ids)) < len(ids):
            raise UnpairedCall(f"Two calls of one turn have the same id among {ids}; give each its own.")
        self._append(Message("assistant", content, tool_calls=calls))
        self._open_calls = {call.id: call.name for call in calls}

    def tool_result(self, call_id: str, content: object, *, failed: bool = False) -> None:
        """The result of a call: a text, or a JSON value, which is written in canonical form."""
        if call_id not in self._open_calls:
            waiting = ", ".join(self._open_calls) or "none"
            raise UnpairedCall(f"No call {call_id!r} waits for a result; those that do: {waiting}.")
        text = canonical_text(content, nfc=self._nfc) if isinstance(content, str) else canonical_json(content)
        message = Message("tool", text, tool_call_id=call_id, tool_failed=failed)
        last = len(self._open_calls) == 1
        self._append(self._with_news(message) if last else message)
        del self._open_calls[call_id]

    def append(self, message: Message) -> None:
        """A turn by its role, with the same checks. Turns of `system` and `developer` may be appended too:
        that is how instructions change without touching what is cached."""
        match message.role:
            case "user":
                self.user(message.content, parts=message.parts, name=message.name)
            case "assistant":
                self.assistant(message.content, tool_calls=message.tool_calls)
            case "tool":
                self.tool_result(message.tool_call_id or "", message.content, failed=message.tool_failed)
            case "system" | "developer":
                self._refuse_open_calls("An instruction comes")
                self._append(self._canonical(message))

    def boundary(
        self,
        ttl: str | int = "5m",
        *,
        shared: bool = False,
        tags: Collection[str] = (),
        after: Section | None = None,
    ) -> None:
        """What is here so far (or up to the end of the section `after`) is worth keeping for `ttl`: "5m",
        "1h" or seconds from its last use on."""
        seconds = _TTLS_S.get(ttl) if isinstance(ttl, str) else ttl
        if seconds is None or seconds < 1:
            raise StockpotError(f'A boundary has the ttl {ttl!r}; give "5m", "1h" or seconds from 1 on.')
        section = after or self._reached()
        count = 0 if section is None else len(getattr(self._prompt, section))
        if section is None or not count:
            raise StockpotError("There is nothing before this boundary; put it behind what is to be kept.")
        made = Boundary(section, count, seconds, shared, frozenset(tags))
        others = [each for each in self._prompt.boundaries if (each.section, each.count) != (section, count)]
        self._prompt = replace(self._prompt, boundaries=(*others, made)[-_BOUNDARIES_MAX:])

    # History

    def fork(
        self,
        turns: int | None = None,
        *,
        system: str | Sequence[str] | None = None,
        tools: Iterable[Tool | Mapping[str, Any]] | None = None,
        examples: Iterable[Message | tuple[str, str]] | None = None,
        documents: Iterable[Document] | Mapping[str, str] | None = None,
    ) -> Context:
        """Another context with the first `turns` turns (None: all), and other sections where they are given.
        From where it differs on, it is computed anew; up to there both share what is cached."""
        kept = len(self) if turns is None else turns
        if not 0 <= kept <= len(self):
            raise AppendOnly(f"A fork of {kept} turns was asked for; there are {len(self)}.")
        fork = Context.__new__(Context)
        fork._nfc, fork._checks = self._nfc, self._checks
        nfc, checks, prompt = self._nfc, self._checks, self._prompt
        changed = replace(
            prompt,
            system=prompt.system
            if system is None
            else stable_texts(system, "the system prompt", nfc=nfc, checks=checks),
            tools=prompt.tools if tools is None else stable_tools(tools, nfc=nfc, checks=checks),
            examples=prompt.examples
            if examples is None
            else stable_examples(examples, nfc=nfc, checks=checks),
            documents=prompt.documents if documents is None else stable_documents(documents, nfc=nfc),
            log=prompt.log[:kept],
        )
        fork._prompt = replace(
            changed,
            boundaries=tuple(
                each for each in changed.boundaries if each.count <= len(getattr(changed, each.section))
            ),
        )
        fork.state = self.state.copy()
        fork._facts = dict(self._facts)
        fork._told = self._told[: kept + 1]
        fork._open_calls = _open_calls(fork._prompt.log)
        return fork

    def replace_log(self, log: Sequence[Message]) -> Context:
        """Another context with this log: what compaction makes. State and facts are told anew, whole."""
        fork = self.fork(0)
        fork._prompt = replace(fork._prompt, log=tuple(log))
        fork._told = [_Told({}, None)] * (len(log) + 1)
        fork._open_calls = _open_calls(log)
        return fork

    def fit(
        self,
        budget: Budget,
        counter: TokenCounter,
        *,
        summaries: Summaries | None = None,
        expected_turns: float = 10.0,
        prices: TokenPrices | None = None,
    ) -> Fitted:
        """Bring the prompt within its budget (see `budget.fit`); from then on it is the one that fits. What
        was trimmed is in the result. Where the log was compacted, facts and state are told anew, whole.
        Raises BudgetExceeded, and nothing has changed."""
        from stockpot.context.budget import fit

        fitted = fit(
            self._prompt, budget, counter, summaries=summaries, expected_turns=expected_turns, prices=prices
        )
        if len(fitted.prompt.log) != len(self._prompt.log) or fitted.prompt.log != self._prompt.log:
            self._told = [_Told({}, None)] * (len(fitted.prompt.log) + 1)
        self._prompt = fitted.prompt
        return fitted

    # Rendering

    def openai(self, model: str, **parameters: Any) -> dict[str, Any]:
        """See `render_openai`."""
        from stockpot.context.render import render_openai

        return render_openai(self._prompt, model, **parameters)

    def anthropic(self, model: str, *, max_tokens: int, **parameters: Any) -> dict[str, Any]:
        """See `render_anthropic`."""
        from stockpot.context.render import render_anthropic

        return render_anthropic(self._prompt, model, max_tokens=max_tokens, **parameters)

    # Inside

    def _append(self, message: Message) -> None:
        self._prompt = replace(self._prompt, log=(*self._prompt.log, message))
        if len(self._told) <= len(self._prompt.log):
            self._told.append(self._told[-1])

    def _with_news(self, message: Message) -> Message:
        """The turn, and behind it what has changed since something was told last."""
        told = self._told[-1]
        news = [
            f"{name}: {value}" for name, value in sorted(self._facts.items()) if told.facts.get(name) != value
        ]
        state = told_text(self.state, told.state)
        pieces = ["<facts>\n" + "\n".join(news) + "\n</facts>"] if news else []
        pieces += [state] if state else []
        if not pieces:
            return message
        self._told.append(_Told(dict(self._facts), self.state.copy()))
        text = "\n\n" * bool(message.content) + "\n\n".join(pieces)
        parts = (*message.parts, TextPart(text)) if message.parts else ()
        return replace(message, content=message.content + text, parts=parts)

    def _canonical(self, message: Message) -> Message:
        parts = tuple(
            TextPart(canonical_text(part.text, nfc=self._nfc)) if isinstance(part, TextPart) else part
            for part in message.parts
        )
        return replace(message, content=canonical_text(message.content, nfc=self._nfc), parts=parts)

    def _refuse_open_calls(self, who: str) -> None:
        if self._open_calls:
            waiting = ", ".join(f"{id} ({name})" for id, name in self._open_calls.items())
            raise UnpairedCall(
                f"{who} while calls wait for their results: {waiting}. Append `tool_result`s first."
            )

    def _reached(self) -> Section | None:
        sections: tuple[Section, ...] = ("log", "documents", "examples", "system", "tools")
        return next((name for name in sections if getattr(self._prompt, name)), None)


def _open_calls(log: Sequence[Message]) -> dict[str, str]:
    """The calls of a log that wait for a result."""
    calls: dict[str, str] = {}
    for message in log:
        calls |= {call.id: call.name for call in message.tool_calls}
        if message.role == "tool" and message.tool_call_id is not None:
            calls.pop(message.tool_call_id, None)
    return calls


def _call_of(given: Mapping[str, Any]) -> ToolCall:
    function = given.get("function", given)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else canonical_json(arguments)
    return ToolCall(str(given["id"]), str(function["name"]), text)


def _one_line(name: str) -> str:
    if not name or "\n" in name or ":" in name:
        raise StockpotError(f"A fact has the name {name!r}; give one without a colon or a line end.")
    return name
