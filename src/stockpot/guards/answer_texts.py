"""The texts of one answer: each streams through a window of its own, or is held until all of it is there."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from stockpot.errors import GuardRefused
from stockpot.events import Delta, Event, Finished, FinishReason, ToolCallDelta
from stockpot.guards.counts import GuardCounts, Told
from stockpot.guards.redaction import StreamWindow
from stockpot.guards.rule import Check, Rule

HELD_CHARACTERS_MAX = 4 * 2**20

_CALL = "call "


class Windows:
    """The windows of text, reasoning, refusal and the arguments of each tool call, by choice.

    What a window holds goes out before anything of another channel of the same choice: the order of an
    answer's blocks stays as the model gave it. A finding therefore ends where its block does.
    """

    def __init__(self, rules: Sequence[Rule], told: Told, counts: GuardCounts) -> None:
        self._rules, self._told, self._counts = rules, told, counts
        self._windows: dict[tuple[int, str], StreamWindow] = {}
        self._open: dict[int, str] = {}
        """By choice, the channel that came last."""

    def through(self, delta: Delta) -> Generator[Delta]:
        """What may go out now. Raises GuardRefused."""
        choice = delta.choice
        pieces = list(_pieces(delta))
        if pieces and self._open.get(choice, pieces[0][0]) != pieces[0][0]:
            yield from self.rest(choice)
        passed: dict[str, str] = {}
        for channel, text in pieces:
            before = self._open.get(choice)
            if before in passed and before != channel:
                passed[before] += self._window(choice, before).finish()
            passed[channel] = passed.get(channel, "") + self._window(choice, channel).push(text)
            self._open[choice] = channel
        if delta.signature and self._open.get(choice) == "reasoning":
            # It completes the reasoning, of which nothing may come after it.
            passed["reasoning"] = passed.get("reasoning", "") + self._window(choice, "reasoning").finish()
        calls = tuple(
            replace(call, arguments=passed.pop(f"{_CALL}{call.index}", "")) for call in delta.tool_calls
        )
        yield replace(
            delta,
            text=passed.get("text", ""),
            reasoning=passed.get("reasoning", ""),
            refusal=passed.get("refusal", ""),
            tool_calls=calls,
        )

    def rest(self, choice: int) -> Generator[Delta]:
        """What is still held of a choice, of the one channel that may hold anything. Raises GuardRefused."""
        channel = self._open.pop(choice, None)
        text = "" if channel is None else self._window(choice, channel).finish()
        if channel is None or not text:
            return
        if channel.startswith(_CALL):
            index = int(channel.removeprefix(_CALL))
            yield Delta(choice, "", tool_calls=(ToolCallDelta(index, arguments=text),))
        elif channel == "text":
            yield Delta(choice, text)
        elif channel == "reasoning":
            yield Delta(choice, "", reasoning=text)
        else:
            yield Delta(choice, "", refusal=text)

    def _window(self, choice: int, channel: str) -> StreamWindow:
        key = (choice, channel)
        if key not in self._windows:
            self._windows[key] = StreamWindow(self._rules, self._told, self._counts)
        return self._windows[key]


def _pieces(delta: Delta) -> Generator[tuple[str, str]]:
    """The texts of a delta with their channels, in the order of the blocks of an answer."""
    for channel, text in (
        ("reasoning", delta.reasoning),
        ("text", delta.text),
        ("refusal", delta.refusal),
        *((f"{_CALL}{call.index}", call.arguments) for call in delta.tool_calls),
    ):
        if text:
            yield channel, text


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list[str])
    refusal: list[str] = field(default_factory=list[str])
    arguments: dict[int, list[str]] = field(default_factory=dict[int, list[str]])
    reason: FinishReason | None = None


class HeldAnswer:
    """The events of an answer from its first text on, and what its choices say."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._choices: dict[int, _Choice] = {}
        self._characters = 0

    def holds(self, event: Event) -> bool:
        """Whether the event is held back, which it then is. Raises GuardRefused for an endless answer."""
        if isinstance(event, Delta):
            self._read(event)
        elif isinstance(event, Finished):
            self._choices.setdefault(event.choice, _Choice()).reason = event.reason
        elif not self.events:
            return False
        self.events.append(event)
        return True

    def texts(self, check: Check) -> Generator[str]:
        """What a check is to look at, choice by choice."""
        for choice in self._choices.values():
            text = "".join(choice.text)
            calls = ["".join(pieces) for pieces in choice.arguments.values()]
            if check.is_about_form:
                # The text beside a call of tools is no answer, and what broke off at once has none.
                if not calls and (text or choice.reason not in ("error", "cancelled", "deadline")):
                    yield text
            elif said := [each for each in (text, "".join(choice.refusal), *calls) if each]:
                yield "\n\n".join(said)

    def _read(self, delta: Delta) -> None:
        choice = self._choices.setdefault(delta.choice, _Choice())
        choice.text.append(delta.text)
        choice.refusal.append(delta.refusal)
        self._characters += len(delta.text) + len(delta.refusal) + len(delta.reasoning)
        for call in delta.tool_calls:
            choice.arguments.setdefault(call.index, []).append(call.arguments)
            self._characters += len(call.arguments)
        if self._characters > HELD_CHARACTERS_MAX:
            raise GuardRefused(
                f"The answer has more than {HELD_CHARACTERS_MAX:,} characters, and this server's guards"
                " look at whole answers. Ask for a shorter one, or set 'max_tokens'.",
                code="guard_refused_output",
            )
