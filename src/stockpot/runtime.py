"""The composition root: the one place that knows all rooms and puts them together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from stockpot.backends.embedded import EmbeddedBackend
from stockpot.engine.core import EngineLimits
from stockpot.engine.driver import ModelFacts
from stockpot.engine.llamacpp import BindingChoice, choose_binding, open_driver
from stockpot.engine.reports import EngineStats, Observer, Report
from stockpot.models.encoding import EncodedModel, ensure_encoded
from stockpot.models.gguf import read_facts
from stockpot.models.progress import Progress
from stockpot.models.source import LocatedModel, locate
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
class Runtime:
    """A model made ready and the backend around it (not started yet). Add observers before the start."""

    backend: EmbeddedBackend
    observers: list[Observer]
    facts: ModelFacts
    located: LocatedModel
    encoded: EncodedModel
    binding: BindingChoice
    limits: EngineLimits
    cells: int
    threads: int

    def engine_stats(self) -> EngineStats:
        """A snapshot of the engine's counts."""
        return self.backend.engine_stats()

    def banner_facts(self) -> Mapping[str, str]:
        """What a person wants to see when the server starts."""
        kv_bytes = self.facts.kv_bytes_per_token
        return {
            "model": f"{self.located.name} ({self.located.origin})",
            "encoding": f"{self.encoded.encoding}: {self.encoded.reason}",
            "binding": f"{self.binding.name}: {self.binding.reason}",
            "threads": str(self.threads),
            "context": f"{self.cells:,} tokens x {kv_bytes:,} bytes of KV = {self.cells * kv_bytes / 2**20:,.0f} MiB",
            "RAM tier": f"{self.limits.ram_bytes / 2**30:.1f} GiB = {self.limits.ram_bytes // kv_bytes:,} tokens"
            if self.limits.cache_enabled
            else "off (cache.enabled = false)",
        }


def open_runtime(settings: Settings, *, progress: Progress | None = None) -> Runtime:
    """Fetch, encode and load the model that `settings` names. Blocks, for minutes on first use.

    Raises ModelError and its kinds, BindingUnavailable, ConfigurationError.
    """
    located = locate(settings.model.source, cache_dir=settings.cache_dir, progress=progress)
    architecture = read_facts(located.path).architecture
    binding = choose_binding(
        architecture, settings.model.binding, settings.model.library, cache_dir=settings.cache_dir
    )
    encoded = ensure_encoded(
        located,
        wanted=settings.model.encoding,
        binding=binding,
        cache_dir=settings.cache_dir,
        progress=progress,
    )
    threads = settings.engine.threads or usable_processors()
    driver = open_driver(
        encoded.path,
        name=located.name,
        binding=settings.model.binding,
        library=settings.model.library,
        cache_dir=settings.cache_dir,
        cells=settings.engine.context_tokens,
        max_sequences=settings.engine.max_sequences,
        max_batch_tokens=settings.engine.max_batch_tokens,
        kv_cell_type=settings.engine.kv_cell_type,
        threads=threads,
    )
    limits = EngineLimits(
        prefill_tokens_beside_decode=settings.engine.prefill_tokens_beside_decode,
        queue_limit=settings.engine.queue_limit,
        cache_enabled=settings.cache.enabled,
        block_tokens=settings.cache.block_tokens,
        ram_bytes=settings.cache.ram_bytes if settings.cache.ram_bytes is not None else default_ram_bytes(),
        check_integrity=settings.engine.check_integrity,
    )
    observers = ObserverList()
    facts = driver.facts
    backend = EmbeddedBackend(
        driver,
        limits,
        served_name=located.name,
        observers=[observers],
        details={
            "architecture": facts.architecture,
            "encoding": encoded.encoding,
            "binding": binding.name,
            "layers": facts.layers,
            "kv_heads": facts.kv_heads,
            "head_size": facts.head_size,
            "kv_bytes_per_token": facts.kv_bytes_per_token,
            "weights_bytes": facts.weights_bytes,
        },
    )
    return Runtime(
        backend, observers.observers, facts, located, encoded, binding, limits, driver.cells, threads
    )


def usable_processors() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_ram_bytes() -> int:
    """A quarter of the memory that is free now, at most 4 GiB."""
    return min(DEFAULT_RAM_TIER_BYTES, psutil.virtual_memory().available // 4)
