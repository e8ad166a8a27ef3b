"""A conversation as the text the model was trained on, by the Jinja template in the model's metadata.

Templates are written for Hugging Face transformers, so the environment is theirs: `trim_blocks`,
`lstrip_blocks`, loop controls, `{% generation %}`, `raise_exception`, `strftime_now`, `tojson` without HTML
escapes, `bos_token` and `eos_token`.

**What is trusted.** The template comes with the model file, the messages from anyone; messages are values
and never code. Jinja's immutable sandbox keeps a template from attributes and methods that reach beyond its
values, `range` ends at 100,000 (Jinja) and the output at 64 Mi characters. Time and memory are not bounded:
nested loops of a hostile model file can take long.

**What users write stays text.** A message may hold the spelling of a control token, such as `<|im_end|>`.
Tokenised with the rest it would become that token, and its author could close a turn and speak as another
role. So `render_parts` marks such spellings, and they are tokenised as the plain characters they are.
Prompts without them are one part, and tokenise exactly as the whole text does. (Not caught: a template that
makes such a spelling by joining or cutting texts of a user that hold none.)

**Where a place in a message comes to stand** only the template knows. `boundary_places` runs it over messages
that hold a mark there, and looks where the mark went; the prompt itself is never made of marked messages.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, cast

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stockpot.clock import Clock
from stockpot.errors import ModelError, RequestError
from stockpot.requests import CacheBoundary, Message

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_OUTPUT_LIMIT_CHARACTERS = 64 * 2**20
_ARGUMENTS_PARAM = "chat_template_kwargs"

# Noncharacters (Unicode 23.7): never text, so one that a conversation does not hold can mark places in it.
_MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))

# What a template that does not fit the messages raises, besides Jinja's own errors: missing keys, None + "",
# indices out of range. Nothing else runs inside a template.
_MISFITS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class PromptPart(NamedTuple):
    """A piece of the prompt. `literal`: control tokens spelled in it are plain text (encode with
    `special=False`); otherwise they are control tokens."""

    text: str
    literal: bool


class ChatTemplate:
    """Renders conversations for one model.

    `source` is the model's template; None falls back to ChatML, the most common form, and `is_fallback` says
    so. `begin` and `end` are the spellings of the model's begin and end tokens, "" for none; a template that
    wants the begin token writes it itself. `control_spellings` are those of all control tokens.
    Raises ModelError for a template that does not parse. Safe to call from any thread.
    """

    def __init__(
        self,
        source: str | None,
        *,
        begin: str,
        end: str,
        clock: Clock,
        control_spellings: Collection[str] = (),
    ) -> None:
        self.is_fallback = source is None
        self.source = _CHATML if source is None else source
        environment = _environment()
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now(clock)}
        self._fixed = {"bos_token": begin, "eos_token": end}
        self._reserved = {"messages", "add_generation_prompt", *self._fixed, *functions, *environment.globals}
        longest_first = sorted(filter(None, control_spellings), key=len, reverse=True)
        self._controls = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._knows_developer = "developer" in self.source
        try:
            self._template: Template = environment.from_string(self.source, globals=functions)
        except (TemplateSyntaxError, RecursionError) as error:
            raise ModelError(
                f"The chat template in the model's metadata cannot be parsed: {error}. Use the model through"
                " /v1/completions, or a model file with a correct template."
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt as one text. See `render_parts`, which is what a prompt to tokenise should come from."""
        parts = self.render_parts(messages, arguments, add_generation_prompt=add_generation_prompt)
        return "".join(part.text for part in parts)

    def render_parts(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool = True,
    ) -> list[PromptPart]:
        """The prompt in parts, to be tokenised each by itself and joined.

        `arguments` are further names for the template (`enable_thinking`, `documents`, ...). The role
        `developer` becomes `system` for a template that does not know it. Raises RequestError (param
        `messages`) where the template refuses the conversation, (param `chat_template_kwargs`) for an
        argument that would replace one of its own names.
        """
        taken = sorted(self._reserved.intersection(arguments))
        if taken:
            raise RequestError(
                f"The template argument `{taken[0]}` is set by the server; leave it out.",
                param=_ARGUMENTS_PARAM,
            )
        values: dict[str, Any] = {"messages": [self._turn(message) for message in messages], **arguments}
        fixed = {**self._fixed, "add_generation_prompt": add_generation_prompt}
        controls = self._controls
        if controls is None or not any(controls.search(text) for text in _strings(values)):
            return [PromptPart(self._run({**values, **fixed}), literal=False)]
        (mark,) = _unused_marks(values, 1)
        try:
            marked = {name: _marked(value, controls, mark) for name, value in values.items()}
        except RecursionError as error:
            raise RequestError(
                "The template arguments are nested too deeply.", param=_ARGUMENTS_PARAM
            ) from error
        return _split(self._run({**marked, **fixed}), controls, mark)

    def boundary_places(
        self,
        messages: Sequence[Message],
        arguments: Mapping[str, Any],
        boundaries: Sequence[CacheBoundary],
        text: str,
    ) -> list[int]:
        """How many characters stand before each boundary in `text`, the prompt made of the same messages.

        White space before a boundary that the template takes away is not counted. Raises RequestError (param
        `messages[i]`) where the template does not write the content a boundary stands in, and for a shared
        boundary where it writes content of later messages before it: that would be shared too.
        """
        turns = [self._turn(message) for message in messages]
        private, *marks = _unused_marks({**arguments, "messages": turns}, 1 + len(boundaries))
        contents = [message.content for message in messages]
        places = [_place_in(contents, boundary) for boundary in boundaries]
        marked = [(place, mark) for place, mark in zip(places, marks, strict=True)]
        shared = [place for place, boundary in zip(places, boundaries, strict=True) if boundary.shared]
        if shared:
            marked += [(place, private) for place in _private_places(contents, max(shared))]
        for (message, at), mark in sorted(marked, reverse=True):  # from the back: places before stay right
            turns[message]["content"] = turns[message]["content"][:at] + mark + turns[message]["content"][at:]
        rendered = self._run({**arguments, **self._fixed, "messages": turns, "add_generation_prompt": True})
        befores = [
            _before(mark, rendered, boundary, private)
            for mark, boundary in zip(marks, boundaries, strict=True)
        ]
        any_mark = re.compile(f"[{private}{''.join(marks)}]")
        return [_common_length(any_mark.sub("", before), text) for before in befores]

    def _turn(self, message: Message) -> dict[str, str]:
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        turn = {"role": role, "content": message.content}
        return turn if message.name is None else {**turn, "name": message.name}

    def _run(self, values: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                if size > _OUTPUT_LIMIT_CHARACTERS:
                    raise RequestError(
                        f"The chat template makes more than {_OUTPUT_LIMIT_CHARACTERS} characters of these"
                        " messages; send fewer.",
                        param="messages",
                    )
                pieces.append(piece)
        except (TemplateError, *_MISFITS) as error:
            raise RequestError(
                f"The model's chat template does not take these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what to train on; here it is no more than its body."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(clock: Clock) -> Callable[[str], str]:
    return lambda form: time.strftime(form, time.localtime(clock.wall()))


def _strings(values: Mapping[str, Any]) -> Iterator[str]:
    """Every text in JSON values, keys too."""
    rest: list[Any] = [values]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            rest.extend(cast("Mapping[Any, Any]", value).keys())
            rest.extend(cast("Mapping[Any, Any]", value).values())
        elif isinstance(value, (list, tuple)):
            rest.extend(cast("Sequence[Any]", value))


def _unused_marks(values: Mapping[str, Any], count: int) -> Sequence[str]:
    used: set[str] = set()
    for text in _strings(values):
        used.update(text)
    unused = [mark for mark in _MARKS if mark not in used]
    if len(unused) < count:
        raise RequestError(
            f"The messages hold all but {len(unused)} of the Unicode noncharacters U+FDD0 to U+FDEF, and"
            f" {count} are needed to mark places in them; leave some out.",
            param="messages",
        )
    return unused[:count]


def _marked(value: Any, controls: re.Pattern[str], mark: str) -> Any:
    """`value` with the mark inside every spelling of a control token, behind its first character."""
    if isinstance(value, str):
        return controls.sub(lambda found: found[0][0] + mark + found[0][1:], value)
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {_marked(key, controls, mark): _marked(item, controls, mark) for key, item in pairs}
    if isinstance(value, (list, tuple)):
        return [_marked(item, controls, mark) for item in cast("Sequence[Any]", value)]
    return value


def _split(text: str, controls: re.Pattern[str], mark: str) -> list[PromptPart]:
    """Cut a rendered text at the marked spellings, and take the marks out."""
    parts: list[PromptPart] = []
    before, *rest = text.split(mark)
    for after in rest:
        found = controls.match(before[-1:] + after)
        if found is None:  # the template cut the spelling; nothing to protect
            before += after
            continue
        parts += [PromptPart(before[:-1], literal=False), PromptPart(found[0], literal=True)]
        before = after[len(found[0]) - 1 :]
    parts.append(PromptPart(before, literal=False))
    return [part for part in parts if part.text]


def _place_in(contents: Sequence[str], boundary: CacheBoundary) -> tuple[int, int]:
    """A boundary as (message, characters of its content)."""
    at = boundary.characters
    return boundary.message, len(contents[boundary.message]) if at is None else at


def _private_places(contents: Sequence[str], shared: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """A place in every text behind the last shared boundary: in its middle, where templates do not look (they
    ask how a content begins and ends)."""
    first, start = shared
    for message in range(first, len(contents)):
        length = len(contents[message]) - start
        if length:
            yield message, start + (length + 1) // 2
        start = 0


def _before(mark: str, rendered: str, boundary: CacheBoundary, private: str) -> str:
    """What a template wrote before the mark of a boundary. `private` marks what follows the shared ones."""
    param = f"messages[{boundary.message}]"
    before, found, _ = rendered.partition(mark)
    if not found:
        raise RequestError(
            f"The model's chat template does not write the content of {param} as it is, so a boundary"
            " ('cache_control') in it has no place in the prompt; remove it.",
            param=param,
        )
    if boundary.shared and private in before:
        raise RequestError(
            f"The model's chat template writes later messages before the boundary in {param}, so they would"
            " be shared with it; leave out its 'scope'.",
            param=param,
        )
    return before


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
