"""The one settings tree: TOML file, then environment, then command line, each overriding the one before.

Environment names are `STOCKPOT_<SECTION>__<NAME>`, for example `STOCKPOT_ENGINE__CONTEXT_TOKENS=8192`.
Units are in the names. Every value is frozen once read.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from stockpot.errors import ConfigurationError

DEFAULT_MODEL = "smollm2-135m-instruct"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Section):
    """Where and how HTTP is served."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="how long a request's body may take to arrive"
    )
    drain_s: float = Field(default=30.0, ge=0, description="how long SIGTERM waits for running requests")


class ModelSettings(_Section):
    """Which model, in which encoding, through which library."""

    source: str = Field(
        default=DEFAULT_MODEL, description="a name, a path to a .gguf, or hf:org/repo:file.gguf"
    )
    encoding: str = Field(default="auto", description="auto: the best for this machine; source: as it is")
    binding: Literal["auto", "ik", "llama-cpp"] = "auto"
    library: Literal["auto", "native", "wheel"] = Field(default="auto", description="auto: native when built")


class EngineSettings(_Section):
    """The batch and the context."""

    context_tokens: int = Field(
        default=16384, ge=256, description="cells of the context, shared by all requests"
    )
    max_sequences: int = Field(default=32, ge=1, le=255, description="requests in the batch at once")
    max_batch_tokens: int = Field(default=512, ge=16, le=8192, description="tokens of one step at most")
    prefill_tokens_beside_decode: int = Field(
        default=256, ge=8, description="prefill budget of a step in which streams are decoding"
    )
    kv_cell_type: Literal["auto", "f16", "q8_0"] = Field(
        default="auto", description="auto: q8_0 where the library is native and its kernels fit, else f16"
    )
    threads: int | None = Field(default=None, ge=1, description="None: the processors this process may use")
    queue_limit: int = Field(default=256, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0)
    check_integrity: bool = Field(
        default=False, description="verify all structures whenever idle (debugging)"
    )


class CacheSettings(_Section):
    """Prefix reuse and its tiers."""

    enabled: bool = Field(default=True, description="false: every prompt is computed whole (for comparison)")
    block_tokens: int = Field(default=256, ge=8, le=1024)
    ram_bytes: int | None = Field(
        default=None, ge=0, description="None: a quarter of free memory, 4 GiB at most"
    )


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix="STOCKPOT_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
    )

    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    cache: CacheSettings = CacheSettings()
    cache_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_cache_dir("stockpot")),
        description="models and libraries",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del dotenv_settings, file_secret_settings
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(config: Path | None = None, **overrides: Any) -> Settings:
    """Settings from `config` (or ./stockpot.toml where it exists), the environment and `overrides`.

    `overrides` are whole sections as dictionaries (`server={"port": 9000}`); values left out keep what file
    and environment say. Raises ConfigurationError with every wrong value named.
    """
    if config is None:
        default = Path("stockpot.toml")
        config = default if default.is_file() else None
    try:
        if config is not None:
            with config.open("rb") as file:
                tomllib.load(file)  # for the error message: pydantic-settings does not name the file
        fitted = type(
            "Settings", (Settings,), {"model_config": {**Settings.model_config, "toml_file": config}}
        )
        return fitted(**overrides)
    except OSError as error:
        raise ConfigurationError(f"The configuration {config} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The configuration {config} is not valid TOML: {error}.") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(f"The configuration does not fit: {wrong}.") from error
