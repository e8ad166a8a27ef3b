"""What is wrong with settings that do not fit: each mistake by the path of its field, with what to write."""

from __future__ import annotations

import os
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

LISTED_MAX = 12


@dataclass(frozen=True, slots=True)
class Problem:
    """`path` is dotted, as in the file (`routes.chat.targets.0.model`). The message never holds a value that
    may be a secret."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


def problems(error: ValidationError, settings: type[BaseModel]) -> list[Problem]:
    """All mistakes a validation found, in the order of their paths."""
    found: list[Problem] = []
    details = error.errors(include_url=False)
    places = [tuple(detail["loc"]) for detail in details]
    for detail, place in zip(details, places, strict=True):
        if detail["type"] == "too_short" and any(other[: len(place)] == place != other for other in places):
            continue  # its items are wrong, and so it seems to have too few
        path = tuple(part for part in place if part != "[key]")
        context: Mapping[str, Any] = detail.get("ctx", {})
        match detail["type"]:
            case "extra_forbidden":
                known = names(_type_at(settings, path[:-1]))
                message = f"there is no such setting{nearest(str(path[-1]), known, listed=True)}"
            case "missing":
                message = "is needed here and is not given"
            case "literal_error":
                # The only values repeated here: where there is a choice of words, there is no secret.
                words = re.findall(r"'([^']*)'", str(context.get("expected")))
                message = f"{detail['input']!r} is none of {', '.join(words)}"
                if isinstance(detail["input"], str):
                    message += nearest(detail["input"], words)
            case "string_pattern_mismatch" if place[-1:] == ("[key]",):
                message = (
                    f"{path[-1]!r} cannot be a name: use lower-case letters, digits and - or _, and begin"
                    f" with a letter or a digit (it must match {context.get('pattern')})"
                )
            case _:
                message = detail["msg"].removeprefix("Value error, ")
                message = message[:1].lower() + message[1:]
        found.append(Problem(".".join(map(str, path)) or "settings", message))
    return sorted(found, key=lambda each: each.path)


def nearest(name: str, known: Iterable[str], *, listed: bool = False) -> str:
    """The end of a sentence: which known name was probably meant, or (`listed`) which there are."""
    names = sorted(known)
    # Compared without case: names of models differ in it, and that is the commonest mistake.
    folded = {each.casefold(): each for each in reversed(names)}
    if close := get_close_matches(name.casefold(), folded, n=1, cutoff=0.7):
        return f"; did you mean {folded[close[0]]!r}?"
    if not listed or not names:
        return ""
    more = f" and {len(names) - LISTED_MAX} more" if len(names) > LISTED_MAX else ""
    return f"; there are {', '.join(names[:LISTED_MAX])}{more}"


def names(section: object) -> list[str]:
    """What can be set in a section, as it is written in a file; of what is no section, nothing."""
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    return [field.alias or name for name, field in section.model_fields.items()]


def unknown_variables(settings: type[BaseModel], prefix: str, beside: Iterable[str]) -> list[str]:
    """Sentences about variables of the environment that look like settings and set nothing. `beside` are
    others that begin with `prefix` and mean something."""
    sections = {f"{prefix}{name}".upper(): name for name in names(settings)}
    known = {each.upper() for each in beside} | set(sections)
    return [
        f"The environment variable {variable} sets nothing: there is no section or setting of this name"
        f"{nearest(variable.upper().partition('__')[0], known)}"
        for variable in sorted(os.environ)
        if variable.upper().startswith(prefix) and variable.upper().partition("__")[0] not in known
    ]


def _type_at(root: Any, path: tuple[str | int, ...]) -> Any:
    """The type that stands at a path of the settings; None where there is none."""
    here = _bare(root)
    for part in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            fields = {field.alias or name: field for name, field in here.model_fields.items()}
            field = fields.get(str(part))
            here = None if field is None else _bare(field.annotation)
        else:  # dict[name, section] or tuple[section, ...]
            arguments = get_args(here)
            here = _bare(arguments[0 if isinstance(part, int) else -1]) if arguments else None
    return here


def _bare(kind: Any) -> Any:
    """Without Annotated and without `| None`."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return next((_bare(each) for each in get_args(kind) if each is not type(None)), None)
    return kind
