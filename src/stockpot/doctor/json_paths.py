"""The path of the value that differs, into JSON that stands in a leaf."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from stockpot.doctor.divergence import Break


def path_within(found: Break, path: str) -> str:
    """`path`, and as far into the leaf as both versions have the same keys in the same order."""
    if found.earlier is None or found.later is None or found.later.kind != "json":
        return path
    try:
        one, other = (msgspec.json.decode(leaf.text) for leaf in (found.earlier, found.later))
    except msgspec.MsgspecError:
        return path
    while (step := _step(one, other)) is not None:
        name, one, other = step
        path += name
    return path


def _step(one: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first member in which they differ; None where they differ as wholes."""
    if isinstance(one, dict) and isinstance(other, dict):
        members, others = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        if list(members) != list(others):
            return None
        pairs = [(f".{name}", members[name], others[name]) for name in members]
    elif isinstance(one, list) and isinstance(other, list):
        items = zip(cast("list[Any]", one), cast("list[Any]", other), strict=False)
        pairs = [(f"[{place}]", *each) for place, each in enumerate(items)]
    else:
        return None
    return next((each for each in pairs if _written(each[1]) != _written(each[2])), None)


def _written(value: Any) -> bytes:
    return msgspec.json.encode(value)
