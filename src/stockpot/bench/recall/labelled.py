"""Labelled texts as a stream of questions: the same label stands for the same answer."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stockpot.bench.progress import BenchProgress, silent
from stockpot.errors import ConfigurationError
from stockpot.recall.vectors.embedder import Embedder

_BATCH = 32
_ROWS = 512
_NEIGHBOURS = 256

Matrix = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LabelledTexts:
    """`vectors` are unit rows; `neighbours[i]` are the texts nearest to text i, nearest first, without i."""

    texts: tuple[str, ...]
    labels: NDArray[np.int32]
    vectors: Matrix
    neighbours: NDArray[np.int32]

    @classmethod
    def of(cls, texts: Sequence[str], labels: Sequence[str], vectors: Matrix) -> LabelledTexts:
        """Number the labels and find the neighbours."""
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        numbered = np.array([numbers[label] for label in labels], dtype=np.int32)
        return cls(tuple(texts), numbered, vectors, _neighbours(vectors))

    def __len__(self) -> int:
        return len(self.texts)

    def save(self, folder: Path) -> None:
        """For another process."""
        arrays = (np.array(self.texts), self.labels, self.vectors, self.neighbours)
        for name, array in zip(_FILES, arrays, strict=True):
            np.save(folder / name, array)

    @classmethod
    def load(cls, folder: Path) -> LabelledTexts:
        """What `save` wrote."""
        texts, labels, vectors, neighbours = (np.load(folder / name) for name in _FILES)
        return cls(tuple(map(str, texts)), labels, vectors, neighbours)


_FILES = ("texts.npy", "labels.npy", "vectors.npy", "neighbours.npy")


class Kept:
    """Which of the texts are kept, and the nearest of them to any text."""

    def __init__(self, data: LabelledTexts) -> None:
        self._data = data
        self._is_kept = np.zeros(len(data), dtype=np.bool_)
        self._numbers = np.empty(len(data), dtype=np.int64)
        self._vectors = np.empty_like(data.vectors)
        self._count = 0

    def add(self, number: int) -> None:
        """Keep a text, once."""
        self._is_kept[number] = True
        self._numbers[self._count] = number
        self._vectors[self._count] = self._data.vectors[number]
        self._count += 1

    def nearest(self, number: int, count: int) -> list[tuple[int, float]]:
        """At most `count` kept texts and their cosines, nearest first; the text itself is not among them."""
        data = self._data
        near = data.neighbours[number]
        found = near[self._is_kept[near]][:count]
        if len(found) < min(count, self._count):  # its known neighbours are not enough: look at all
            similarities = self._vectors[: self._count] @ data.vectors[number]
            own = self._numbers[: self._count] == number
            similarities[own] = -np.inf
            order = np.argsort(-similarities, kind="stable")[: min(count, self._count - int(own.any()))]
            return [(int(self._numbers[place]), float(similarities[place])) for place in order]
        similarities = data.vectors[found] @ data.vectors[number]
        return list(zip(found.tolist(), similarities.tolist(), strict=True))


def read_labelled(files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Texts and labels of CSV files with the columns `text` and `category` (or `label`). Raises
    ConfigurationError for a file that is not there or is none of these."""
    texts: list[str] = []
    labels: list[str] = []
    for path in files:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                names = reader.fieldnames or ()
                label = next((name for name in ("category", "label") if name in names), None)
                if "text" not in names or label is None:
                    raise ConfigurationError(f"{path} has the columns {', '.join(names)}, not text,category.")
                for row in reader:
                    texts.append(row["text"])
                    labels.append(row[label])
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"{path} cannot be read: {error}. Give labelled texts as CSV."
            ) from error
    if not texts:
        raise ConfigurationError("There is no labelled text in the files given.")
    return texts, labels


async def embed_all(
    texts: Sequence[str], embedder: Embedder, folder: Path | None = None, *, progress: BenchProgress = silent
) -> Matrix:
    """The vectors of all texts; kept in `folder` for the next time, under a name that says of what."""
    digest = hashlib.blake2b(digest_size=12)
    for part in (embedder.name, *texts):
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    path = None if folder is None else folder / f"vectors-{digest.hexdigest()}.npy"
    if path is not None and path.is_file():
        return np.load(path)
    # Texts of one length together: nothing is padded then.
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    rows: list[Matrix] = []
    for first in range(0, len(order), _BATCH):
        rows.append(await embedder.embed([texts[number] for number in order[first : first + _BATCH]]))
        progress("embed the texts", min(first + _BATCH, len(order)), len(order))
    vectors = np.concatenate(rows)[np.argsort(order)].astype(np.float32)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return vectors


def _neighbours(vectors: Matrix) -> NDArray[np.int32]:
    """By blocks: all cosines at one time would take 700 MB of 13,000 texts."""
    count = min(_NEIGHBOURS, len(vectors) - 1)
    found = np.empty((len(vectors), count), dtype=np.int32)
    for first in range(0, len(vectors), _ROWS):
        similarities = vectors[first : first + _ROWS] @ vectors.T
        rows = np.arange(len(similarities))
        similarities[rows, first + rows] = -np.inf
        nearest = np.argpartition(-similarities, max(count - 1, 0), axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(similarities, nearest, axis=1), axis=1, kind="stable")
        found[first : first + _ROWS] = np.take_along_axis(nearest, order, axis=1)
    return found
