"""The vocabulary of a model that a llama.cpp library has loaded."""

from __future__ import annotations

from stockpot.engine.bindings.binding import Binding, Handle
from stockpot.engine.driver import DriverFailure, Vocabulary


class LlamaVocabulary(Vocabulary):
    """Reads the loaded model, which does not change, so any thread may call, until the driver is closed:
    from then on calls raise DriverFailure. Pieces are kept once asked for, two spellings of a token at
    most."""

    def __init__(self, binding: Binding, model: Handle) -> None:
        self._binding = binding
        self._model: Handle | None = model
        self.size = binding.vocabulary_size(model)
        begin, end = binding.begin_token(model), binding.end_token(model)
        self.begin_token = begin if begin >= 0 else None
        self.end_token = end if end >= 0 else None
        self._wants_begin = self.begin_token is not None and binding.wants_begin(model)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._ending = frozenset(t for t in range(self.size) if binding.ends_generation(model, t))

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        tokens = self._binding.tokenize(self._loaded(), text.encode(), special=special)
        if add_begin and self._wants_begin and self.begin_token is not None:
            return [self.begin_token, *tokens]
        return tokens

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if not 0 <= token < self.size:
            raise ValueError(f"token {token} is not within 0..{self.size - 1}")
        data = self._pieces.get((token, special))
        if data is None:
            data = self._pieces[token, special] = self._binding.piece(self._loaded(), token, special=special)
        return data

    def ends_generation(self, token: int) -> bool:
        return token in self._ending

    def close(self) -> None:
        """The model is about to be freed."""
        self._model = None

    def _loaded(self) -> Handle:
        if self._model is None:
            raise DriverFailure("The vocabulary belongs to a model that was closed.")
        return self._model
