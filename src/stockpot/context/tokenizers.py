"""Exact token counts: from a GGUF file's vocabulary, a tokenizer.json, or a server that counts.

What was counted is remembered for the last texts. A text is counted by itself: what a chat template puts
around it is not in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stockpot.context.tokens import EstimatedTokens, TokenCounter
from stockpot.errors import ConfigurationError, ServerUnreachable

if TYPE_CHECKING:
    from stockpot.engine.driver import Vocabulary

_COUNTS_MAX = 20_000
_TIMEOUT_S = 30.0


def open_counter(source: str, *, cache_dir: Path | None = None) -> TokenCounter:
    """The counter for `source`: "estimate", a path of a tokenizer.json or a .gguf, a known model's name, or
    the address of a server (http://...). Raises ConfigurationError, ModelError."""
    if source == "estimate":
        return EstimatedTokens()
    if source.startswith(("http://", "https://")):
        return ServerTokens(source)
    if source.endswith(".json"):
        return JsonTokens(Path(source))
    return GgufTokens.of(source, cache_dir)


class ExactTokens(ABC):
    """A `TokenCounter` with a memory."""

    exact = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def count(self, text: str) -> int:
        """See `TokenCounter`."""
        if not text:
            return 0
        data = text.encode("utf-8", "replace")
        key = blake2b(data, digest_size=16).digest()
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = self._count(data.decode())
            if len(self._counts) > _COUNTS_MAX:
                self._counts.popitem(last=False)
        return count

    @abstractmethod
    def _count(self, text: str) -> int: ...


class JsonTokens(ExactTokens):
    """By a Hugging Face `tokenizer.json`. Raises ConfigurationError for what is none."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        super().__init__(path.name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The tokenizer {path} cannot be read: {error}.") from error
        made: Any = Tokenizer
        try:
            self._tokenizer: Any = made.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise ConfigurationError(f"{path} is no tokenizer.json: {error}.") from error

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


class GgufTokens(ExactTokens):
    """By the vocabulary of a model file, through the library that runs it; the weights are not read."""

    def __init__(self, name: str, vocabulary: Vocabulary) -> None:
        super().__init__(name)
        self.vocabulary = vocabulary

    @classmethod
    def of(cls, source: str, cache_dir: Path | None = None) -> GgufTokens:
        """Of a path, or a name that `stockpot models` knows. Raises ModelError and its kinds,
        BindingUnavailable."""
        import platformdirs

        from stockpot.engine.bindings.choice import choose_binding, load
        from stockpot.engine.llamacpp_vocabulary import LlamaVocabulary
        from stockpot.models.gguf import read_facts
        from stockpot.models.source import locate

        folder = cache_dir or Path(platformdirs.user_cache_dir("stockpot"))
        located = locate(source, cache_dir=folder)
        architecture = read_facts(located.path).architecture
        binding = load(choose_binding(architecture, "auto", "auto", cache_dir=folder))
        model = binding.load_model(located.path, vocabulary_only=True)
        return cls(located.name, LlamaVocabulary(binding, model))

    def _count(self, text: str) -> int:
        return len(self.vocabulary.encode(text, special=False))


class ServerTokens(ExactTokens):
    """By the `/tokenize` of Stockpot, vLLM or llama-server. `count` raises ServerUnreachable."""

    def __init__(self, url: str, *, model: str = "", api_key: str | None = None) -> None:
        super().__init__(url)
        self._root = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    def _count(self, text: str) -> int:
        import httpx2

        # vLLM reads `prompt`, llama-server and Stockpot `content`.
        model = self._model or self._first_model()
        address = f"{self._root}/tokenize"
        try:
            for body in ({"model": model, "content": text}, {"model": model, "prompt": text}):
                response = httpx2.post(
                    address,
                    json={**body, "add_special_tokens": False} if "prompt" in body else body,
                    headers=self._headers,
                    timeout=_TIMEOUT_S,
                )
                if response.is_success:
                    return _counted(response.json())
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            raise ServerUnreachable(f"{address} does not count tokens: {error}.") from error
        raise ServerUnreachable(f"{address} answers {response.status_code}; it counts no tokens.")

    def _first_model(self) -> str:
        import httpx2

        try:
            found: Any = httpx2.get(
                f"{self._root}/v1/models", headers=self._headers, timeout=_TIMEOUT_S
            ).json()
            self._model = str(found["data"][0]["id"])
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, KeyError, IndexError, TypeError) as error:
            raise ServerUnreachable(f"{self._root} names no model: {error!r}.") from error
        return self._model


def _counted(answer: Any) -> int:
    """Raises ValueError for an answer of another kind."""
    if isinstance(answer, dict):
        known = cast("dict[str, Any]", answer)
        if isinstance(count := known.get("count"), int):
            return count
        if isinstance(tokens := known.get("tokens"), list):
            return len(cast("list[Any]", tokens))
    raise ValueError(f"neither 'count' nor 'tokens' in {answer!r:.100}")
