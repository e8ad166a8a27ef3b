"""A backend as the gateway knows it: its name, its settings, and the backend itself."""

from __future__ import annotations

from dataclasses import dataclass

from stockpot.backends.backend import Backend
from stockpot.settings_gateway import BackendSettings


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One backend behind the gateway; `settings` None: the engine in this process."""

    name: str
    backend: Backend
    settings: BackendSettings | None

    def serves(self, model: str) -> bool:
        return any(card.id == model for card in self.backend.models())
