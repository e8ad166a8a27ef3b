"""Real engines to put behind the gateway (vLLM on the CPU, llama-server), and the gateway before them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stockpot.bench.gather import run_all
from stockpot.bench.http_stream import fetch
from stockpot.bench.peer_llama_server import LlamaServerPeer
from stockpot.bench.peer_vllm import VllmPeer
from stockpot.bench.progress import BenchProgress
from stockpot.bench.server import RunningServer, ServerCommand, free_port, running_server
from stockpot.bench.setup_steps import Workshop
from stockpot.errors import ServerUnreachable
from stockpot.settings_gateway import Policy

CHAT = "chat"
"""The model as clients call it, on the workers that share it."""
SMALL = "small"
"""The model of llama-server, which is nobody else's."""

_HOST = "127.0.0.1"
_THERE = "bench"
_BLOCK_TOKENS = 32
_KV_SPACE_GIB = 1
_SEQUENCES = 16
_WORKER_START_S = 900.0
"""Alone on two processors it takes half a minute; several at once and beside other work, minutes."""
_GATEWAY_START_S = 120.0
_RESET_S = 30.0
_SERVE = "from stockpot.cli.main import main; main()"


@dataclass(frozen=True, slots=True)
class Worker:
    """A server that runs, and how the gateway is told of it. `models`: names here and there. `reset_path`:
    where a POST empties its prefix cache (None: nowhere)."""

    name: str
    running: RunningServer
    server: str
    models: Mapping[str, str]
    kv_events: str | None = None
    kv_replay: str | None = None
    reset_path: str | None = None

    async def reset_cache(self) -> None:
        """Empty its prefix cache. Raises ServerUnreachable where it does not say it did."""
        if self.reset_path is None:
            return
        url = self.running.url + self.reset_path
        answer = await fetch(url, method="POST", timeout_s=_RESET_S)
        if answer.status != 200:
            raise ServerUnreachable(f"{url} answered {answer.status}: {answer.body[:200]!r}.")

    def section(self) -> str:
        """Its part of the gateway's configuration."""
        known = {"server": self.server, "url": f"{self.running.url}/v1"}
        known |= {"kv_events": self.kv_events} if self.kv_events else {}
        known |= {"kv_replay": self.kv_replay} if self.kv_replay else {}
        lines = [f"[backends.{self.name}]", *(f"{key} = {_quoted(value)}" for key, value in known.items())]
        models = ", ".join(f"{_quoted(here)} = {_quoted(there)}" for here, there in self.models.items())
        return "\n".join([*lines, f"models = {{ {models} }}"])


class VllmWorkers(VllmPeer):
    """vLLM as a worker among several: one thread each, KV events on."""

    def __init__(self, cache_dir: Path) -> None:
        super().__init__(cache_dir, threads=1)

    def prepare(self, progress: BenchProgress) -> None:
        """The environment and the weights alone: which set-up is fastest does not matter here."""
        complete = self._folder / "complete"
        if not complete.is_file():
            self._install(Workshop(self._folder, progress))
            complete.touch()

    def facts(self) -> Mapping[str, object]:
        return {
            "weights": "BF16, dequantized from the default GGUF",
            "block_tokens": _BLOCK_TOKENS,
            "threads": 1,
            "kv_space_gib": _KV_SPACE_GIB,
            "options": "--enforce-eager --enable-prefix-caching --enable-prompt-tokens-details, KV events",
        }

    @asynccontextmanager
    async def worker(self, number: int) -> AsyncGenerator[Worker]:
        """The worker of this number, from start to stop."""
        events, replay = free_port(), free_port()
        async with running_server(self.worker_command(number, events, replay)) as running:
            yield Worker(
                f"vllm-{number}",
                running,
                "vllm",
                {CHAT: _THERE},
                f"tcp://{_HOST}:{events}",
                f"tcp://{_HOST}:{replay}",
                "/reset_prefix_cache",
            )

    def worker_command(self, number: int, events_port: int, replay_port: int) -> ServerCommand:
        """How it is started, on the processor that is its turn."""
        command = self._command(f"auto/{_BLOCK_TOKENS}")
        kv_events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            # With a host name instead of the star vLLM connects to a subscriber, which nobody would be.
            "endpoint": f"tcp://*:{events_port}",
            "replay_endpoint": f"tcp://{_HOST}:{replay_port}",
            "topic": "",
        }
        processors = sorted(os.sched_getaffinity(0))
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_SPACE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": str(processors[(number - 1) % len(processors)]),
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
        }
        options = (
            *("--enforce-eager", "--max-num-seqs", str(_SEQUENCES)),
            *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        )
        return replace(
            command,
            name=f"vllm-{number}",
            arguments=(*command.arguments, *options, "--kv-events-config", json.dumps(kv_events)),
            environment={**command.environment, **environment},
            start_s=_WORKER_START_S,
        )


class SmallServer(LlamaServerPeer):
    """llama-server beside the workers, with one thread."""

    def __init__(self, cache_dir: Path) -> None:
        super().__init__(cache_dir, threads=1)

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Worker]:
        """From start to stop."""
        served = self.serve(concurrency=4)
        async with running_server(served.command) as running:
            yield Worker("llama", running, "llama-server", {SMALL: served.model})


@asynccontextmanager
async def running_workers(
    vllm: VllmWorkers, *, count: int, progress: BenchProgress
) -> AsyncGenerator[tuple[Worker, ...]]:
    """So many vLLM workers, which start at the same time; all are stopped at the end."""
    async with AsyncExitStack() as stack:
        progress("start vLLM", 0, None)
        starting = (vllm.worker(number) for number in range(1, count + 1))
        workers = await run_all(stack.enter_async_context(worker) for worker in starting)
        progress("start vLLM", count, count)
        yield tuple(workers)


@asynccontextmanager
async def running_gateway(
    workers: Sequence[Worker], folder: Path, *, policy: Policy = "prefix", settings: str = ""
) -> AsyncGenerator[RunningServer]:
    """`stockpot serve --config FILE` before these workers, without a model of its own; ready when all of them
    are. Ledger and configuration lie in `folder`; `settings` is more TOML."""
    config = _write_config(folder, workers, policy, settings)
    port = free_port()
    arguments = (sys.executable, "-c", _SERVE, "serve", "--config", str(config), "--log-level", "warning")
    command = ServerCommand(
        "the gateway",
        (*arguments, "--host", _HOST, "--port", str(port)),
        port,
        "/ready",
        start_s=_GATEWAY_START_S,
    )
    async with running_server(command) as running:
        yield running


def _write_config(folder: Path, workers: Sequence[Worker], policy: Policy, settings: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "stockpot.toml"
    sections = (
        f"data_dir = {_quoted(str(folder))}",
        "[engine]\nenabled = false",
        f"[routing]\npolicy = {_quoted(policy)}",
        *(worker.section() for worker in workers),
        settings,
    )
    config.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return config


def _quoted(text: str) -> str:
    """As a basic string of TOML, whose escapes are those of JSON."""
    return json.dumps(text)
