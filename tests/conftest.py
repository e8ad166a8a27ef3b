"""Fixtures for all tests: the async backend, and the real model on the library users get."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from stockpot.engine.driver import Driver
from stockpot.runtime import open_driver_for
from stockpot.settings import Settings, load_settings

# How long an example takes says nothing here: machines are shared.
settings.register_profile("stockpot", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("stockpot")


@pytest.fixture(scope="session", autouse=True)
def nothing_on_disk() -> Iterator[None]:
    """Servers of tests keep no blocks in the user's folder, where the next would find them. Tests of the disk
    tier name folders of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STOCKPOT_CACHE__DISK__CAPACITY_BYTES", "0")
        yield


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the server does."""
    return "asyncio"


@pytest.fixture(scope="session")
def user_settings() -> Settings:
    """Settings as a fresh user has them; the model is kept in the user's cache, and fetched once."""
    return load_settings(Path(__file__).parent / "empty.toml")


@pytest.fixture(scope="session")
def real_driver(user_settings: Settings) -> Iterator[Driver]:
    """The default model, one context for the whole session: a test leaves it empty or clears it first."""
    driver = open_driver_for(user_settings)
    yield driver
    driver.close()
