"""Reloads the settings when their file changes or somebody asks; what does not fit changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path

from pydantic import BaseModel

from stockpot.clock import Clock
from stockpot.errors import ConfigurationError, StockpotError
from stockpot.settings import Settings

LOG = logging.getLogger(__name__)

POLL_S = 1.0

RESTART_SECTIONS = (
    "server",
    "model",
    "engine",
    "cache",
    "cache_dir",
    "data_dir",
    "accounts",
    "allowances",
    "telemetry",
)
"""What is made once, when a server starts. Everything else can be replaced while it runs."""

_RECALL_PARTS = ("store", "capacity_bytes", "memory_bytes")
_SEMANTIC_PARTS = ("embedding_model", "index_url")
"""What the caches of answers open once."""

FilePrint = tuple[int, int, int, int] | None
"""What tells one content of a file from another without reading it; None: there is no file."""


class ConfigWatch:
    """Watches one file and reloads, one reload at a time.

    `load` reads and validates settings (it may block; it runs beside the event loop), `apply` puts them into
    force or raises and leaves everything as it was. Whatever either raises, the server goes on with what it
    had: the reason is logged and kept in `last_error` until a reload succeeds.

    The file is looked at each `poll_s` seconds, by its path: editors put a new file in its place, and
    Kubernetes turns a symbolic link of the folder. A change counts when two looks in a row see the same, so
    that a file is not read while it is being written. Files that settings refer to (secrets, word lists) are
    not watched: ask for a reload (SIGHUP) when they change.
    """

    def __init__(
        self,
        path: Path | None,
        load: Callable[[], Settings],
        apply: Callable[[Settings], Awaitable[None]],
        clock: Clock,
        *,
        poll_s: float = POLL_S,
        since: FilePrint = None,
    ) -> None:
        """`path` None: there is no file, and reloads happen only on request. `since` is how the file looked
        before the settings in force were read from it, None: as it looks at the start."""
        self._path = path
        self._load = load
        self._apply = apply
        self._clock = clock
        self._poll_s = poll_s
        self._since = since
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.reloads = 0
        """How many have succeeded."""
        self.failures = 0
        self.last_error: str | None = None
        """Why the settings in force are not those of the file; None: they are."""
        self.last_reload_s: float | None = None
        """When one last succeeded (Unix time)."""

    def start(self) -> None:
        """Watch from now on."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch(self._since or print_of(self._path)))

    async def stop(self) -> None:
        """A reload under way ends first. Harmless a second time."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    def request(self) -> None:
        """Reload soon, changed or not. On the event loop; several at once are one."""
        self._wanted.set()

    async def _watch(self, loaded: FilePrint) -> None:
        seen = loaded
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s if self._path is not None else None):
                    await self._wanted.wait()
            now = await asyncio.to_thread(print_of, self._path)
            if self._wanted.is_set() or (now == seen and now != loaded):
                # Cleared before the file is read: who asks from here on means a later content.
                self._wanted.clear()
                loaded = now
                await _to_its_end(self._reload())
            seen = now

    async def _reload(self) -> None:
        try:
            if self._path is not None and not self._path.read_bytes().strip():
                raise ConfigurationError("The file is empty, which would mean the defaults of everything.")
            settings = await asyncio.to_thread(self._load)
            await self._apply(settings)
        except StockpotError as error:
            self._failed(str(error))
        except OSError as error:
            self._failed(f"The configuration {self._path} cannot be read: {error.strerror}.")
        except Exception as error:
            # A mistake of ours in here must not end a server that works.
            self._failed(f"{type(error).__name__}: {error}")
            LOG.exception("the reload failed in a way it should not; please report it")
        else:
            self.reloads += 1
            self.last_error = None
            self.last_reload_s = self._clock.wall()
            LOG.info("settings reloaded from %s", self._path or "the environment")

    def _failed(self, why: str) -> None:
        self.failures += 1
        self.last_error = why
        LOG.error(
            "settings not reloaded, the old ones stay in force: %s Correct %s; `stockpot config check` tells"
            " whether it fits.",
            why,
            self._path or "the environment",
        )


def changed(old: Settings, new: Settings) -> list[str]:
    """Dotted names of all settings that differ."""
    return [name for section in Settings.model_fields for name in _differences(old, new, section)]


def unreloadable(old: Settings, new: Settings) -> list[str]:
    """Dotted names of settings that differ and that only a restart puts into force."""
    kept = reloadable(old, new)
    return [name for section in Settings.model_fields for name in _differences(kept, new, section)]


def reloadable(old: Settings, new: Settings) -> Settings:
    """`new` as far as it can be put into force while a server runs by `old`; the rest as it is in `old`."""
    kept: dict[str, object] = {name: getattr(old, name) for name in RESTART_SECTIONS}
    before, after = old.recall, new.recall
    if not before.enabled:
        kept["recall"] = before
    else:
        semantic = {name: getattr(before.semantic, name) for name in _SEMANTIC_PARTS}
        if before.semantic.mode == "off":
            semantic["mode"] = "off"
        parts = {name: getattr(before, name) for name in _RECALL_PARTS}
        kept["recall"] = after.model_copy(
            update={**parts, "semantic": after.semantic.model_copy(update=semantic)}
        )
    return new.model_copy(update=kept)


def _differences(old: Settings, new: Settings, section: str) -> Generator[str]:
    yield from _changed(getattr(old, section), getattr(new, section), section)


def _changed(old: object, new: object, path: str) -> Generator[str]:
    if isinstance(old, BaseModel) and type(old) is type(new):
        for name, field in type(old).model_fields.items():
            yield from _changed(getattr(old, name), getattr(new, name), f"{path}.{field.alias or name}")
    elif old != new:
        yield path


def print_of(path: Path | None) -> FilePrint:
    """How a file looks now, whatever links lead to it."""
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)


async def _to_its_end(work: Awaitable[None]) -> None:
    """Settings are not left half applied by a stop in between: it takes effect when `work` is done."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
