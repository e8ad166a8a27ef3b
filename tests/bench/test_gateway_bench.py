"""The overhead benchmark: load that is counted right, and the whole of it against real servers."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from stockpot.bench.gateway_overhead import OverheadPlan, measure_overhead
from stockpot.bench.gateway_server import GatewayPeer, ServedGateway
from stockpot.bench.load_generator import LoadPlan, LoadReading, run_load
from stockpot.bench.mock_provider import MOCK_MODEL, mock_command
from stockpot.bench.peer_litellm import LiteLLMPeer
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.server import ServerCommand, free_port, running_server


def _load(**kind: float | bool) -> LoadReading:
    """What a load of this kind on the mock provider reads."""

    async def measure() -> LoadReading:
        async with running_server(mock_command(chunks=5, interval_s=0.001)) as server:
            return await run_load(LoadPlan(server.url, "key", MOCK_MODEL, **kind))  # pyright: ignore[reportArgumentType]

    return asyncio.run(measure())


def test_a_closed_loop_asks_as_often_as_it_is_told() -> None:
    reading = _load(connections=3, requests=50)
    # Those under way when the last one begins are counted too.
    assert (reading.answered, reading.failed) == (50, 0)
    assert reading.latency is not None
    assert 0 < reading.latency.p50_ms <= reading.latency.max_ms
    assert reading.delay is None


def test_an_open_loop_asks_at_its_rate() -> None:
    reading = _load(connections=4, seconds=0.5, rate_per_s=100)
    assert (reading.answered, reading.failed) == (50, 0)


def test_each_chunk_of_a_stream_is_timed() -> None:
    reading = _load(connections=4, stream=True)
    assert (reading.answered, reading.failed, reading.chunks) == (4, 0, 20)
    assert reading.delay is not None
    assert reading.delay.p50_ms > 0


_HANGS_AND_REFUSES = """
import asyncio, sys

async def answer(reader, writer):
    if b"GET" in await reader.readuntil(b"\\r\\n\\r\\n"):
        writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")
    elif sys.argv[2] == "refuses":
        writer.write(b"HTTP/1.1 503 Busy\\r\\ncontent-length: 4\\r\\n\\r\\nbusy")
    elif sys.argv[2] == "closes":
        writer.close()
    else:
        await asyncio.sleep(60)

async def serve():
    await (await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1]))).serve_forever()

asyncio.run(serve())
"""


@pytest.mark.parametrize(
    ("how", "words"), [("refuses", "503: busy"), ("closes", "closed"), ("hangs", "not answered")]
)
def test_failures_are_counted_and_told(how: str, words: str) -> None:
    async def measure() -> LoadReading:
        port = free_port()
        command = ServerCommand(how, (sys.executable, "-c", _HANGS_AND_REFUSES, str(port), how), port)
        async with running_server(command) as server:
            plan = LoadPlan(server.url, "key", "m", connections=2, requests=2, give_up_s=0.2)
            return await run_load(plan)

    reading = asyncio.run(measure())
    assert (reading.answered, reading.failed) == (0, 2)
    assert words in reading.failure


class _PassThrough(GatewayPeer):
    """Stands for another gateway: the mock provider itself, once more."""

    name = "litellm"

    def prepare(self, progress: BenchProgress) -> None:
        del progress

    def serve(self, upstream_url: str, model: str, folder: Path) -> ServedGateway:
        del upstream_url, model, folder
        return ServedGateway(mock_command(chunks=10, interval_s=0.02), "key")

    def facts(self) -> Mapping[str, object]:
        return {"version": "none"}


def test_the_whole_benchmark_runs_against_a_real_gateway() -> None:
    plan = OverheadPlan(
        rounds=1,
        connections=2,
        seconds=0.3,
        rate_per_s=20,
        rate_seconds=0.5,
        streams=2,
        chunks=10,
        memory_requests=20,
        memory_samples=2,
    )
    result = asyncio.run(measure_overhead(plan, [_PassThrough()]))
    assert [table.rows[1][0] for table in result.tables[:4]] == ["stockpot"] * 4
    assert len(result.tables[4].rows) == 3
    failed = next(verdict for verdict in result.verdicts if "failed" in verdict.what)
    assert failed.value == 0
    assert any("LiteLLM" in verdict.what for verdict in result.verdicts)


def test_litellm_is_made_once_and_told_where_its_provider_is(tmp_path: Path) -> None:
    home = tmp_path / "bench" / "litellm-1.108.7"
    home.mkdir(parents=True)
    (home / "complete").touch()
    peer = LiteLLMPeer(tmp_path)
    peer.prepare(silent)  # would take minutes, were anything installed
    served = peer.serve("http://127.0.0.1:1", "some-model", tmp_path)
    config = (tmp_path / "litellm.yaml").read_text()
    assert "api_base: http://127.0.0.1:1/v1" in config
    assert served.key in config
    assert str(tmp_path) not in str(peer.facts())
