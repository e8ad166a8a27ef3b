"""What the request bodies of chat and plain completions have in common, strictly typed.

Names and ranges are those of the OpenAI API; `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are
the extensions vLLM and llama-server know under the same names, `timeout` is ours. `cache_control` is that of
the Anthropic API ("Prompt caching"), and `scope`, `tags` and `document` in it are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

TTL_S: Mapping[str, int] = {"5m": 300, "1h": 3600}
"""How long what stands before a boundary may be asked to be kept, in seconds, as the wire spells it."""

DOCUMENT_TAG = "document:"
"""What the tag of a document begins with, and no other."""

_FIELDS_MAX = 256
"""Of an object whose fields are known. Objects that clients fill as they like (schemas) are none."""

_LABEL_LENGTH_MAX = 64
_TAGS_MAX = 16
_TOKEN_COUNT_MAX = 2**31 - 1
_LOGIT_BIAS_ENTRIES_MAX = 4096


def _fail_fast(schema: Any) -> None:
    """All lists of a schema end at their first item that does not fit."""
    if isinstance(schema, dict):
        parts = cast(dict[str, Any], schema)
        if parts.get("type") == "list":
            parts["fail_fast"] = True
        for part in parts.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in cast(list[Any], schema):
            _fail_fast(part)


class Shape(BaseModel):
    """Strict: no string becomes a number, no number a boolean; no field that is not declared.

    Only the first thing that is wrong is told, so only few are looked for: pydantic would make an error of
    each, and of a body that is a list of four million numbers gigabytes of them.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(cast(dict[Any, Any], value)) > _FIELDS_MAX:
            raise PydanticCustomError(
                "too_many_fields", "Input should have at most {most} fields", {"most": _FIELDS_MAX}
            )
        return cast(Any, value)


def _label(value: str) -> str:
    if not (0 < len(value) <= _LABEL_LENGTH_MAX and value.isascii() and value.isprintable()):
        raise ValueError(f"must be 1 to {_LABEL_LENGTH_MAX} printable ASCII characters")
    return value


def _tag(value: str) -> str:
    if value.startswith(DOCUMENT_TAG):
        raise ValueError(f"must not begin with '{DOCUMENT_TAG}'; name the document in 'document'")
    return _label(value)


class CacheControl(Shape):
    """A boundary: what precedes it is to be kept for `ttl` (left out: 5m) from its last use on.

    `scope` shared: what precedes it is no secret, every tenant may find it in the cache. `tags` and
    `document` name what precedes it for invalidation.
    """

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: Literal["private", "shared"] | None = None
    tags: list[Annotated[str, AfterValidator(_tag)]] | None = Field(default=None, max_length=_TAGS_MAX)
    document: Annotated[str, AfterValidator(_label)] | None = None


class StreamOptions(Shape):
    """`include_usage`: a last chunk with `usage` comes before `[DONE]`. `include_progress` (ours): while the
    request waits, its place in the queue and its prefill are told in events of their own."""

    include_usage: bool | None = None
    include_progress: bool | None = None


class GenerationShape(Shape):
    """Fields of both kinds of completion. None stands for left out."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=_TOKEN_COUNT_MAX)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[int, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: list[Annotated[str, Field(min_length=1, max_length=1024)]] | None = Field(
        default=None, max_length=16
    )
    max_tokens: int | None = Field(default=None, ge=1, le=_TOKEN_COUNT_MAX)
    n: int | None = Field(default=None, ge=1, le=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    timeout: float | None = Field(default=None, gt=0, description="seconds from arrival to the last token")
    cache_control: CacheControl | None = Field(
        default=None, description="a boundary at the end of a plain prompt; a chat has them on its messages"
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="plain")
    @classmethod
    def _token_ids(cls, value: Any) -> dict[int, float] | None:
        """JSON objects have strings for keys; ours must spell token ids."""
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ValueError("must be an object that maps token ids to numbers")  # noqa: TRY004 - for pydantic
        if len(cast(Mapping[Any, Any], value)) > _LOGIT_BIAS_ENTRIES_MAX:
            raise ValueError(f"must have at most {_LOGIT_BIAS_ENTRIES_MAX} entries")
        biases: dict[int, float] = {}
        for token, bias in cast(Mapping[Any, Any], value).items():
            if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10):
                raise ValueError("must have token ids (digits) as keys")
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise ValueError("must have numbers from -100 to 100 as values")
            biases[int(token)] = float(bias)
        return biases
