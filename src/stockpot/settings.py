"""The one settings tree: TOML file, then environment, then command line, each overriding the one before.

Environment names are `STOCKPOT_<SECTION>__<NAME>`, for example `STOCKPOT_ENGINE__CONTEXT_TOKENS=8192`.
Units are in the names. Every value is frozen once read.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from stockpot.errors import ConfigurationError
from stockpot.settings_gateway import (
    AccountSettings,
    AllowanceSettings,
    BackendSettings,
    HardwareSettings,
    ResilienceSettings,
    RouteSettings,
    RoutingSettings,
    TeamSettings,
)
from stockpot.settings_guards import GuardSettings
from stockpot.settings_problems import problems
from stockpot.settings_recall import RecallSettings
from stockpot.settings_telemetry import TelemetrySettings
from stockpot.settings_types import KeySecret, ModelName, Name, Secret, Section

DEFAULT_MODEL = "smollm2-135m-instruct"


class ServerSettings(Section):
    """Where and how HTTP is served."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    body_timeout_s: float = Field(
        default=60.0, gt=0, description="how long a request's body may take to arrive"
    )
    trusted_proxies: tuple[str, ...] = Field(
        default=(),
        description="addresses or networks whose X-Forwarded-For is believed; empty: nobody's",
    )
    drain_s: float = Field(default=30.0, ge=0, description="how long SIGTERM waits for running requests")


class ModelSettings(Section):
    """Which model, in which encoding, through which library."""

    source: str = Field(
        default=DEFAULT_MODEL, description="a name, a path to a .gguf, or hf:org/repo:file.gguf"
    )
    encoding: str = Field(default="auto", description="auto: the best for this machine; source: as it is")
    binding: Literal["auto", "ik", "llama-cpp"] = "auto"
    library: Literal["auto", "native", "wheel"] = Field(default="auto", description="auto: native when built")


class EngineSettings(Section):
    """The engine in this process: the batch and the context."""

    enabled: bool = Field(
        default=True, description="false: no model is loaded, this is a gateway to other servers alone"
    )
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
    hardware: HardwareSettings | None = Field(
        default=None, description="what this machine costs; None: its requests have no price"
    )
    check_integrity: bool = Field(
        default=False, description="verify all structures whenever idle (debugging)"
    )


class DiskSettings(Section):
    """The disk tier: blocks in one folder, which several servers may share."""

    path: Path | None = Field(default=None, description="None: the folder kv in cache_dir")
    capacity_bytes: int | None = Field(
        default=None, ge=0, description="None: a tenth of the free disk, 8 GiB at most; 0: no disk tier"
    )


class RedisSettings(Section):
    """The Redis tier (Redis 7 or newer, or Valkey), shared by all nodes. Needs `cache.secret`."""

    url: str | None = Field(default=None, description="redis://, rediss:// or unix://; None: no Redis tier")
    username: str | None = None
    password: Secret | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    verify: bool = Field(default=True, description="whether the server's TLS certificate is checked")
    prefix: str = Field(default="stockpot", description="what every key begins with")
    ttl_s: int = Field(default=86_400, ge=1, description="how long a block stays after its last use")
    timeout_s: float = Field(default=0.05, gt=0, le=10, description="without progress, a call is given up")
    max_value_bytes: int = Field(
        default=2**20, ge=1024, description="a block is cut into values of this size"
    )


class KvEventSettings(Section):
    """KV events on ZeroMQ in vLLM's format. They carry the token ids of prompts and nobody is asked who reads
    them: keep the addresses on this machine or a private network."""

    endpoint: str | None = Field(
        default=None, description="for example tcp://127.0.0.1:5557; None: no events"
    )
    replay_endpoint: str | None = None
    topic: str = ""
    short_hashes: bool = Field(default=False, description="64-bit numbers for block hashes, as vLLM has them")


class CacheSettings(Section):
    """Prefix reuse and its tiers."""

    enabled: bool = Field(default=True, description="false: every prompt is computed whole (for comparison)")
    automatic: bool = Field(
        default=True,
        description="false: only what precedes a boundary (`cache_control`) is kept and found, as with"
        " providers that must be told what to cache",
    )
    marker: str = Field(
        default="// __CACHE_END__",
        max_length=200,
        description="a line of a prompt or of instructions that is a boundary, and is taken out; empty: none",
    )
    block_tokens: int = Field(default=256, ge=8, le=1024)
    ram_bytes: int | None = Field(
        default=None, ge=0, description="None: a quarter of free memory, 4 GiB at most"
    )
    policy: Literal["lru", "lfu", "s3-fifo", "lifo", "ttl", "cost"] = Field(
        default="lru", description="which blocks leave RAM first"
    )
    policy_ttl_s: float = Field(default=3600.0, gt=0, description="for the policy ttl: how long unused")
    yield_memory: bool = Field(default=True, description="give RAM back before the machine runs short of it")
    write_behind_bytes: int = Field(
        default=256 * 2**20, ge=0, description="what may wait to be written to a tier behind RAM"
    )
    secret: Secret | None = Field(
        default=None, description="16 bytes or more, the same on all nodes: blocks carry a MAC made with it"
    )
    encrypt: bool = Field(default=False, description="blocks behind RAM are encrypted (AES-256-GCM)")
    disk: DiskSettings = DiskSettings()
    redis: RedisSettings = RedisSettings()
    events: KvEventSettings = KvEventSettings()


class TenantSettings(Section):
    """One tenant: the key its clients send, and how much of the RAM tier it may hold."""

    key: KeySecret
    ram_quota_bytes: int | None = Field(default=None, ge=0, description="None: as much as there is")


class AccessSettings(Section):
    """Who may call. Without tenants and virtual keys everybody may; without an admin key this machine alone
    administers."""

    keys: Literal["auto", "required"] = Field(
        default="auto", description="auto: a key is asked for as soon as there is one"
    )
    admin_key: KeySecret | None = None
    metrics: Literal["open", "admin"] = Field(
        default="open", description="who may read /metrics, which tells names of teams and models, and sums"
    )
    tenants: dict[
        Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")], TenantSettings
    ] = Field(default_factory=dict[str, TenantSettings])

    @model_validator(mode="after")
    def _keys_differ(self) -> AccessSettings:
        owners: dict[str, str] = {}
        named = {f"tenants.{name}.key": tenant.key for name, tenant in self.tenants.items()}
        for owner, key in {"admin_key": self.admin_key, **named}.items():
            if key is None:
                continue
            other = owners.setdefault(key.get_secret_value(), owner)
            if other != owner:
                raise ValueError(f"{other} and {owner} are the same key; each needs one of its own")
        return self


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        env_prefix="STOCKPOT_",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        nested_model_default_partial_update=True,
        hide_input_in_errors=True,  # it may be a secret
    )

    server: ServerSettings = ServerSettings()
    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    cache: CacheSettings = CacheSettings()
    access: AccessSettings = AccessSettings()
    backends: dict[Name, BackendSettings] = Field(default_factory=dict[Name, BackendSettings])
    routes: dict[ModelName, RouteSettings] = Field(default_factory=dict[ModelName, RouteSettings])
    teams: dict[Name, TeamSettings] = Field(default_factory=dict[Name, TeamSettings])
    routing: RoutingSettings = RoutingSettings()
    resilience: ResilienceSettings = ResilienceSettings()
    allowances: AllowanceSettings = AllowanceSettings()
    accounts: AccountSettings = AccountSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    guards: dict[Name, GuardSettings] = Field(default_factory=dict[Name, GuardSettings])
    recall: RecallSettings = RecallSettings()
    data_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("stockpot")),
        description="ledger, keys and audit log, where they are SQLite",
    )
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


def config_path(config: Path | None) -> Path | None:
    """The file settings come from: `config`, else ./stockpot.toml where it exists."""
    default = Path("stockpot.toml")
    return config or (default if default.is_file() else None)


def load_settings(config: Path | None = None, **overrides: Any) -> Settings:
    """Settings from `config` (or ./stockpot.toml where it exists), the environment and `overrides`.

    `overrides` are whole sections as dictionaries (`server={"port": 9000}`); values left out keep what file
    and environment say. Raises ConfigurationError with every wrong value named.
    """
    config = config_path(config)
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
    except SettingsError as error:
        raise ConfigurationError(f"The environment does not fit: {error}.") from error
    except ValidationError as error:
        wrong = "; ".join(map(str, problems(error, Settings)))
        raise ConfigurationError(f"The configuration does not fit: {wrong}.") from error
