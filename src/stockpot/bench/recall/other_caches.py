"""What other semantic caches answer, on the same pairs and the same vectors."""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stockpot.bench.progress import BenchProgress
from stockpot.bench.recall.pairs import Pair
from stockpot.bench.setup_steps import PythonEnvironment, Workshop

Vectors = Mapping[str, NDArray[np.float32]]

_GPTCACHE = "0.1.44"
_REDISVL = "0.28.0"
_REDISVL_DISTANCE = 0.1
"""Default of `SemanticCache(distance_threshold=...)`, in cosine distance."""


class OtherCache(ABC):
    """A policy other than ours."""

    name: str

    @abstractmethod
    def prepare(self, progress: BenchProgress) -> None:
        """Install what is missing. Raises BuildFailed."""

    @abstractmethod
    def answers(self, pairs: Sequence[Pair], vectors: Vectors, progress: BenchProgress) -> list[bool]:
        """Whether each pair's `asked` gets the answer of its `kept`, which alone is in the cache."""

    @abstractmethod
    def facts(self) -> Mapping[str, object]:
        """Version and options, for the result file."""


class GptCache(OtherCache):
    """The real package, in an environment of its own (about 240 MB), with its defaults."""

    name = "GPTCache"

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / "bench" / f"gptcache-{_GPTCACHE}"

    def prepare(self, progress: BenchProgress) -> None:
        complete = self._folder / "complete"
        if not complete.is_file():
            environment = PythonEnvironment(Workshop(self._folder, progress), "venv")
            environment.create((f"gptcache=={_GPTCACHE}", "faiss-cpu==1.15.1", "sqlalchemy==2.1.9"))
            complete.touch()

    def answers(self, pairs: Sequence[Pair], vectors: Vectors, progress: BenchProgress) -> list[bool]:
        with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as name:
            folder = Path(name)
            messages = [[_messages(pair.kept), _messages(pair.asked)] for pair in pairs]
            texts = sorted({turns[-1]["content"] for pair in messages for turns in pair})
            (folder / "pairs.json").write_text(json.dumps(messages), encoding="utf-8")
            (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
            np.save(folder / "vectors.npy", np.stack([vectors[text] for text in texts]))
            script = Path(__file__).with_name("gptcache_answers.py")
            python = self._folder / "venv" / "bin" / "python"
            Workshop(self._folder, progress).run("ask GPTCache", [python, script, folder], cwd=folder)
            return json.loads((folder / "answers.json").read_text(encoding="utf-8"))

    def facts(self) -> Mapping[str, object]:
        return {
            "version": _GPTCACHE,
            "options": "init_similar_cache: SQLite, faiss, SearchDistanceEvaluation, threshold 0.8",
            "key": "the last message (its default for chats)",
        }


class RedisVl(OtherCache):
    """Its rule: the package needs Redis with the search module, which is no package of Python."""

    name = "RedisVL"

    def prepare(self, progress: BenchProgress) -> None:
        del progress

    def answers(self, pairs: Sequence[Pair], vectors: Vectors, progress: BenchProgress) -> list[bool]:
        del progress
        return [1.0 - last_similarity(pair, vectors) <= _REDISVL_DISTANCE for pair in pairs]

    def facts(self) -> Mapping[str, object]:
        return {
            "version": _REDISVL,
            "run": "not the package, which needs Redis with its search module: its documented rule",
            "options": f"SemanticCache: cosine distance at most {_REDISVL_DISTANCE:g} (default)",
            "key": "the last message",
        }


def last_similarity(pair: Pair, vectors: Vectors) -> float:
    """The cosine of the last messages."""
    return float(vectors[pair.kept[-1][1]] @ vectors[pair.asked[-1][1]])


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]
