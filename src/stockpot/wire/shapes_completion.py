"""The request bodies of /v1/completions (OpenAI API reference, "Create completion") and /tokenize."""

from __future__ import annotations

from typing import Any, cast

from pydantic import Field, field_validator

from stockpot.wire.shapes_chat import MessageShape
from stockpot.wire.shapes_common import GenerationShape, Shape

_TOKEN_ID_MAX = 2**31 - 1


class CompletionShape(GenerationShape):
    """`prompt`: one text or one list of token ids; either may stand alone in a list."""

    prompt: str | list[int]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _one_prompt(cls, value: Any) -> str | list[int]:
        if isinstance(value, list) and len(cast(list[Any], value)) == 1 and not _is_token(value[0]):
            value = cast(list[Any], value)[0]
        if isinstance(value, str):
            if not value:
                raise ValueError("must not be empty")
            return value
        if not isinstance(value, list):
            raise ValueError("must be a string or a list of token ids")  # noqa: TRY004 - for pydantic
        items = cast(list[Any], value)
        if not items:
            raise ValueError("must not be empty")
        if all(isinstance(item, str | list) for item in items):
            raise ValueError("must be one prompt; send several as requests of their own")
        if not all(_is_token(item) for item in items):
            raise ValueError(f"must be a string or a list of token ids from 0 to {_TOKEN_ID_MAX}")
        return items


class TokenizeShape(Shape):
    """Either `text` or `messages` (rendered with the model's chat template).

    With `special`, the spelling of a control token in `text` is that token.
    """

    model: str = Field(min_length=1, max_length=512)
    text: str | None = None
    messages: list[MessageShape] | None = Field(default=None, min_length=1)
    special: bool = True


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _TOKEN_ID_MAX
