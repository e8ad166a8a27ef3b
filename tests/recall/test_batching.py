"""The end of a batcher: nobody waits for ever, and nobody is told that they gave up themselves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from stockpot.errors import ShuttingDown
from stockpot.recall.vectors.batching import Batcher
from stockpot.recall.vectors.embedder import Vectors


async def test_closing_finishes_the_batch_and_tells_who_waits() -> None:
    entered, go = threading.Event(), threading.Event()

    def run(texts: Sequence[str]) -> Vectors:
        entered.set()
        assert go.wait(20)
        return np.ones((len(texts), 1), dtype=np.float32)

    batcher = Batcher(run)
    made = asyncio.create_task(batcher.vectors(["a"]))
    await asyncio.to_thread(entered.wait, 20)
    waiting = asyncio.create_task(batcher.vectors(["b"]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        await waiting
    go.set()
    assert (await made).shape == (1, 1)
    await closing
    with pytest.raises(ShuttingDown):
        await batcher.vectors(["late"])
    await batcher.close()
