"""Makes the backend a section of the settings describes."""

from __future__ import annotations

from stockpot.backends.anthropic import AnthropicBackend
from stockpot.backends.backend import Backend
from stockpot.backends.openai_compatible import OpenAIBackend
from stockpot.clock import Clock
from stockpot.settings_gateway import BackendSettings


def open_remote(name: str, settings: BackendSettings, *, clock: Clock) -> Backend:
    """A backend that is not started yet; connects to nothing."""
    kind = AnthropicBackend if settings.kind == "anthropic" else OpenAIBackend
    return kind(name, settings, clock=clock)
