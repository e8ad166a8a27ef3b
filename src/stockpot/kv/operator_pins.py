"""Pins that operators set: prefixes that are kept in RAM for somebody, until some time."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stockpot.errors import RequestError
from stockpot.kv.prefix_tree import Match
from stockpot.kv.store import KVStore, Pin

MOST_PINS = 1024
MOST_SHARE = 0.8
"""Of RAM may be pinned: requests must find room as well."""


@dataclass(frozen=True, slots=True)
class OperatorPin:
    """One pin. `expires_s` is Unix time."""

    pin: Pin
    owner: str
    tokens: int
    size_bytes: int
    expires_s: float


class OperatorPins:
    """The pins of one store. They live as long as the process. On the engine's thread alone."""

    def __init__(self) -> None:
        self._pins: dict[str, OperatorPin] = {}

    def add(self, store: KVStore, match: Match, *, owner: str, expires_s: float) -> Mapping[str, Any]:
        """Pin what was matched. Raises RequestError where too much is pinned already."""
        size_bytes = sum(node.size_bytes for node in match.nodes)
        held = {node.id: node.size_bytes for each in self._pins.values() for node in each.pin.match.nodes}
        held.update({node.id: node.size_bytes for node in match.nodes})
        if len(self._pins) >= MOST_PINS or sum(held.values()) > MOST_SHARE * store.ram.capacity_bytes:
            raise RequestError(
                f"With this, {len(self._pins) + 1} pins would hold {sum(held.values()):,} bytes; at most "
                f"{MOST_SHARE:.0%} of RAM ({store.ram.capacity_bytes:,} bytes) and {MOST_PINS} pins may be. "
                "Unpin something, or give the server more RAM (cache.ram_bytes).",
                code="too_much_pinned",
            )
        pin = store.pin(match)
        if pin is None:
            raise RequestError("There is nothing to pin.", code="prefix_not_cached")
        name = secrets.token_hex(6)
        self._pins[name] = OperatorPin(pin, owner, match.tokens, size_bytes, expires_s)
        return self._listed(store, name)

    def remove(self, store: KVStore, name: str) -> bool:
        """Give a pin back; False for one that does not exist."""
        found = self._pins.pop(name, None)
        if found is None:
            return False
        store.unpin(found.pin)
        return True

    def expire(self, store: KVStore, now_s: float) -> None:
        """Give back those whose time has passed."""
        for name in [name for name, each in self._pins.items() if each.expires_s <= now_s]:
            self.remove(store, name)

    def listed(self, store: KVStore) -> list[Mapping[str, Any]]:
        """All pins, those that end first first."""
        return [
            self._listed(store, name)
            for name in sorted(self._pins, key=lambda each: self._pins[each].expires_s)
        ]

    def _listed(self, store: KVStore, name: str) -> Mapping[str, Any]:
        """A pin, and what of it is still there: an invalidation takes pinned blocks too."""
        each = self._pins[name]
        nodes = each.pin.match.nodes
        there = all(store.ram.get(node.id) is not None for node in nodes)
        return {
            "pin": name,
            "owner": each.owner,
            "tokens": each.tokens if there else 0,
            "bytes": each.size_bytes if there else 0,
            "expires_s": each.expires_s,
        }
