"""The request body of /v1/embeddings (OpenAI API reference, "Create embeddings")."""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import Field, field_validator

from stockpot.wire.shapes_common import Shape

INPUTS_MAX = 2048
_TOKEN_ID_MAX = 2**31 - 1


class EmbeddingsShape(Shape):
    """`input`: one text, several, one list of token ids, or several; `timeout` is ours."""

    model: str = Field(min_length=1, max_length=512)
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=65_536)
    timeout: float | None = Field(default=None, gt=0, description="seconds from arrival to the answer")

    @field_validator("input", mode="plain")
    @classmethod
    def _inputs(cls, value: Any) -> list[str] | list[list[int]]:
        """Always several. Checked by hand: of a union pydantic would report what is wrong with each kind."""
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            raise ValueError("must be a string, a list of strings, or token ids")  # noqa: TRY004 - for pydantic
        items = cast(list[Any], value)
        if items and _is_token(items[0]):
            items = [items]
        if not 0 < len(items) <= INPUTS_MAX:
            raise ValueError(f"must have 1 to {INPUTS_MAX} inputs")
        if all(isinstance(item, str) for item in items):
            if not all(items):
                raise ValueError("must not have an empty string in it")
        elif not all(isinstance(item, list) and _are_tokens(cast(list[Any], item)) for item in items):
            raise ValueError(f"must be a string, a list of strings, or token ids from 0 to {_TOKEN_ID_MAX}")
        return items


def _are_tokens(items: list[Any]) -> bool:
    return bool(items) and all(map(_is_token, items))


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _TOKEN_ID_MAX
