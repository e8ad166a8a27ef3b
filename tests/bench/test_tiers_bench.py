"""The benchmarks of tiers, faults and the soak: real tiers in real processes around a tiny model."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from stockpot.bench.bandwidth import Bandwidth, disk_bandwidth, drop_page_cache, redis_bandwidth
from stockpot.bench.faults import FAULTS, FaultsPlan, measure_faults
from stockpot.bench.redis_process import private_redis, slow_proxy
from stockpot.bench.results import write_result
from stockpot.bench.server import RunningServer, ServerCommand, running_server, stockpot_command
from stockpot.bench.soak import SoakPlan, measure_soak
from stockpot.bench.stockpot_server import Launch, StockpotServer, client_of
from stockpot.bench.tiers import CASES, TiersPlan, measure_tiers
from stockpot.cli import bench
from stockpot.clock import SystemClock
from stockpot.errors import ServerUnreachable
from stockpot.kv.redis_connection import RedisOptions, open_connection
from stockpot.kv.resp import RedisFailure

pytestmark = pytest.mark.anyio

_FROM_DISK_OR_REDIS = ("disk", "redis", "restart")

# A token costs half a millisecond, so that loading a prefix is worth it, as with a real model.
_PROCESS = """
import asyncio, sys
from pathlib import Path
from stockpot.backends.embedded import EmbeddedBackend
from stockpot.clock import SystemClock
from stockpot.engine.core import EngineLimits
from stockpot.engine.fake_driver import FakeDriver
from stockpot.kv.block import Namespace
from stockpot.kv.cache import CacheLimits, CacheObservers
from stockpot.kv.service import open_cache
from stockpot.settings import load_settings
from stockpot.telemetry.metrics import Metrics
from stockpot.wire.app import create_app
from stockpot.wire.server import Server, listen

async def main():
    settings = load_settings(Path(sys.argv[2]))
    driver = FakeDriver(cells=16_384, token_cost_s=0.0005)
    ram_bytes = settings.cache.ram_bytes or 2**24
    cache = open_cache(
        settings.cache,
        Namespace(driver.facts.fingerprint, driver.facts.layout),
        CacheLimits(block_tokens=64, ram_bytes=ram_bytes, served_names=frozenset({"fake"})),
        folder=settings.cache_dir,
        clock=SystemClock(),
        observers=CacheObservers(),
    )
    backend = EmbeddedBackend(
        driver,
        EngineLimits(block_tokens=64, ram_bytes=ram_bytes),
        served_name="fake",
        details={"weights_bytes": 0},
        cache=cache,
    )
    await backend.start()
    app = create_app(backend, settings, Metrics(backend.engine_stats))
    await Server(app, backend, drain_s=1).serve([listen("127.0.0.1", int(sys.argv[1]))])
    await backend.stop(drain=False)

asyncio.run(main())
"""


@pytest.fixture
def tiered(tmp_path: Path) -> Launch:
    """In place of `stockpot_server`: a process with the tiers that the settings name."""

    @asynccontextmanager
    async def start(settings: Mapping[str, Mapping[str, object]]) -> AsyncGenerator[StockpotServer]:
        async with running_server(_command(settings, tmp_path)) as running:
            yield await client_of(running)

    return start


def _command(settings: Mapping[str, Mapping[str, object]], folder: Path) -> ServerCommand:
    command = stockpot_command(settings)
    config = folder / "empty.toml"
    config.touch()
    return replace(
        command,
        arguments=(sys.executable, "-c", _PROCESS, str(command.port), str(config)),
        environment={**command.environment, "STOCKPOT_CACHE_DIR": str(folder / "cache")},
    )


async def test_every_tier_answers_and_says_so(tiered: Launch, tmp_path: Path) -> None:
    plan = TiersPlan(rounds=1, system_tokens=800, answer_tokens=2, disk_folder=tmp_path)
    result = await measure_tiers(plan, launch=tiered)
    assert tuple(row[0] for row in result.tables[0].rows) == CASES
    readings = {reading["case"]: reading for reading in result.figures["readings"]}
    assert {case: reading["void"] for case, reading in readings.items()} == dict.fromkeys(CASES, "")
    assert all(readings[case]["cached_tokens"] >= 760 for case in ("context", "ram", *_FROM_DISK_OR_REDIS))
    assert all(readings[case]["moved_bytes"] > 0 for case in _FROM_DISK_OR_REDIS)
    assert all(readings[case]["floor_s"] > 0 for case in _FROM_DISK_OR_REDIS)
    assert all(verdict.value is not None for verdict in result.verdicts)
    write_result(result, tmp_path / "out")
    assert (tmp_path / "out" / "result-2.csv").read_text().count("\n") == len(CASES) + 1


async def test_a_tier_that_did_not_answer_was_not_measured(tiered: Launch) -> None:
    """What was computed must not pass for what was read, however fast it was."""

    def alone(settings: Mapping[str, Mapping[str, object]]) -> dict[str, Mapping[str, object]]:
        kept = {key: value for key, value in settings["cache"].items() if key not in ("disk", "redis")}
        return {**settings, "cache": kept}

    result = await measure_tiers(
        TiersPlan(rounds=1, system_tokens=300, answer_tokens=2),
        launch=lambda settings: tiered(alone(settings)),
    )
    void = {reading["case"] for reading in result.figures["readings"] if reading["void"]}
    assert void == set(_FROM_DISK_OR_REDIS)
    values = {verdict.what: verdict.value for verdict in result.verdicts}
    assert values["TTFT from disk over RAM"] is None
    assert values["TTFT from Redis over RAM"] is None
    assert values["TTFT of ram over cold"] is not None
    assert not result.passed
    assert sum(note.startswith("VOID") for note in result.notes) == len(void)


async def test_no_request_fails_for_a_redis_in_trouble(tiered: Launch, tmp_path: Path) -> None:
    plan = FaultsPlan(rounds=1, requests=3, prompt_tokens=60, answer_tokens=2)
    result = await measure_faults(plan, launch=tiered)
    assert [row[:3] for row in result.tables[0].rows] == [(fault, 3, 0) for fault in FAULTS]
    readings = result.figures["readings"]
    noticed = {reading["fault"] for reading in readings if reading["state"] != "up"}
    assert noticed >= {"stopped", "paused", "slow"}
    assert all(reading["ttft_s"] > 0 and reading["without_redis_s"] > 0 for reading in readings)
    assert result.verdicts[0].what == "failed requests"
    assert result.verdicts[0].met
    write_result(result, tmp_path)
    assert (tmp_path / "chart.png").exists()


async def test_the_soak_uses_every_tier(tiered: Launch, tmp_path: Path) -> None:
    plan = SoakPlan(minutes=0.1, users=3, ram_bytes=2**16, disk_bytes=2**18)
    result = await measure_soak(plan, launch=tiered)
    verdicts = {verdict.what: verdict for verdict in result.verdicts}
    assert verdicts["errors"].met, result.notes
    assert result.figures["requests"]["turn"] > 0
    assert 0 < result.figures["hit_ratio"] < 1
    assert result.figures["share_of_prompt_tokens_by_tier"]["disk"] > 0
    assert result.figures["evicted_blocks"]["ram"]["capacity"] > 0
    assert result.tables[0].columns[:3] == ("second", "RSS MiB", "hit ratio")
    write_result(result, tmp_path)
    assert (tmp_path / "result.csv").exists()


async def test_a_killed_server_is_gone_and_another_may_follow(process_command: ServerCommand) -> None:
    async with running_server(process_command) as running:
        await running.kill()
        assert running.rss_bytes() == 0
        await running.kill()  # idempotent
    async with running_server(process_command) as again:
        assert again.pid != running.pid
        assert (await client_of(again)).client.model == "fake"


async def test_only_what_was_started_here_is_killed(url: str) -> None:
    with pytest.raises(ValueError, match="not started here"):
        await RunningServer(url, 1).kill()


def test_the_disk_tier_is_off_unless_the_settings_say_otherwise(tmp_path: Path) -> None:
    name = "STOCKPOT_CACHE__DISK__CAPACITY_BYTES"
    assert stockpot_command({"cache": {"enabled": True}}).environment[name] == "0"
    disk = {"path": tmp_path, "capacity_bytes": 5}
    environment = stockpot_command({"cache": {"disk": disk, "redis": {"url": "redis://x"}}}).environment
    assert environment == {
        "STOCKPOT_CACHE__DISK__PATH": str(tmp_path),
        name: "5",
        "STOCKPOT_CACHE__REDIS__URL": "redis://x",
    }


async def test_a_wait_for_what_never_comes_ends(url: str) -> None:
    server = await client_of(RunningServer(url, 1))
    with pytest.raises(ServerUnreachable, match="did not get to a miracle within"):
        await server.wait_until("a miracle", lambda _: False, timeout_s=0)


async def test_a_private_redis_comes_back_empty_on_its_port() -> None:
    async with private_redis() as redis:
        port = redis.port
        assert await asyncio.to_thread(redis.ask, (b"SET", b"key", b"value" * 100)) == ["OK"]
        assert redis_bandwidth(redis).moved_bytes == 500
        redis.stop()
        redis.stop()
        with pytest.raises(RedisFailure):
            await asyncio.to_thread(redis.ask, (b"PING",))
        await redis.start()
        assert (redis.port, await asyncio.to_thread(redis.ask, (b"DBSIZE",))) == (port, [0])
        assert redis_bandwidth(redis).floor_s(1) is None


async def test_a_slow_proxy_holds_answers_back() -> None:
    async with private_redis() as redis, slow_proxy(redis.port) as proxy:

        def ask(timeout_s: float) -> list[object]:
            connection = open_connection(
                RedisOptions(proxy.url), clock=SystemClock(), timeout_s=timeout_s, connect_timeout_s=timeout_s
            )
            try:
                return list(connection.exchange([(b"DBSIZE",)]))
            finally:
                connection.close()

        assert await asyncio.to_thread(ask, 20) == [0]
        proxy.delay_s = 3600.0
        with pytest.raises(RedisFailure) as failure:
            await asyncio.to_thread(ask, 0.1)
        assert failure.value.cause == "timeout"
        proxy.delay_s = 0.0
        redis.stop()
        with pytest.raises(RedisFailure):
            await asyncio.to_thread(ask, 20)


async def test_without_redis_there_is_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerUnreachable, match="install the package redis-server"):
        async with private_redis():
            pass


def test_bandwidth_counts_what_was_moved(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.kv").write_bytes(b"x" * 100_000)
    (tmp_path / "lock").write_bytes(b"not a block")
    assert 0 <= drop_page_cache(tmp_path) <= 1
    assert disk_bandwidth(tmp_path).moved_bytes == 300_000
    assert Bandwidth(100, 2.0).floor_s(50) == 1.0
    assert Bandwidth(0, 2.0).floor_s(50) is None
    assert drop_page_cache(tmp_path / "nothing") == 0


@pytest.fixture
def app() -> Iterator[typer.Typer]:
    app = typer.Typer()
    app.callback()(lambda: None)
    bench.register(app)
    yield app


@pytest.mark.parametrize("name", ["tiers", "faults", "soak", "eviction"])
def test_help_says_what_is_measured(app: typer.Typer, name: str) -> None:
    assert name in CliRunner().invoke(app, ["bench", "--help"]).output
    result = CliRunner().invoke(app, ["bench", name, "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    assert "--quick" in result.output
    assert "--out" in result.output
