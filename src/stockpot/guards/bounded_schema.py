"""JSON Schema whose work is counted: past a bound nothing is decided, and nothing waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import regex

STEPS_MAX = 20_000
"""Of one check: a keyword applied to a value is a step, what it walks over counts besides. Some ten
microseconds each."""

SCHEMA_SIZE_MAX = 100_000
"""Of a schema that is not the operator's: its values, names and every hundred characters of them."""

_MATCH_TIMEOUT_S = 1.0

_EACH = frozenset(
    {"items", "prefixItems", "additionalItems", "contains", "propertyNames", "additionalProperties"}
    | {"patternProperties", "unevaluatedItems", "unevaluatedProperties"}
)
"""Keywords that look at every member of a value."""

_UNCHECKED = frozenset(
    {"pattern", "patternProperties", "unevaluatedItems", "unevaluatedProperties", "$dynamicRef"}
)

Keyword = Callable[[Any, Any, Any, Any], "Iterable[Any] | None"]


class CannotBeChecked(Exception):
    """The work is more than the bound, or the schema is none."""


class BoundedSchema:
    """A validator of one schema that fetches nothing. It may be used in several threads at once.

    Of a schema that is not `trusted` (a client's) expressions are left alone, which can take exponential
    time, and what depends on them or walks through the schema uncounted."""

    def __init__(self, schema: Mapping[str, Any] | bool, *, trusted: bool) -> None:
        """Raises CannotBeChecked."""
        from jsonschema import validators
        from referencing import Registry

        names = set[str]()
        self._size = size_of(schema, None if trusted else SCHEMA_SIZE_MAX, names)
        library: Any = validators
        self._here = threading.local()
        try:
            kind = library.validator_for(schema)
            keywords: dict[str, Keyword] = {**kind.VALIDATORS, "uniqueItems": _unique}
            if trusted:
                keywords["pattern"] = _pattern
            else:
                unchecked = set(_UNCHECKED)
                if "patternProperties" in names:  # their expressions say which properties are additional
                    unchecked.add("additionalProperties")
                keywords |= dict.fromkeys(unchecked & keywords.keys(), _nothing)
            counted = {name: partial(self._counted, name, check) for name, check in keywords.items()}
            self._validator: Any = library.extend(kind, counted)(schema, registry=cast(Any, Registry)())
        except Exception as error:
            raise CannotBeChecked(f"{type(error).__name__}: {error}") from error

    def error(self, value: object, *, steps: int = STEPS_MAX) -> Any | None:
        """The first jsonschema ValidationError of a value; None: it satisfies the schema. Raises
        CannotBeChecked. Meant for a thread of its own."""
        self._here.left, self._here.weights = steps, dict[int, int]()
        try:
            return next(iter(self._validator.iter_errors(value)), None)
        except CannotBeChecked:
            raise
        except Exception as error:
            # The schema may be anything a client thought of: whatever it makes the library raise
            # (RecursionError, TypeError, Unresolvable, ...), it has decided nothing.
            raise CannotBeChecked(f"{type(error).__name__}: {error}"[:200]) from error
        finally:
            self._here.weights = {}

    def _counted(  # noqa: PLR0917  the library calls it with these
        self, name: str, check: Keyword, validator: Any, argument: Any, instance: Any, schema: Any
    ) -> Iterator[Any]:
        self._spend(1 + self._walked(name, argument, instance))
        for error in check(validator, argument, instance, schema) or ():
            # A message quotes the value, however large that is.
            self._spend(len(error.message) // 100)
            yield error

    def _walked(self, name: str, argument: Any, instance: Any) -> int:
        """Steps for what a keyword does itself, beside the keywords below it."""
        if name in ("enum", "const"):
            return self._weight(argument) // 4
        if name == "uniqueItems":
            return self._weight(instance) // 4 if isinstance(instance, list) else 0
        if name in ("$ref", "$dynamicRef", "$recursiveRef"):
            is_local = isinstance(argument, str) and (argument == "#" or argument.startswith("#/"))
            return len(argument) // 100 if is_local else self._size // 2
        walked = len(cast(Any, argument)) // 4 if isinstance(argument, dict | list) else 0
        if name in _EACH and isinstance(instance, dict | list):
            walked += len(cast(Any, instance))
        return walked

    def _weight(self, value: Any) -> int:
        """The size of a part of the schema or value, which stays alive and so keeps its id during a check."""
        weights = self._here.weights
        if id(value) not in weights:
            weights[id(value)] = size_of(value, 4 * STEPS_MAX, set())
        return weights[id(value)]

    def _spend(self, steps: int) -> None:
        self._here.left -= steps
        if self._here.left < 0:
            raise CannotBeChecked("it takes too many steps")


def size_of(value: object, most: int | None, names: set[str]) -> int:
    """How large a JSON value is: its values, names and every hundred characters. The names of its fields are
    added to `names`. Raises CannotBeChecked above `most`."""
    size = 0
    waiting: list[object] = [value]
    while waiting:
        each = waiting.pop()
        size += 1
        if isinstance(each, str):
            size += len(each) // 100
        elif isinstance(each, Mapping):
            fields = cast(Mapping[str, object], each)
            size += len(fields) + sum(len(name) for name in fields) // 100
            names.update(fields)
            waiting.extend(fields.values())
        elif isinstance(each, list | tuple):
            waiting.extend(cast(Iterable[object], each))
        if most is not None and size + len(waiting) > most:
            raise CannotBeChecked(f"it is larger than {most:,} values")
    return size


def _nothing(*_: object) -> tuple[()]:
    return ()


def _unique(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """`uniqueItems` in time linear in the size: the library compares every pair of what cannot be sorted."""
    from jsonschema.exceptions import ValidationError

    del validator, schema
    if not wanted or not isinstance(instance, list):
        return
    seen = set[object]()
    for each in cast(list[object], instance):
        key = _hashable(each)
        if key in seen:
            yield ValidationError("the items are not unique")
            return
        seen.add(key)


def _hashable(value: object) -> object:
    """Equal for equal JSON values: 1 is 1.0, and true is not 1."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, object], value)
        return frozenset((name, _hashable(each)) for name, each in fields.items())
    if isinstance(value, list):
        return ("list", *(_hashable(each) for each in cast(list[object], value)))
    return value


def _pattern(validator: Any, pattern: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """`pattern` without holding the interpreter, and given up after a time."""
    from jsonschema.exceptions import ValidationError

    del validator, schema
    if not isinstance(instance, str):
        return
    try:
        found = regex.search(pattern, instance, timeout=_MATCH_TIMEOUT_S, concurrent=True)
    except TimeoutError as error:
        raise CannotBeChecked("an expression takes too long") from error
    if not found:
        yield ValidationError("the text does not match")
