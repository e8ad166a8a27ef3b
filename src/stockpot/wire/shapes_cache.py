"""The request bodies and query parameters of /admin/cache/..., strictly typed."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from starlette.datastructures import QueryParams

from stockpot.errors import RequestError, UnsupportedField
from stockpot.wire.shapes_chat import MessageShape
from stockpot.wire.shapes_common import Shape

PIN_S_MAX = 30 * 86_400
"""A pin that nobody ends ends by itself, after a month at most."""

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_TENANT = re.compile(r"(?:[a-z0-9][a-z0-9_-]{0,63})?")
_TOKEN_ID_MAX = 2**31 - 1


def duration_s(text: str) -> int:
    """Seconds of "90s", "5m", "2h" or "1d". Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= PIN_S_MAX:
        raise ValueError(f"must be a time such as '90s', '5m', '2h' or '1d', {PIN_S_MAX // 86_400}d at most")
    return seconds


def _duration(text: str) -> str:
    duration_s(text)
    return text


def _tenant(name: str) -> str:
    if not _TENANT.fullmatch(name):
        raise ValueError(
            "must be the name of a tenant (access.tenants), or empty for prompts that belong to nobody"
        )
    return name


def _name(text: str) -> str:
    if not (text.strip() and text.isprintable()):
        raise ValueError("must be printable text, not empty")
    return text


Tenant = Annotated[str, AfterValidator(_tenant)]
Name = Annotated[str, Field(max_length=128), AfterValidator(_name)]
"""What somebody is called, or a short reason: it goes into logs and explanations."""


class NoFields(Shape):
    """A body that says nothing."""


class PromptStart(Shape):
    """How a prompt begins: a text as /v1/completions takes it, token ids, or the first messages of a chat."""

    text: str | None = Field(default=None, min_length=1)
    tokens: list[Annotated[int, Field(ge=0, le=_TOKEN_ID_MAX)]] | None = Field(default=None, min_length=1)
    messages: list[MessageShape] | None = Field(default=None, min_length=1)

    @property
    def given(self) -> int:
        """How many of the three there are; one is right."""
        return sum(each is not None for each in (self.text, self.tokens, self.messages))


class PinShape(PromptStart):
    """The time is given as seconds (`for_s`) or as text (`for`)."""

    tenant: Tenant = ""
    owner: Name
    for_s: float | None = Field(default=None, gt=0, le=PIN_S_MAX)
    for_: Annotated[str, AfterValidator(_duration)] | None = Field(default=None, alias="for")


class InvalidateShape(PromptStart):
    """`value` is the tenant, tag, document or model; a prefix is given by one of text, tokens and messages.
    `tenant` restricts a tag, document or prefix; left out: all tenants. `by` is who asks, for the record."""

    kind: Literal["all", "tenant", "tag", "document", "model", "prefix"]
    value: str | None = Field(default=None, max_length=512)
    tenant: Tenant | None = None
    by: Name | None = None
    reason: Name | None = None


class WarmShape(Shape):
    """A prompt to prefill: a text, or a chat, whose boundaries (`cache_control`) are honoured."""

    model: str | None = Field(default=None, min_length=1, max_length=512)
    prompt: str | None = Field(default=None, min_length=1)
    messages: list[MessageShape] | None = Field(default=None, min_length=1)
    tenant: Tenant = ""


class ExportShape(Shape):
    """`folder`: an absolute path on the server's machine."""

    folder: str = Field(min_length=1, max_length=4_096)


class Query:
    """The query of a request, of which only the parameters `allowed` may be there, each once."""

    def __init__(self, parameters: QueryParams, *allowed: str) -> None:
        for name in parameters:
            if name not in allowed:
                known = f"; it takes {', '.join(allowed)}" if allowed else ""
                raise UnsupportedField(
                    f"The query parameter {name[:80]!r} is not supported here{known}; remove it.",
                    param=name[:80],
                )
            if len(parameters.getlist(name)) > 1:
                raise RequestError(f"The query parameter {name!r} is there twice; send it once.", param=name)
        self._parameters = parameters

    def count(self, name: str, default: int, *, most: int) -> int:
        """A number from 1 to `most`."""
        text = self._parameters.get(name)
        if text is None:
            return default
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
            raise _wrong(name, f"must be a number from 1 to {most}", text)
        return int(text)

    def tenant(self, name: str) -> str | None:
        """A tenant, "" for nobody; None where it is left out."""
        text = self._parameters.get(name)
        if text is None:
            return None
        try:
            return _tenant(text)
        except ValueError as error:
            raise _wrong(name, str(error), text) from error


def _wrong(name: str, words: str, value: Any) -> RequestError:
    return RequestError(f"'{name}' {words}; got {value[:60]!r}.", param=name)
