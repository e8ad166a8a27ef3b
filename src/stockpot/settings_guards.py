"""The settings of guards: rules over what goes to a model and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from stockpot.settings_types import ModelName, Section

Action = Literal["note", "redact", "retry", "refuse"]
"""note: counted and told, nothing else. redact: what was found is replaced. retry (of answers): asked once
more, then refused. refuse: the request ends with an error that names the rule."""

Stage = Literal["input", "output", "both"]


class GuardSettings(Section):
    """One rule. Its name, the key in [guards], is what clients and metrics are told."""

    rule: Literal["secrets", "personal-data", "block-list", "pattern", "json-schema", "classifier"]
    on: Stage = "both"
    action: Action = "refuse"
    models: tuple[ModelName, ...] = Field(default=(), description="names clients ask for; empty: all")
    teams: tuple[str, ...] = Field(default=(), description="empty: all")
    kinds: tuple[str, ...] = Field(default=(), description="of secrets or personal data; empty: all")
    words: tuple[str, ...] = Field(default=(), description="block-list: words or phrases, in any case")
    words_file: Path | None = Field(default=None, description="block-list: one to a line")
    pattern: str | None = Field(default=None, description="pattern: must match the whole answer")
    schema_: Mapping[str, Any] | None = Field(default=None, alias="schema", description="json-schema")
    classifier: str | None = Field(
        default=None, description="module:function, from a text to a score or a bool; may be async"
    )
    judge: ModelName | None = Field(default=None, description="classifier: a model that is asked instead")
    instruction: str | None = Field(default=None, description="what the judge is asked about a text")
    threshold: float = Field(default=0.5, ge=0, le=1, description="of the score; from here on it is found")
    timeout_s: float = Field(default=10.0, gt=0)
    when_it_fails: Literal["refuse", "allow"] = "refuse"

    @model_validator(mode="after")
    def _fits(self) -> GuardSettings:
        wanted = {
            "block-list": bool(self.words or self.words_file),
            "pattern": self.pattern is not None,
            "json-schema": self.schema_ is not None,
            "classifier": (self.classifier is None) != (self.judge is None),
        }
        if not wanted.get(self.rule, True):
            needs = {
                "block-list": "'words' or 'words_file'",
                "pattern": "'pattern'",
                "json-schema": "'schema'",
                "classifier": "either 'classifier' or 'judge'",
            }
            raise ValueError(f"a rule of this kind needs {needs[self.rule]}")
        if self.rule in ("pattern", "json-schema") and self.on == "input":
            raise ValueError('this rule is about answers; set on = "output"')
        if self.action == "retry" and self.on != "output":
            raise ValueError('only answers can be asked for again; set on = "output", or another action')
        if self.action == "redact" and self.rule in ("pattern", "json-schema", "classifier"):
            raise ValueError(
                "this rule finds no place in a text that could be redacted; choose another action"
            )
        return self
