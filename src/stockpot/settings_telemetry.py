"""The settings of telemetry: where traces go, and what log lines look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from stockpot.settings_types import Secret, Section

TRACES_PATH = "/v1/traces"

LogFormat = Literal["text", "json"]


class RecordingSettings(Section):
    """The last requests as they were sent, for `stockpot doctor --live`: prompts, so they stay in memory, and
    administrators alone may read them. With `path` they are written there too, a line of JSON each."""

    mode: Literal["auto", "on", "off"] = Field(
        default="auto", description="auto: on where this machine alone is served and nobody needs a key"
    )
    requests: int = Field(default=1_000, ge=1, le=100_000, description="held in memory at most")
    memory_bytes: int = Field(default=64 * 2**20, ge=2**16, description="of bodies held in memory at most")
    path: Path | None = Field(default=None, description="a file to append them to; None: memory alone")
    path_bytes: int = Field(
        default=2**30, ge=2**20, description="then the file becomes NAME.1, in place of the one before it"
    )


class TelemetrySettings(Section):
    """Traces need the extra `stockpot[otel]`; metrics are at /metrics whatever is set here."""

    otlp_endpoint: str | None = Field(
        default=None,
        description="an OpenTelemetry collector (OTLP over HTTP), as http://127.0.0.1:4318; None: no traces",
    )
    otlp_headers: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]+$")], Secret] = Field(
        default_factory=dict[str, Secret], description="sent to the collector, for example its key"
    )
    service_name: str = Field(default="stockpot", min_length=1)
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="of the requests that come without a trace of their own; the others do as theirs says",
    )
    log_format: LogFormat = "text"
    log_prompts: bool = Field(
        default=False, description="the text of prompts goes into spans; log lines never have it"
    )

    recording: RecordingSettings = RecordingSettings()

    @field_validator("otlp_endpoint")
    @classmethod
    def _base_url(cls, value: str | None) -> str | None:
        """Without the last part, which is the same for all collectors."""
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https:// (OTLP over gRPC is not spoken)")
        return value.rstrip("/").removesuffix(TRACES_PATH)
