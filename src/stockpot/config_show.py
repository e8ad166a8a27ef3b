"""The effective settings, each value with where it came from; of secrets no more than their reference."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, SecretStr
from pydantic_settings import EnvSettingsSource

from stockpot.settings import Settings

HIDDEN = "********"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_URL_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):(\S*)@")
_URL_QUERY = re.compile(r"(?i)([?&][^=&\s]*(?:key|token|secret|password|sig)[^=&\s]*=)[^&\s]*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}://")
_REFERENCE = re.compile(r"(?:env|file):.")


@dataclass(frozen=True, slots=True)
class Value:
    """One setting as it is in force. `shown` is plain data without secrets; `source` is "file", "default" or
    the name of an environment variable."""

    path: tuple[str, ...]
    shown: Any
    source: str


class Sources:
    """What the file and the environment say, before it is validated."""

    def __init__(self, file: Path | None) -> None:
        """`file` is one that `load_settings` could read."""
        self.file = file
        self._file: Mapping[str, Any] = {}
        if file is not None:
            self._file = tomllib.loads(file.read_text(encoding="utf-8"))
        self._environment: Mapping[str, Any] = EnvSettingsSource(Settings)()

    def source(self, path: tuple[str, ...]) -> tuple[str, Any]:
        """Where the value at a path came from, and what was written there (a reference, for secrets)."""
        given, raw = _given(self._environment, path)
        if given:
            return _variable(path), raw
        given, raw = _given(self._file, path)
        return ("file", raw) if given else ("default", None)

    def variables(self) -> set[str]:
        """The environment variables secrets refer to (`env:NAME`)."""
        texts = (*_texts(self._file), *_texts(self._environment))
        return {text.removeprefix("env:") for text in texts if text.startswith("env:")}


def values(settings: Settings, sources: Sources) -> list[Value]:
    """All settings, those of one section together, sections after the values beside them."""
    found: list[Value] = []
    for path, value in _leaves(settings, ()):
        source, raw = sources.source(path)
        is_reference = isinstance(value, SecretStr) and isinstance(raw, str) and _REFERENCE.match(raw)
        found.append(Value(path, raw if is_reference else _plain(value), source))
    return found


def as_toml(settings: Sequence[Value]) -> str:
    """TOML that sets the same (but for secrets that are not references), with sources as comments."""
    lines: list[str] = []
    sections: dict[tuple[str, ...], list[Value]] = {}
    for value in settings:
        sections.setdefault(value.path[:-1], []).append(value)
    for section in sorted(sections, key=bool):  # what stands in no section comes first
        if section:
            lines += ["", f"[{'.'.join(map(_key, section))}]"]
        for value in sections[section]:
            name = _key(value.path[-1])
            # TOML has no null: what is not set is shown as a comment.
            setting = f"# {name} is not set" if value.shown is None else f"{name} = {_toml(value.shown)}"
            lines.append(f"{setting}  # {value.source}")
    return "\n".join(lines).lstrip("\n")


def as_json(settings: Sequence[Value]) -> str:
    """`settings` as a tree, and `sources` by dotted path."""
    tree: dict[str, Any] = {}
    for value in settings:
        section = tree
        for part in value.path[:-1]:
            section = section.setdefault(part, {})
        section[value.path[-1]] = value.shown
    sources = {".".join(value.path): value.source for value in settings}
    return json.dumps({"settings": tree, "sources": sources}, indent=2, ensure_ascii=False)


def _leaves(value: object, path: tuple[str, ...]) -> Generator[tuple[tuple[str, ...], object]]:
    """Every value that is no section, values of a section before the sections in it."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        entries = [(field.alias or name, getattr(value, name)) for name, field in fields.items()]
    else:
        entries = [(str(key), each) for key, each in cast(Mapping[object, object], value).items()]
    for name, each in entries:
        if not isinstance(each, BaseModel | Mapping):
            yield (*path, name), each
    for name, each in entries:
        if isinstance(each, BaseModel | Mapping):
            yield from _leaves(cast(object, each), (*path, name))


def _plain(value: object) -> Any:
    """As JSON knows it, without secrets. Of sections in a list, what is not the default."""
    match value:
        case SecretStr():
            # What kind of store it is, say, is no secret, and a setting may be none without it.
            scheme = _SCHEME.match(value.get_secret_value())
            plain: Any = HIDDEN if scheme is None else f"{scheme[0]}{HIDDEN}"
        case BaseModel():
            plain = {
                field.alias or name: _plain(getattr(value, name))
                for name, field in type(value).model_fields.items()
                if getattr(value, name) != field.default
            }
        case Mapping():
            plain = {str(key): _plain(each) for key, each in cast(Mapping[Any, object], value).items()}
        case tuple() | list() | frozenset():
            plain = [_plain(each) for each in cast(Sequence[object], value)]
        case Path():
            plain = str(value)
        case str():
            plain = _URL_QUERY.sub(rf"\1{HIDDEN}", _URL_PASSWORD.sub(rf"\1:{HIDDEN}@", value))
        case _:
            plain = value
    return plain


def _given(tree: Mapping[str, Any], path: tuple[str, ...]) -> tuple[bool, Any]:
    """Whether a tree says something about a path, and what. A value that stands for a whole section (a list
    of models, say) says it for all below."""
    here: Any = tree
    for part in path:
        if not isinstance(here, Mapping):
            return True, here
        section = cast(Mapping[str, Any], here)
        if part not in section:
            return False, None
        here = section[part]
    return True, here


def _variable(path: tuple[str, ...]) -> str:
    """The variable that set a path: its own, or that of a section around it."""
    variables = {name.upper(): name for name in os.environ}
    for length in range(len(path), 0, -1):
        name = f"STOCKPOT_{'__'.join(path[:length])}".upper()
        if name in variables:
            return variables[name]
    return "environment"


def _texts(tree: object) -> Generator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for each in cast(Mapping[str, object], tree).values():
            yield from _texts(each)
    elif isinstance(tree, list):
        for each in cast(list[object], tree):
            yield from _texts(each)


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _string(name)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list():
            return f"[{', '.join(_toml(each) for each in cast(list[Any], value))}]"
        case dict():
            entries = cast(dict[str, Any], value).items()
            inner = ", ".join(f"{_key(key)} = {_toml(each)}" for key, each in entries if each is not None)
            return f"{{ {inner} }}" if inner else "{}"
        case _:
            return _string(str(value))


def _string(text: str) -> str:
    """A basic string of TOML; JSON's escapes are all among its own, but DEL must be one, too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
