"""Real engines: vLLM workers, llama-server, and `stockpot serve` before them.

These tests are collected only where their folder is named (`make test-fleet`): the engines take gigabytes and
minutes, and no other test needs them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from tests.fleet.official import official

from stockpot.bench.fleet_servers import SmallServer, VllmWorkers, Worker, running_gateway, running_workers
from stockpot.bench.progress import silent
from stockpot.settings import Settings

FOLDER = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave all of this out unless the command line names it."""
    del collection_path
    call = config.invocation_params
    named = ((call.dir / str(argument).split("::")[0]).resolve() for argument in call.args)
    return None if any(path.is_relative_to(FOLDER) for path in named) else True


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One event loop for all: the servers outlive a test."""
    return "asyncio"


@pytest.fixture(scope="session")
def vllm(user_settings: Settings) -> VllmWorkers:
    """Installed in the user's cache, once."""
    workers = VllmWorkers(user_settings.cache_dir)
    workers.prepare(silent)
    return workers


@pytest.fixture(scope="session")
async def workers(vllm: VllmWorkers) -> AsyncIterator[tuple[Worker, ...]]:
    """Two vLLM workers of the same model."""
    async with running_workers(vllm, count=2, progress=silent) as running:
        yield running


@pytest.fixture(scope="session")
async def llama(user_settings: Settings) -> AsyncIterator[Worker]:
    """llama-server, built in the user's cache, once."""
    server = SmallServer(user_settings.cache_dir)
    server.prepare(silent)
    async with server.worker() as running:
        yield running


@pytest.fixture(scope="module")
async def gateway(
    workers: tuple[Worker, ...], llama: Worker, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[str]:
    """The address of a gateway to all of them."""
    folder = tmp_path_factory.mktemp("gateway")
    async with running_gateway((*workers, llama), folder) as running:
        yield running.url


@pytest.fixture
async def client(gateway: str) -> AsyncIterator[AsyncOpenAI]:
    """A client of that gateway."""
    async with official(gateway) as client:
        yield client
