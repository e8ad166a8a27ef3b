"""The state of a task, apart from the conversation: a small tree of JSON values, told when it changes.

Rewriting a state in place breaks the prefix in each turn. Here the whole of it is told once, and then what
has changed, each time at the end of the prompt; the same state is always written the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from stockpot.context.canonical import canonical_json, in_order
from stockpot.errors import StockpotError


class StateError(StockpotError):
    """A path that leads nowhere."""


class State:
    """Values by dotted path (`plan.step`). Not for several threads."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        """Raises NotCanonical for what JSON has not."""
        self._values: dict[str, Any] = in_order(dict(values or {}))

    def get(self, path: str, default: Any = None) -> Any:
        """What stands there."""
        found: Any = self._values
        for name in path.split("."):
            if not isinstance(found, dict) or name not in found:
                return default
            found = cast("dict[str, Any]", found)[name]
        return in_order(found)

    def set(self, path: str, value: Any) -> None:
        """Put a JSON value there, in place of what is below. Raises NotCanonical; StateError where the path
        leads through a value that is no object."""
        *above, last = path.split(".")
        place = self._values
        for depth, name in enumerate(above):
            inner = place.setdefault(name, {})
            if not isinstance(inner, dict):
                through = ".".join(above[: depth + 1])
                raise StateError(f"{path!r} leads through {through!r}, which holds {inner!r:.60}; set that.")
            place = cast("dict[str, Any]", inner)
        place[last] = in_order(value)

    def delete(self, path: str) -> None:
        """Take it away. Raises StateError where nothing is."""
        *above, last = path.split(".")
        place: Any = self._values
        for name in above:
            place = cast("dict[str, Any]", place).get(name) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise StateError(f"The state has nothing at {path!r}.")
        del cast("dict[str, Any]", place)[last]

    def render(self) -> str:
        """All of it, in canonical JSON."""
        return canonical_json(self._values)

    def copy(self) -> State:
        """One that changes apart from this."""
        return State(self._values)

    def changes_since(self, told: State) -> dict[str, Any]:
        """The paths that have changed, with their new values; None for what is gone."""
        changes: dict[str, Any] = {}
        _compare(told._values, self._values, "", changes)
        return changes

    def __bool__(self) -> bool:
        return bool(self._values)


def told_text(state: State, told: State | None) -> str:
    """What a model is told of `state` when it knows `told` (None: nothing); "" if that is all."""
    if told is None:
        return f"<state>{state.render()}</state>" if state else ""
    changes = state.changes_since(told)
    return f"<state_change>{canonical_json(changes)}</state_change>" if changes else ""


def _compare(old: dict[str, Any], new: dict[str, Any], path: str, changes: dict[str, Any]) -> None:
    for name in sorted(old.keys() | new.keys()):
        here = f"{path}.{name}" if path else name
        before: Any = old.get(name)
        after: Any = new.get(name)
        if name not in new:
            changes[here] = None
        elif isinstance(before, dict) and isinstance(after, dict):
            _compare(cast("dict[str, Any]", before), cast("dict[str, Any]", after), here, changes)
        elif name not in old or canonical_json(cast("object", before)) != canonical_json(
            cast("object", after)
        ):
            changes[here] = after
