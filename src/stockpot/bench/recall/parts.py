"""The parts of the proof, put together with the real embedder, index and other caches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from stockpot.bench.progress import BenchProgress
from stockpot.bench.recall.fow import FowPlan, measure_fow
from stockpot.bench.recall.labelled import read_labelled
from stockpot.bench.recall.other_caches import GptCache, OtherCache, RedisVl
from stockpot.bench.recall.pairs import read_pairs
from stockpot.bench.recall.speed import SpeedPlan, measure_speed
from stockpot.bench.recall.stream import StreamPlan, measure_stream
from stockpot.bench.results import Result
from stockpot.errors import ConfigurationError
from stockpot.recall.vectors.memory_index import MemoryIndex
from stockpot.recall.vectors.minilm import MiniLm
from stockpot.settings import load_settings

Part = Literal["fow", "stream", "speed"]
PARTS: tuple[Part, ...] = ("fow", "stream", "speed")

_STREAM_FOLDER = Path("..") / "shared" / "data" / "banking77"


async def measure_parts(
    parts: Sequence[Part],
    *,
    stream_files: Sequence[Path] | None,
    shuffles: int,
    with_gptcache: bool,
    quick: bool,
    progress: BenchProgress,
) -> dict[Part, Result]:
    """Each part's result. Raises StockpotError; what is missing is told before anything is measured."""
    cache_dir = load_settings().cache_dir
    others: list[OtherCache] = [GptCache(cache_dir)] if with_gptcache else []
    others.append(RedisVl())
    pairs = read_pairs() if "fow" in parts else []
    texts, labels = _labelled(stream_files) if "stream" in parts else (list[str](), list[str]())
    if "fow" in parts:
        for other in others:
            await asyncio.to_thread(other.prepare, progress)
    results: dict[Part, Result] = {}
    embedder = MiniLm()
    await embedder.start()
    try:
        for part in parts:
            if part == "fow":
                plan = FowPlan.quick() if quick else FowPlan()
                results[part] = await measure_fow(plan, pairs, embedder, others, progress=progress)
            elif part == "stream":
                stream = StreamPlan.quick() if quick else replace(StreamPlan(), shuffles=shuffles)
                folder = cache_dir / "bench" / "recall"
                results[part] = await measure_stream(
                    stream, texts, labels, embedder, vectors_in=folder, progress=progress
                )
            else:
                speed = SpeedPlan.quick() if quick else SpeedPlan()
                index = MemoryIndex()
                await index.start()
                try:
                    results[part] = await measure_speed(speed, embedder, index, progress=progress)
                finally:
                    await index.close()
    finally:
        await embedder.close()
    return results


def _labelled(files: Sequence[Path] | None) -> tuple[list[str], list[str]]:
    if files is None:
        files = sorted(_STREAM_FOLDER.glob("*.csv"))
        if not files:
            raise ConfigurationError(
                f"There are no labelled texts: {_STREAM_FOLDER} has no CSV files. Give some with --stream, or"
                " leave this part out with --only fow --only speed."
            )
    return read_labelled(files)
