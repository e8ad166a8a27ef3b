"""llama-server, built natively from the source that llama-cpp-python carries, with the model in its fastest
encoding on this machine."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stockpot.bench.client import BenchClient
from stockpot.bench.peer import Peer, ServedPeer
from stockpot.bench.progress import BenchProgress
from stockpot.bench.server import ServerCommand, free_port, running_server
from stockpot.bench.setup_steps import Workshop, fetch_source
from stockpot.bench.workload import WordSource
from stockpot.errors import BuildFailed, ServerUnreachable
from stockpot.models.source import locate
from stockpot.settings import DEFAULT_MODEL

_SOURCE = "llama-cpp-python==0.3.36"
_ENCODINGS = ("Q4_0", "Q8_0", "BF16")
_MODEL = "bench"
_CACHE_RAM_MIB = 8192
_CONTEXT_TOKENS = 32768
_PROBE_PROMPT_WORDS = 700
_PROBE_ANSWER_TOKENS = 32
_PROBE_REPEATS = 5


@dataclass(frozen=True, slots=True)
class _Variant:
    """Compiler flags beside the native ones."""

    name: str
    flags: str = ""


# Tried in this order until one runs every encoding; the fastest is kept. GCC 12 drops stores to the AMX tile
# configuration (its intrinsic declares too little memory as input), and the server then dies in its first
# matrix product; without that optimisation it runs, and AMX is worth having.
_VARIANTS = (
    _Variant("native"),
    _Variant("native, dead-store elimination off", "-fno-tree-dse -fno-dse -fno-strict-aliasing"),
    _Variant("native, without AMX", "-U__AMX_INT8__"),
)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What was found fastest, and all figures: seconds to answer a probe, None where the server died."""

    variant: str
    encoding: str
    seconds: Mapping[str, float | None]


class LlamaServerPeer(Peer):
    """`threads` None: as many as processors this process may use."""

    name = "llama-server"

    def __init__(self, cache_dir: Path, *, threads: int | None = None) -> None:
        self._cache_dir = cache_dir
        self._folder = cache_dir / "bench" / _SOURCE.replace("==", "-")
        self._threads = threads or len(os.sched_getaffinity(0))
        self._choice: _Choice | None = None

    def prepare(self, progress: BenchProgress) -> None:
        """Build (about five minutes on two processors for each variant), encode, choose by a short probe."""
        self._choice = self._read_choice() or self._choose(Workshop(self._folder, progress))

    def serve(self, *, concurrency: int) -> ServedPeer:
        """Slots, idle ones kept in RAM, chunks reused by shifting, flash attention. Each slot has KV of its
        own: with unified KV both workloads took longer by a third and more (26.8 s against 19.6, 51.5 s
        against 35.8)."""
        choice = self._chosen
        variant = next(variant for variant in _VARIANTS if variant.name == choice.variant)
        return ServedPeer(self._command(variant, choice.encoding, slots=_slots(concurrency)), _MODEL)

    def facts(self) -> Mapping[str, object]:
        choice = self._chosen
        return {
            "source": _SOURCE,
            "build": choice.variant,
            "encoding": choice.encoding,
            "probe_seconds": dict(choice.seconds),
            "options": " ".join(_options(slots=_slots(2), threads=self._threads)) + " (-np 8 for C8)",
        }

    @property
    def _chosen(self) -> _Choice:
        if self._choice is None:
            raise RuntimeError("prepare() comes before serve() and facts()")
        return self._choice

    def _command(self, variant: _Variant, encoding: str, *, slots: int) -> ServerCommand:
        port = free_port()
        program = self._build_folder(variant) / "bin" / "llama-server"
        model = self._folder / f"{encoding}.gguf"
        arguments = (str(program), "-m", str(model), "--alias", _MODEL, "--port", str(port))
        return ServerCommand(
            self.name, (*arguments, *_options(slots=slots, threads=self._threads)), port, start_s=120
        )

    def _build_folder(self, variant: _Variant) -> Path:
        return self._folder / f"build-{_VARIANTS.index(variant)}"

    def _read_choice(self) -> _Choice | None:
        try:
            return _Choice(**json.loads((self._folder / "choice.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not made yet, or half written: made anew
            return None

    def _choose(self, workshop: Workshop) -> _Choice:
        """Build until a variant runs every encoding; measure all that run."""
        seconds: dict[str, float | None] = {}
        source = fetch_source(workshop, _SOURCE) / "vendor" / "llama.cpp"
        for variant in _VARIANTS:
            self._build(workshop, source, variant)
            if variant is _VARIANTS[0]:
                self._encode(workshop)
            for encoding in _ENCODINGS:
                what = f"probe llama-server, {variant.name}, {encoding}"
                workshop.progress(what, 0, None)
                seconds[f"{variant.name}/{encoding}"] = self._probe(variant, encoding)
                workshop.progress(what, 1, 1)
            if all(seconds[f"{variant.name}/{encoding}"] is not None for encoding in _ENCODINGS):
                break
        shutil.rmtree(workshop.folder / "source")
        ran = {name: value for name, value in seconds.items() if value is not None}
        if not ran:
            raise BuildFailed(
                f"llama-server was built, but runs no encoding here. The log is {workshop.log}."
            )
        variant_name, _, encoding = min(ran, key=lambda name: ran[name]).rpartition("/")
        choice = _Choice(variant_name, encoding, seconds)
        content = {"variant": choice.variant, "encoding": choice.encoding, "seconds": seconds}
        (self._folder / "choice.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        return choice

    def _build(self, workshop: Workshop, source: Path, variant: _Variant) -> None:
        build = self._build_folder(variant)
        options = [
            "-DGGML_NATIVE=ON",
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLLAMA_CURL=OFF",
            "-DLLAMA_BUILD_TESTS=OFF",
        ]
        if variant.flags:
            options += [f"-DCMAKE_C_FLAGS={variant.flags}", f"-DCMAKE_CXX_FLAGS={variant.flags}"]
        workshop.run(
            f"configure llama-server ({variant.name})", ["cmake", "-S", source, "-B", build, *options]
        )
        targets = ("--target", "llama-server", "llama-quantize", "-j", str(self._threads))
        workshop.run(f"build llama-server ({variant.name}), minutes", ["cmake", "--build", build, *targets])

    def _encode(self, workshop: Workshop) -> None:
        model = locate(DEFAULT_MODEL, cache_dir=self._cache_dir)
        program = self._build_folder(_VARIANTS[0]) / "bin" / "llama-quantize"
        for encoding in _ENCODINGS:
            target = workshop.folder / f"{encoding}.gguf"
            command = [program, "--allow-requantize", model.path, target, encoding, str(self._threads)]
            workshop.run(f"encode the model as {encoding}", command)

    def _probe(self, variant: _Variant, encoding: str) -> float | None:
        """Seconds to answer one fresh prompt, the best of a few (noise only adds); None where it dies."""
        try:
            return asyncio.run(_answer_probes(self._command(variant, encoding, slots=_slots(2))))
        except ServerUnreachable:
            return None


async def _answer_probes(command: ServerCommand) -> float:
    words = WordSource(3)
    async with running_server(command) as running:
        client = BenchClient(running.url, _MODEL)
        await client.complete(words.text(_PROBE_PROMPT_WORDS), max_tokens=2)
        answers = [
            await client.complete(words.text(_PROBE_PROMPT_WORDS), max_tokens=_PROBE_ANSWER_TOKENS)
            for _ in range(_PROBE_REPEATS)
        ]
    return round(min(answer.total_s for answer in answers), 4)


def _slots(concurrency: int) -> int:
    """Its slots are its batch and its cache in one: at least four, as many as requests come at once."""
    return max(4, concurrency)


def _options(*, slots: int, threads: int) -> tuple[str, ...]:
    return (
        *("-c", str(_CONTEXT_TOKENS), "-np", str(slots), "--no-kv-unified", "-fa", "on"),
        *("--cache-reuse", "256", "--cache-ram", str(_CACHE_RAM_MIB)),
        *("-t", str(threads), "--no-ui", "-lv", "1"),
    )
