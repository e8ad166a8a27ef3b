"""The composition root: the one place that knows all rooms and puts them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil

from stockpot.backends.embedded import EmbeddedBackend
from stockpot.clock import SystemClock
from stockpot.engine.core import EngineLimits
from stockpot.engine.driver import Driver, ModelFacts
from stockpot.engine.driver_thread import DriverThread
from stockpot.engine.llamacpp import BindingChoice, choose_binding, open_driver
from stockpot.engine.reports import EngineStats, Observer, Report, ReuseReport
from stockpot.errors import BindingUnavailable
from stockpot.kv.block import Namespace
from stockpot.kv.cache import CacheLimits, CacheObservers
from stockpot.kv.service import CacheService, open_cache
from stockpot.models.encoding import EncodedModel, ensure_encoded
from stockpot.models.gguf import read_facts
from stockpot.models.machine import usable_processors
from stockpot.models.progress import Progress
from stockpot.models.source import LocatedModel, locate
from stockpot.models.workbench import LibraryWorkbench
from stockpot.settings import Settings

DEFAULT_RAM_TIER_BYTES = 4 * 2**30


@dataclass
class ObserverList:
    """Hands reports to every observer of a list that may still grow until the backend starts."""

    observers: list[Observer] = field(default_factory=list[Observer])

    def observe(self, report: Report) -> None:
        for observer in self.observers:
            observer.observe(report)


@dataclass(frozen=True)
class PreparedModel:
    """The file to run and the library to run it with."""

    located: LocatedModel
    encoded: EncodedModel
    binding: BindingChoice
    threads: int


@dataclass(frozen=True)
class Runtime:
    """A model made ready and the backend around it (not started yet). Add observers before the start."""

    backend: EmbeddedBackend
    observers: list[Observer]
    facts: ModelFacts
    prepared: PreparedModel
    limits: EngineLimits
    cells: int
    cache: CacheService | None = None

    def engine_stats(self) -> EngineStats:
        """A snapshot of the engine's counts."""
        return self.backend.engine_stats()

    def close(self) -> None:
        """Free the model; after the backend has stopped."""
        self.backend.close()

    def banner_facts(self) -> Mapping[str, str]:
        """What a person wants to see when the server starts."""
        kv_bytes, prepared = self.facts.kv_bytes_per_token, self.prepared
        facts = {
            "model": f"{prepared.located.name} ({prepared.located.origin})",
            "encoding": f"{prepared.encoded.encoding} ({prepared.encoded.reason})",
            "library": prepared.binding.reason,
            "threads": str(prepared.threads),
            "context": f"{self.cells:,} tokens, {self.cells * kv_bytes / 2**20:,.0f} MiB of KV",
            "KV per token": f"{kv_bytes:,} bytes",
            "RAM tier": self._ram_tier(),
            **self._tiers_behind(),
        }
        if prepared.binding.name == "ik" and not prepared.binding.native:
            facts["hint"] = (
                "`stockpot engine build` compiles the library for this processor, once, in about five "
                "minutes: prefill becomes about twice as fast."
            )
        return facts

    def _tiers_behind(self) -> dict[str, str]:
        tiers = [slot.tier.stats() for slot in self.cache.cache.slots] if self.cache is not None else []
        return {
            f"{stats.name} tier": (
                f"{(stats.capacity_bytes or 0) / 2**30:.1f} GiB, {stats.blocks} blocks are there"
                if stats.name == "disk"
                else stats.state
            )
            for stats in tiers
        }

    def _ram_tier(self) -> str:
        if not self.limits.cache_enabled:
            return "off (cache.enabled = false)"
        tokens = self.limits.ram_bytes // self.facts.kv_bytes_per_token
        return f"{self.limits.ram_bytes / 2**30:.1f} GiB, for {tokens:,} tokens"


def prepare_model(
    settings: Settings, *, progress: Progress | None = None, anew: bool = False
) -> PreparedModel:
    """Fetch the model that `settings` names, choose its library, encode it for this machine.

    `anew` measures encodings again where a choice is kept. Blocks, for a minute on first use. Raises
    ModelError and its kinds, BindingUnavailable, ConfigurationError.
    """
    located = locate(settings.model.source, cache_dir=settings.cache_dir, progress=progress)
    binding = choose_binding(
        read_facts(located.path).architecture,
        settings.model.binding,
        settings.model.library,
        cache_dir=settings.cache_dir,
    )
    threads = settings.engine.threads or usable_processors()
    encoded = ensure_encoded(
        located,
        workbench_for(binding, settings, threads),
        cache_dir=settings.cache_dir,
        encoding=settings.model.encoding,
        progress=progress,
        anew=anew,
    )
    return PreparedModel(located, encoded, binding, threads)


def workbench_for(binding: BindingChoice, settings: Settings, threads: int) -> LibraryWorkbench:
    """Where encodings are measured for this choice of library."""
    library = binding.library
    if library is None:
        # The upstream package finds its library itself; its module file stands for its version here.
        spec = find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise BindingUnavailable("llama-cpp-python was chosen and cannot be found. Install it again.")
        library = Path(spec.origin)
    return LibraryWorkbench(binding.name, settings.model.library, library, settings.cache_dir, threads)


def open_driver_for(settings: Settings, prepared: PreparedModel | None = None) -> Driver:
    """The model of `settings`, loaded, with one context as they say."""
    prepared = prepared or prepare_model(settings)
    return open_driver(
        prepared.encoded.path,
        name=prepared.located.name,
        binding=prepared.binding.name,
        library=settings.model.library,
        cache_dir=settings.cache_dir,
        cells=settings.engine.context_tokens,
        max_sequences=settings.engine.max_sequences,
        max_batch_tokens=settings.engine.max_batch_tokens,
        kv_cell_type=settings.engine.kv_cell_type,
        threads=prepared.threads,
    )


def open_runtime(settings: Settings, *, progress: Progress | None = None) -> Runtime:
    """Everything that serves the model of `settings`. Blocks and raises as `prepare_model` does."""
    prepared = prepare_model(settings, progress=progress)
    thread = DriverThread()
    driver = thread.call(open_driver_for, settings, prepared)
    ram_bytes = settings.cache.ram_bytes if settings.cache.ram_bytes is not None else default_ram_bytes()
    limits = EngineLimits(
        prefill_tokens_beside_decode=settings.engine.prefill_tokens_beside_decode,
        queue_limit=settings.engine.queue_limit,
        cache_enabled=settings.cache.enabled,
        cache_automatic=settings.cache.automatic,
        block_tokens=settings.cache.block_tokens,
        ram_bytes=ram_bytes,
        check_integrity=settings.engine.check_integrity,
    )
    observers = ObserverList()
    facts = driver.facts
    cache = _open_cache(settings, facts, prepared.located.name, limits, observers)
    backend = EmbeddedBackend(
        driver,
        limits,
        served_name=prepared.located.name,
        observers=[observers],
        thread=thread,
        cache=cache,
        details={
            "architecture": facts.architecture,
            "fingerprint": facts.fingerprint,
            "encoding": prepared.encoded.encoding,
            "binding": prepared.binding.name,
            "library": "native" if prepared.binding.native else "package",
            "kv_cell_type": facts.kv_cell_type,
            "layers": facts.layers,
            "kv_heads": facts.kv_heads,
            "head_size": facts.head_size,
            "kv_bytes_per_token": facts.kv_bytes_per_token,
            "weights_bytes": facts.weights_bytes,
        },
    )
    return Runtime(backend, observers.observers, facts, prepared, limits, driver.cells, cache)


def _open_cache(
    settings: Settings, facts: ModelFacts, name: str, limits: EngineLimits, observers: ObserverList
) -> CacheService | None:
    if not settings.cache.enabled:
        return None
    quotas = {
        tenant: each.ram_quota_bytes
        for tenant, each in settings.access.tenants.items()
        if each.ram_quota_bytes is not None
    }
    return open_cache(
        settings.cache,
        Namespace(facts.fingerprint, facts.layout),
        CacheLimits(
            block_tokens=limits.block_tokens,
            ram_bytes=limits.ram_bytes,
            policy=settings.cache.policy,
            policy_ttl_s=settings.cache.policy_ttl_s,
            write_behind_bytes=settings.cache.write_behind_bytes,
            quotas=quotas,
            served_names=frozenset({name}),
        ),
        folder=settings.cache_dir,
        clock=SystemClock(),
        observers=CacheObservers(
            evicted=observers.observe,
            reused=lambda gaps_s: observers.observe(ReuseReport(tuple(gaps_s))),
            read=observers.observe,
            written=observers.observe,
        ),
    )


def default_ram_bytes() -> int:
    """A quarter of the memory that is free now, at most 4 GiB."""
    return min(DEFAULT_RAM_TIER_BYTES, psutil.virtual_memory().available // 4)
