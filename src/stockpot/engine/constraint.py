"""Output that must be JSON: which tokens may follow, at every step.

The grammar work is llguidance's (https://github.com/guidance-ai/llguidance), which knows the vocabulary by
the bytes of its tokens and nothing of the model, so this does not depend on the binding. What it departs
from in JSON Schema: properties come in the order the schema lists them, `format` is enforced, and keys
under `additionalProperties` may repeat. What it cannot enforce it refuses, and so do we.

White space between the parts of a document is one space, or one line break with an indentation; a model
that likes blanks cannot fill its answer with them.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any, cast

import numpy as np
from jsonschema.exceptions import SchemaError
from jsonschema.validators import Draft202012Validator, validator_for
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from stockpot.engine.control_tokens import control_spellings
from stockpot.engine.driver import Vocabulary
from stockpot.errors import RequestError, StockpotError, UnsupportedField
from stockpot.requests import OutputFormat

_PARAM = "response_format"
_LONGEST_TOKEN_BYTES = 64
_MESSAGE_CHARACTERS = 500
_SCHEMA_CHARACTERS = 2**17  # checking one of this size takes about a second
_WHITE_SPACE = r"[\x20]|\n(?:[\x20]{0,40}|\t{0,10})"


class ConstraintFailed(StockpotError):
    """The grammar cannot go on: a token it does not allow, or work beyond its limits. Ends one choice."""


class Constraint:
    """The state of one constrained output. Used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, additions: NDArray[np.float32], vocabulary_size: int) -> None:
        self._matcher = matcher
        self._additions = additions
        self._size = vocabulary_size
        words = (vocabulary_size + 31) // 32
        self._mask = np.zeros(4 * words, np.uint8)
        self._expanded = np.empty((4 * words, 8), np.float32)

    @property
    def complete(self) -> bool:
        """Nothing may follow: the output must stop here. (An output that may also go on, such as the number
        12, ends with the model's own end token, which `restrict` then allows.)"""
        return self._matcher.is_stopped()

    def restrict(self, row: NDArray[np.float32]) -> None:
        """Set the logits of tokens that may not follow to -inf. `row` has shape (vocabulary size,).

        Raises ConstraintFailed when the grammar is beyond its limits.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        # One gather of eight additions a mask byte: constant time, where selecting by a boolean mask costs
        # up to ten times as much when allowed and forbidden tokens alternate.
        np.take(self._additions, self._mask, axis=0, out=self._expanded, mode="clip")
        row += self._expanded.reshape(-1)[: self._size]

    def accept(self, token: int) -> None:
        """The output goes on with `token`. Raises ConstraintFailed if it may not."""
        self._matcher.consume_token(token)
        self._check()

    def fresh(self) -> Constraint:
        """The same constraint in the same state, independent from here on: one for each choice."""
        return Constraint(self._matcher.deep_copy(), self._additions, self._size)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise ConstraintFailed(f"The constrained output cannot go on: {reason}. Simplify the schema.")


class ConstraintFactory:
    """Compiles output formats for one vocabulary. Safe to call from any thread.

    The first compile reads the whole vocabulary (0.1 to 0.2 s for 49,152 tokens), later ones take a few
    milliseconds for a schema of ordinary size and up to seconds for a hostile one: call it off the event
    loop. The last `capacity` compiled schemas are kept.
    """

    def __init__(self, vocabulary: Vocabulary, *, capacity: int = 64) -> None:
        self._vocabulary = vocabulary
        self._capacity = capacity
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._additions = _additions()
        self._compiled: OrderedDict[str, Constraint] = OrderedDict()

    def compile(self, output_format: OutputFormat) -> Constraint | None:
        """A new constraint at its start; None for free text.

        Raises RequestError for what is not a JSON schema, and UnsupportedField for a schema that is valid but
        cannot be enforced.
        """
        if output_format.kind == "text":
            return None
        schema = {"type": "object"} if output_format.kind == "json_object" else output_format.schema
        text = _checked_schema(schema)
        with self._lock:
            known = self._compiled.get(text)
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._vocabulary)
        if known is None:  # without the lock: a large schema must not make the others wait
            known = self._compile(text, self._tokenizer)
        with self._lock:
            self._compiled[text] = known
            self._compiled.move_to_end(text)
            if len(self._compiled) > self._capacity:
                self._compiled.popitem(last=False)
        return known.fresh()

    def _compile(self, schema: str, tokenizer: LLTokenizer) -> Constraint:
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": _WHITE_SPACE}
            )
        except ValueError as error:  # for instance nested deeper than the library's parser goes
            raise RequestError(f"The JSON schema cannot be read: {error}.", param=_PARAM) from error
        # A lexer state takes up to 2 kB; without a bound of our own one request could claim half a gigabyte.
        limits = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        matcher.compute_bitmask()  # finds schemas that no document satisfies; its work is in every copy
        if matcher.is_error():
            reason = _first_line(matcher.get_error())
            raise UnsupportedField(f"The JSON schema cannot be enforced: {reason}.", param=_PARAM)
        return Constraint(matcher, self._additions, self._vocabulary.size)


def _checked_schema(schema: object) -> str:
    """The schema as text (properties in their order, which matters), once it is known to be a schema."""
    if schema is True:
        return "{}"
    if schema is False:
        raise RequestError("The JSON schema `false` allows no output at all.", param=_PARAM)
    if not isinstance(schema, dict):
        raise RequestError(
            f"The JSON schema must be an object or true, not {type(schema).__name__}.", param=_PARAM
        )
    schema = cast("dict[str, Any]", schema)
    if "x-guidance" in schema:  # options of llguidance, with which a schema could switch its checks off
        raise UnsupportedField("The schema key `x-guidance` is not supported; leave it out.", param=_PARAM)
    try:
        text = json.dumps(schema, ensure_ascii=False)
        if len(text) > _SCHEMA_CHARACTERS:
            raise RequestError(
                f"The JSON schema has {len(text)} characters; at most {_SCHEMA_CHARACTERS} are taken.",
                param=_PARAM,
            )
        validator_for(schema, Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        raise RequestError(
            f"The JSON schema is not a schema: at {error.json_path}: {error.message[:_MESSAGE_CHARACTERS]}.",
            param=_PARAM,
        ) from error
    except RecursionError as error:
        raise RequestError("The JSON schema is nested too deeply.", param=_PARAM) from error
    except (TypeError, ValueError) as error:
        raise RequestError(f"The JSON schema is not JSON: {error}.", param=_PARAM) from error
    return text


def _tokenizer(vocabulary: Vocabulary) -> LLTokenizer:
    ends = [token for token in range(vocabulary.size) if vocabulary.ends_generation(token)]
    if not ends:
        raise UnsupportedField(
            "This model has no token to end an answer with, so its output cannot be constrained.",
            param=_PARAM,
        )
    source = _TokenSource(vocabulary, ends[0])
    # With its default slices (token sets made ready for usual strings): on 49,152 tokens they cost 60 ms
    # here and bring the mean mask inside a JSON document from 117 to 11 microseconds.
    return LLTokenizer(TokenizerWrapper(source), n_vocab=vocabulary.size, eos_token=ends)


class _TokenSource:
    """The vocabulary in the form llguidance's TokenizerWrapper reads."""

    def __init__(self, vocabulary: Vocabulary, end: int) -> None:
        self.eos_token_id = end
        self.bos_token_id = vocabulary.begin_token
        self.tokens = [vocabulary.piece(token, special=True) for token in range(vocabulary.size)]
        self.special_token_ids = list(control_spellings(vocabulary))
        self._vocabulary = vocabulary
        special = frozenset(self.special_token_ids)
        self._ids = {piece: token for token, piece in enumerate(self.tokens) if token not in special}

    def __call__(self, text: bytes) -> list[int]:
        """Tokens for bytes that the grammar forces, as the model would have them; it is asked for these so
        that a forced `{"name":` is not spelled letter by letter."""
        tokens = self._vocabulary.encode(text.decode("utf-8", errors="replace"), special=False)
        if b"".join(self.tokens[token] for token in tokens) == text:
            return tokens
        # Some vocabularies put a blank before a text; then the longest pieces that spell it have to do.
        tokens = list[int]()
        place = 0
        while place < len(text):
            longest = min(_LONGEST_TOKEN_BYTES, len(text) - place)
            ends = (place + length for length in range(longest, 0, -1))
            end = next((end for end in ends if text[place:end] in self._ids), None)
            if end is None:
                break
            tokens.append(self._ids[text[place:end]])
            place = end
        return tokens


def _additions() -> NDArray[np.float32]:
    """What a mask byte adds to the logits of its eight tokens, lowest bit first: 0 or -inf."""
    allowed = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(allowed, np.float32(0), np.float32(-np.inf))


def _first_line(message: str) -> str:
    """llguidance adds its state on further lines; of an error in a regex, the last line says why."""
    lines = [line for line in message.splitlines() if line.strip() and not line.startswith("<")]
    if not lines:
        return "no reason given"
    if lines[0].startswith("NoExtension"):
        return "no finite document satisfies it"
    line = lines[-1] if lines[0].startswith("regex parse error") else lines[0]
    return line.removeprefix("error: ").rstrip(".")[:_MESSAGE_CHARACTERS]
