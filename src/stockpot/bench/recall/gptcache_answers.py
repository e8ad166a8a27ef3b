"""Run by GPTCache's own Python: which pairs GPTCache answers from its cache, each pair with an empty one.

`python gptcache_answers.py FOLDER`: in it `pairs.json` (two lists of messages each), `texts.json` and
`vectors.npy` (a row for each text, all that is embedded); `answers.json` (a list of booleans) is written.
Imports nothing of Stockpot, which is not installed there.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class _Known:
    """As GPTCache wants an embedding."""

    def __init__(self, folder: Path) -> None:
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        vectors = np.load(folder / "vectors.npy")
        self._vectors = dict(zip(texts, vectors, strict=True))
        self.dimension = vectors.shape[1]

    def to_embeddings(self, data: str, **_: Any) -> Any:
        return self._vectors[data]


def main(folder: Path) -> None:
    gptcache: Any = importlib.import_module("gptcache")
    api: Any = importlib.import_module("gptcache.adapter.api")
    pre: Any = importlib.import_module("gptcache.processor.pre")
    known = _Known(folder)
    answers: list[bool] = []
    pairs = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
    for number, (kept, asked) in enumerate(pairs):
        cache = gptcache.Cache()
        data = str(folder / f"cache-{number}")
        # All by default but the embedding: last message, SQLite and faiss, distance, threshold 0.8.
        api.init_similar_cache(data_dir=data, cache_obj=cache, pre_func=pre.last_content, embedding=known)
        api.put("", "kept", cache_obj=cache, messages=kept)
        answers.append(api.get("", cache_obj=cache, messages=asked) is not None)
    (folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
