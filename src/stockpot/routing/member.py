"""A backend as the gateway knows it: its name, its settings, and the backend itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from stockpot.backends.backend import Backend, ModelCard
from stockpot.settings_gateway import BackendSettings


class _Names:
    """The names on a list of models, gathered when the backend gives another list."""

    __slots__ = ("_cards", "_names")

    def __init__(self) -> None:
        self._cards: tuple[ModelCard, ...] = ()
        self._names: frozenset[str] = frozenset()

    def of(self, cards: tuple[ModelCard, ...]) -> frozenset[str]:
        if cards is not self._cards:
            self._cards, self._names = cards, frozenset(card.id for card in cards)
        return self._names


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One backend behind the gateway; `settings` None: the engine in this process."""

    name: str
    backend: Backend
    settings: BackendSettings | None
    _names: _Names = field(default_factory=_Names, init=False, repr=False)

    def serves(self, model: str) -> bool:
        """Takes as long for hundreds of models as for one: it is asked with each request."""
        return model in self._names.of(self.backend.models())
