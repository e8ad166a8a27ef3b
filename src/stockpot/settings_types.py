"""What all sections of the settings are made of: strict frozen models, and secrets by reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, SecretStr, StringConstraints


class Section(BaseModel):
    """A part of the settings: frozen, without unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _resolved(secret: SecretStr) -> SecretStr:
    """The secret a reference stands for. Errors name the reference, never a secret."""
    kind, colon, place = secret.get_secret_value().partition(":")
    if not colon or kind not in {"env", "file"}:
        return secret
    if kind == "env":
        value = os.environ.get(place)
        if value is None:
            raise ValueError(f"the environment variable {place} is not set")
        return SecretStr(value)
    try:
        return SecretStr(Path(place).expanduser().read_text(encoding="utf-8").strip())
    except (OSError, RuntimeError) as error:
        raise ValueError(f"the file {place} cannot be read: {error}") from error
    except UnicodeDecodeError:
        raise ValueError(f"the file {place} is not UTF-8 text") from None


def _fit_for_a_header(secret: SecretStr) -> SecretStr:
    key = secret.get_secret_value()
    if not key or not all("!" <= character <= "~" for character in key):
        raise ValueError("a key is printable ASCII without spaces, at least one character")
    return secret


Secret = Annotated[SecretStr, AfterValidator(_resolved)]
"""A secret as it is, or where it stands: `env:NAME` or `file:PATH` (without white space around its text)."""

KeySecret = Annotated[Secret, AfterValidator(_fit_for_a_header)]
"""A secret that is sent in a header."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""A name of ours: of a backend, a team, a tag."""

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=512)]
"""A name clients give in `model`."""
