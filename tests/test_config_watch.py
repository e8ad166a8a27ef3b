"""Reloads: by request and by change of the file, one at a time; what does not fit changes nothing."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stockpot.clock import VirtualClock
from stockpot.config_watch import ConfigWatch, print_of, unreloadable
from stockpot.errors import ConfigurationError
from stockpot.settings import Settings, load_settings

pytestmark = pytest.mark.anyio


class Applied:
    """What was put into force, by `resilience.retries`."""

    def __init__(self) -> None:
        self.retries: list[int] = []
        self.error: Exception | None = None
        self.running = self.most = 0

    async def __call__(self, settings: Settings) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        if self.error is not None:
            raise self.error
        self.retries.append(settings.resilience.retries)


@asynccontextmanager
async def watching(path: Path | None, load: Path, applied: Applied) -> AsyncGenerator[ConfigWatch]:
    watch = ConfigWatch(path, lambda: load_settings(load), applied, VirtualClock(7.0), poll_s=0.01)
    watch.start()
    try:
        yield watch
    finally:
        await watch.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  what is waited for has no event of its own
            await asyncio.sleep(0.005)


def written(path: Path, retries: int | str) -> Path:
    path.write_text(f"[resilience]\nretries = {retries}\n", encoding="utf-8")
    return path


async def test_a_request_reloads_what_has_not_changed(tmp_path: Path) -> None:
    file, applied = written(tmp_path / "a.toml", 3), Applied()
    async with watching(None, file, applied) as watch:
        for _ in range(5):
            watch.request()
        await until(lambda: watch.reloads >= 1)
        assert applied.retries == [3]
        assert watch.last_reload_s == 7.0
        watch.request()
        await until(lambda: watch.reloads == 2)
    assert applied.most == 1


async def test_a_changed_file_is_reloaded_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    file, applied = written(tmp_path / "a.toml", 3), Applied()
    async with watching(file, file, applied) as watch:
        await asyncio.sleep(0.1)
        assert watch.reloads == 0
        written(file, 10)
        await until(lambda: applied.retries == [10])
        # As editors do it: a new file takes the place of the old one.
        written(tmp_path / "b.toml", 5).replace(file)
        await until(lambda: applied.retries == [10, 5])


async def test_the_switched_link_of_kubernetes_is_followed(tmp_path: Path) -> None:
    for name, retries in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        written(tmp_path / name / "stockpot.toml", retries)
    (tmp_path / "..data").symlink_to("one")
    file = tmp_path / "stockpot.toml"
    file.symlink_to("..data/stockpot.toml")
    applied = Applied()
    async with watching(file, file, applied):
        (tmp_path / "..new").symlink_to("two")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await until(lambda: applied.retries == [2])


@pytest.mark.parametrize("content", ["retries = [", "[resilience]\nretries = 99\n", "[resiliense]\n", None])
async def test_what_does_not_fit_changes_nothing_and_says_why(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file, applied = written(tmp_path / "a.toml", 3), Applied()
    async with watching(file, file, applied) as watch:
        if content is None:
            file.unlink()
        else:
            file.write_text(content, encoding="utf-8")
        await until(lambda: watch.failures == 1)
        assert applied.retries == []
        assert watch.last_error is not None
        assert watch.last_error in caplog.text
        await asyncio.sleep(0.1)
        assert watch.failures == 1, "it is said once"
        written(file, 4)
        await until(lambda: applied.retries == [4])
        assert watch.last_error is None


@pytest.mark.parametrize("error", [ConfigurationError("routes lead in a circle"), ValueError("a bug")])
async def test_a_failure_to_apply_does_not_end_the_watch(tmp_path: Path, error: Exception) -> None:
    file, applied = written(tmp_path / "a.toml", 3), Applied()
    applied.error = error
    async with watching(file, file, applied) as watch:
        watch.request()
        await until(lambda: watch.failures == 1)
        assert str(error) in (watch.last_error or "")
        applied.error = None
        watch.request()
        await until(lambda: watch.reloads == 1)
        assert watch.last_error is None


async def test_a_stop_lets_a_reload_end(tmp_path: Path) -> None:
    file, begun, go, done = written(tmp_path / "a.toml", 3), asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def apply(settings: Settings) -> None:
        del settings
        begun.set()
        await go.wait()
        done.set()

    watch = ConfigWatch(None, lambda: load_settings(file), apply, VirtualClock())
    watch.start()
    watch.request()
    await begun.wait()
    stopping = asyncio.create_task(watch.stop())
    await asyncio.sleep(0)
    go.set()
    await stopping
    assert done.is_set()
    await watch.stop()


async def test_a_touched_file_is_read_again(tmp_path: Path) -> None:
    file, applied = written(tmp_path / "a.toml", 3), Applied()
    async with watching(file, file, applied):
        os.utime(file, (1, 1))
        await until(lambda: applied.retries == [3])


async def test_a_change_while_the_server_started_is_seen(tmp_path: Path) -> None:
    file, applied = written(tmp_path / "a.toml", 3), Applied()
    since = print_of(file)
    written(file, 10)
    watch = ConfigWatch(file, lambda: load_settings(file), applied, VirtualClock(), poll_s=0.01, since=since)
    watch.start()
    await until(lambda: applied.retries == [10])
    await watch.stop()


async def test_what_needs_a_restart_is_named() -> None:
    old = Settings()
    new = Settings.model_validate(
        {
            "server": {"port": 9},
            "cache": {"disk": {"capacity_bytes": 5}, "secret": "0123456789abcdef"},
            "engine": {"hardware": {"usd_per_hour": 1, "prefill_tokens_per_s": 1, "decode_tokens_per_s": 1}},
            "data_dir": "/elsewhere",
            "routing": {"policy": "session"},
            "backends": {"a": {"url": "http://a/v1"}},
            "teams": {"a": {}},
        }
    )
    assert unreloadable(old, new) == [
        "server.port",
        "engine.hardware",
        "cache.secret",
        "cache.disk.capacity_bytes",
        "data_dir",
    ]
    assert unreloadable(new, new) == []


@pytest.mark.parametrize("left", [b" \n", None])
async def test_an_empty_or_vanished_file_is_not_a_change_to_the_defaults(
    tmp_path: Path, left: bytes | None
) -> None:
    file, applied = written(tmp_path / "a.toml", 3), Applied()
    async with watching(file, file, applied) as watch:
        if left is None:
            file.unlink()
        else:
            file.write_bytes(left)
        await until(lambda: watch.failures >= 1)
        assert watch.last_error
    assert not applied.retries
