"""Constrained output: what comes out is always what the format says, and bad schemas are refused."""

from __future__ import annotations

import json
import threading
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.engine.constraint import Constraint, ConstraintFactory, ConstraintFailed
from stockpot.engine.driver import Vocabulary
from stockpot.engine.fake_driver import FakeVocabulary
from stockpot.engine.sampling import Pick, Sampler, choose
from stockpot.errors import RequestError, UnsupportedField
from stockpot.requests import OutputFormat, Sampling

END = 258


class PiecesVocabulary(FakeVocabulary):
    """The fake vocabulary with longer tokens behind it, which cross the borders of JSON's own; its encode
    puts a blank before every text, as some SentencePiece models do."""

    PIECES = (
        *('{"', '":', '": "', '",', '", "', '"}', "}]", " {", " [", "  ", "\n  ", "\n\n"),
        *("true", "nu", "12", " a", "née", "na", "me", "€"),
    )

    def __init__(self) -> None:
        self.size = FakeVocabulary.size + len(self.PIECES) + 1  # and one id without a meaning

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        return super().encode(" " + text, special=special)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        if token < FakeVocabulary.size:
            return super().piece(token, special=special)
        pieces = [piece.encode() for piece in self.PIECES]
        return [*pieces, b""][token - FakeVocabulary.size]


PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "née": {"type": ["string", "null"], "pattern": "^[A-Z][a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", 3]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "boolean"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "tree": TREE,
    "number": {"type": "number"},
    "either": {"anyOf": [{"type": "integer", "multipleOf": 5}, {"const": {"ok": [None, "x"]}}]},
    "date": {"type": "string", "format": "date"},
    "anything": True,
    "free object": {"type": "object", "additionalProperties": {"type": "integer"}},
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"short": {"type": "string", "maxLength": 3}},
        "items": {"$ref": "#/definitions/short"},
        "type": "array",
    },
}
VOCABULARIES: dict[str, Vocabulary] = {"bytes": FakeVocabulary(), "pieces": PiecesVocabulary()}


@pytest.fixture(scope="module")
def factories() -> dict[str, ConstraintFactory]:
    return {name: ConstraintFactory(vocabulary) for name, vocabulary in VOCABULARIES.items()}


def compiled(factory: ConstraintFactory, schema: Any) -> Constraint:
    constraint = factory.compile(OutputFormat("json_schema", schema))
    assert constraint is not None
    return constraint


def written(vocabulary: Vocabulary, constraint: Constraint, *, seed: int, patience: int = 60) -> str:
    """What a model with random logits writes. After `patience` tokens it likes to close what is open."""
    random = np.random.default_rng(seed)
    closing = [token for token in range(256) if chr(token) in '"}],:0' or token == END] + [END]
    sampler = Sampler(
        Sampling(temperature=1.0),
        vocabulary=vocabulary,
        prompt=np.array([], np.int32),
        seed=seed,
        constraint=constraint,
    )
    output = b""
    for step in range(3000):
        row = random.normal(0, 3, vocabulary.size).astype(np.float32)
        if step > patience:
            row[closing] += 12
            row[ord("}")] += 12
        (pick,) = choose(row[None], [sampler])
        assert isinstance(pick, Pick), pick
        if vocabulary.ends_generation(pick.token_id):
            break
        output += vocabulary.piece(pick.token_id)
        if sampler.complete:
            break
    else:
        pytest.fail(f"no end: {output!r}")
    return output.decode("utf-8")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_output_satisfies_its_schema(
    factories: dict[str, ConstraintFactory], vocabulary: str, name: str
) -> None:
    constraint = compiled(factories[vocabulary], SCHEMAS[name])
    for seed in range(12):
        text = written(VOCABULARIES[vocabulary], constraint.fresh(), seed=seed)
        jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=jsonschema.FormatChecker())


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30)
def test_json_object_is_an_object(factories: dict[str, ConstraintFactory], seed: int) -> None:
    for name, factory in factories.items():
        constraint = factory.compile(OutputFormat("json_object"))
        assert constraint is not None
        text = written(VOCABULARIES[name], constraint, seed=seed)
        assert text.startswith("{")
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_white_space_comes_to_an_end(factories: dict[str, ConstraintFactory], vocabulary: str) -> None:
    """A model that wants nothing but blanks must write the document all the same."""
    known = VOCABULARIES[vocabulary]
    blanks = [token for token in range(known.size) if known.piece(token) and not known.piece(token).strip()]
    constraint = compiled(factories[vocabulary], PERSON)
    row = np.zeros(known.size, np.float32)
    row[ord('"')] = 5
    row[[ord("}"), ord("0")]] = 9
    row[blanks] = 10
    output = b""
    while not constraint.complete:
        allowed = row.copy()
        constraint.restrict(allowed)
        token = int(allowed.argmax())
        constraint.accept(token)
        output += known.piece(token)
        assert len(output) < 1000
    jsonschema.validate(json.loads(output), PERSON)


def test_usual_layouts_are_allowed(factories: dict[str, ConstraintFactory]) -> None:
    value = {"name": "Ada", "age": 36, "tags": ["a", 3]}
    for layout in (
        json.dumps(value),
        json.dumps(value, separators=(",", ":")),
        json.dumps(value, indent=2),
        json.dumps(value, indent="\t"),
    ):
        constraint = compiled(factories["bytes"], PERSON)
        for byte in layout.encode():
            assert not constraint.complete
            constraint.accept(byte)
        assert constraint.complete


def test_an_open_ended_value_ends_with_the_models_end_token(factories: dict[str, ConstraintFactory]) -> None:
    constraint = compiled(factories["bytes"], {"type": "integer"})
    row = np.zeros(FakeVocabulary.size, np.float32)
    constraint.restrict(row)
    assert row[END] == -np.inf
    constraint.accept(ord("1"))
    assert not constraint.complete
    row = np.zeros(FakeVocabulary.size, np.float32)
    constraint.restrict(row)
    assert row[[END, 256, ord("2")]].tolist() == [0, 0, 0]  # both tokens that end generation
    assert row[257] == row[ord("x")] == -np.inf
    constraint.accept(END)
    assert constraint.complete


def test_control_tokens_are_never_part_of_a_string(factories: dict[str, ConstraintFactory]) -> None:
    constraint = compiled(factories["bytes"], {"type": "string"})
    constraint.accept(ord('"'))
    row = np.zeros(FakeVocabulary.size, np.float32)
    constraint.restrict(row)
    assert row[ord("<")] == 0
    assert row[256:259].tolist() == [-np.inf] * 3


def test_a_token_that_may_not_follow_is_an_error(factories: dict[str, ConstraintFactory]) -> None:
    constraint = compiled(factories["bytes"], {"type": "integer"})
    with pytest.raises(ConstraintFailed, match="doesn't satisfy the grammar"):
        constraint.accept(ord("x"))
    compiled(factories["bytes"], {"type": "integer"}).accept(ord("1"))  # others are untouched


def test_fresh_constraints_are_independent(factories: dict[str, ConstraintFactory]) -> None:
    first = compiled(factories["bytes"], {"const": "ab"})
    second = first.fresh()
    for byte in b'"ab"':
        first.accept(byte)
    assert first.complete
    assert not second.complete
    second.accept(ord('"'))


def test_text_is_not_constrained(factories: dict[str, ConstraintFactory]) -> None:
    assert factories["bytes"].compile(OutputFormat()) is None


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objekt"}, "not a schema: at .*objekt"),
        ({"properties": 5}, "not a schema"),
        ({"required": "name"}, "not a schema"),
        ({"minimum": "low"}, "not a schema"),
        ({"type": "string", "pattern": "(a"}, "not a schema"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "type": 3}, "not a schema"),
        (False, "no output"),
        ({"enum": ["x" * 200_000]}, "200014 characters; at most 131072"),
        (None, "object or true, not NoneType"),
        ({"const": {1, 2}}, "not JSON"),
    ],
)
def test_what_is_no_schema_is_refused(
    factories: dict[str, ConstraintFactory], schema: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        factories["bytes"].compile(OutputFormat("json_schema", schema))
    assert (caught.value.status, caught.value.param) == (400, "response_format")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"$ref": "https://example.org/schema.json"}, "example.org"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "enforced"),
        ({"$ref": "#"}, "no finite document"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    factories: dict[str, ConstraintFactory], schema: Any, message: str
) -> None:
    with pytest.raises(UnsupportedField, match=message) as caught:
        factories["bytes"].compile(OutputFormat("json_schema", schema))
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("depth", [130, 5000])
def test_bottomless_schemas_are_refused(factories: dict[str, ConstraintFactory], depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(RequestError, match=r"nested|recursion"):
        factories["bytes"].compile(OutputFormat("json_schema", schema))


def test_a_model_without_an_end_token_cannot_be_constrained() -> None:
    class Endless(FakeVocabulary):
        def ends_generation(self, token: int) -> bool:
            return False

    with pytest.raises(UnsupportedField, match="no token to end"):
        ConstraintFactory(Endless()).compile(OutputFormat("json_object"))


def test_a_small_cache_of_compiled_schemas_serves_many_threads() -> None:
    factory = ConstraintFactory(FakeVocabulary(), capacity=2)
    failures: list[Exception] = []

    def work(offset: int) -> None:
        try:
            for number in range(12):
                constraint = compiled(factory, {"const": (number + offset) % 4})
                constraint.accept(ord("0") + (number + offset) % 4)
                assert constraint.complete
        except (ConstraintFailed, AssertionError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
