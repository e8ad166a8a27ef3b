"""The settings of the gateway: backends, routes, teams, state, accounts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from stockpot.caller import Limits
from stockpot.errors import FailureCause
from stockpot.settings_types import KeySecret, ModelName, Secret, Section

EMBEDDED = "embedded"
"""The name of the backend in this process."""

Policy = Literal["prefix", "session", "least-load", "round-robin"]


class PriceSettings(Section):
    """US dollars for a million tokens. `cached` and `written` (into a cache) None: as `input`; `written_1h`
    (to be kept for an hour) None: as `written`."""

    input: float = Field(ge=0)
    output: float = Field(default=0.0, ge=0)
    cached: float | None = Field(default=None, ge=0)
    written: float | None = Field(default=None, ge=0)
    written_1h: float | None = Field(default=None, ge=0)


class HardwareSettings(Section):
    """What a machine of one's own costs. Its price per hour is shared among the requests by the seconds of
    prefill and decode they took and the KV bytes they held; see `accounts`."""

    usd_per_hour: float = Field(ge=0)
    prefill_tokens_per_s: float = Field(gt=0, description="of the whole machine, when busy")
    decode_tokens_per_s: float = Field(gt=0, description="of the whole machine, when busy")
    kv_bytes_per_token: int = Field(default=0, ge=0)
    kv_capacity_bytes: int | None = Field(default=None, gt=0, description="None: KV memory is not reckoned")


class BackendSettings(Section):
    """A server behind this one."""

    kind: Literal["openai", "anthropic"] = "openai"
    server: Literal["generic", "vllm", "llama-server", "stockpot", "sglang"] = Field(
        default="generic", description="what is known about it beyond its API: tokenizing, extra fields"
    )
    url: str = Field(description="up to and without the last part: https://api.openai.com/v1")
    api_key: KeySecret | None = None
    headers: dict[str, Secret] = Field(default_factory=dict[str, Secret])
    models: dict[ModelName, str] = Field(
        default_factory=dict[ModelName, str],
        description="names here and there; a list gives both the same. Empty: as /models says",
    )
    max_concurrency: int = Field(default=256, ge=1, description="the adaptive limit stays below")
    connect_timeout_s: float = Field(default=5.0, gt=0)
    first_byte_timeout_s: float = Field(default=300.0, gt=0)
    idle_timeout_s: float = Field(default=60.0, gt=0, description="between two pieces of a stream")
    health_path: str | None = Field(default=None, description="asked each few seconds; None: /models")
    kv_events: str | None = Field(default=None, description="ZeroMQ address, as tcp://10.0.0.5:5557")
    kv_replay: str | None = None
    provider: str | None = Field(default=None, description="whose prices apply (genai-prices), as openai")
    prices: dict[ModelName, PriceSettings] = Field(default_factory=dict[ModelName, PriceSettings])
    hardware: HardwareSettings | None = None
    context_tokens: int | None = Field(default=None, ge=1, description="None: as the backend says")
    allow_extras: tuple[str, ...] = Field(
        default=(), description="fields passed on though they change what is billed, as service_tier"
    )

    @field_validator("models", mode="before")
    @classmethod
    def _same_names(cls, value: object) -> object:
        return {str(name): str(name) for name in value} if isinstance(value, list) else value  # pyright: ignore

    @field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value.rstrip("/")


class TargetSettings(Section):
    """One of the models an alias stands for, and its share."""

    model: ModelName
    weight: float = Field(default=1.0, ge=0)


class FallbackSettings(Section):
    """Which model takes over for which failures. `on` empty: for every failure another model may survive."""

    to: ModelName
    on: tuple[FailureCause, ...] = ()


class CascadeSettings(Section):
    """A small model answers first; `to` answers where that does not pass."""

    to: ModelName
    on: tuple[Literal["schema", "regex", "refusal", "length"], ...] = ("schema", "refusal", "length")
    pattern: str | None = Field(default=None, description="for regex: what the answer must match")
    classifier: str | None = Field(
        default=None, description="module:function of a difficulty from 0 to 1, or words: the built-in one"
    )
    difficulty: float = Field(default=0.5, ge=0, le=1, description="from here on the strong model at once")


class DegradeSettings(Section):
    """A cheaper model when less than `below` of a budget is left."""

    to: ModelName
    below: float = Field(default=0.1, gt=0, le=1)


class RouteSettings(Section):
    """A name clients use, and what stands behind it."""

    targets: tuple[TargetSettings, ...] = Field(min_length=1)
    sticky: Literal["session", "key", "none"] = "session"
    fallbacks: tuple[FallbackSettings, ...] = ()
    cascade: CascadeSettings | None = None
    degrade: DegradeSettings | None = None
    policy: Policy | None = None


class ResilienceSettings(Section):
    """What happens when a backend fails. All figures are for one backend, unless they say otherwise."""

    retries: int = Field(default=2, ge=0, le=10, description="attempts after the first, for one request")
    retry_budget: float = Field(default=0.2, ge=0, le=1, description="retries per request, over all of them")
    backoff_s: float = Field(default=0.1, gt=0)
    backoff_max_s: float = Field(default=5.0, gt=0)
    breaker_failures: int = Field(default=5, ge=1, description="in a row, until it is left alone")
    breaker_open_s: float = Field(default=5.0, gt=0)
    ejection_ratio: float = Field(default=3.0, gt=1, description="slower than its peers' median by this: out")
    ejection_s: float = Field(default=30.0, gt=0)
    hedge_after_s: float | None = Field(
        default=None, gt=0, description="None: no second try beside the first"
    )
    single_flight: bool = Field(default=True, description="identical requests at one time are made once")
    queue_limit: int = Field(default=1024, ge=0, description="requests that wait for a backend, all in all")
    queue_timeout_s: float = Field(default=30.0, gt=0)


class RoutingSettings(Section):
    """Which of several backends of a model is asked."""

    policy: Policy = "prefix"
    load_weight_tokens: int = Field(
        default=512, ge=0, description="a request in flight weighs as much as this many cached tokens"
    )
    index_blocks_max: int = Field(
        default=500_000, ge=1000, description="prefix blocks remembered, all in all"
    )


class LimitSettings(Section):
    """See `caller.Limits`; left out: no limit."""

    requests_per_minute: int | None = Field(default=None, ge=0)
    tokens_per_minute: int | None = Field(default=None, ge=0)
    concurrency: int | None = Field(default=None, ge=0)
    tokens_per_day: int | None = Field(default=None, ge=0)
    tokens_per_month: int | None = Field(default=None, ge=0)
    usd_per_day: float | None = Field(default=None, ge=0, le=9_000_000)
    usd_per_month: float | None = Field(default=None, ge=0, le=9_000_000)

    def limits(self) -> Limits:
        return Limits(**self.model_dump())


class TeamSettings(Section):
    """What all keys of a team may use together."""

    limits: LimitSettings = LimitSettings()


class AllowanceSettings(Section):
    """How limits are kept among several gateways."""

    redis_url: str | None = Field(default=None, description="None: limits hold for this process alone")
    redis_password: Secret | None = None
    prefix: str = "stockpot"
    timeout_s: float = Field(default=0.25, gt=0)
    when_lost: Literal["refuse", "local"] = Field(
        default="refuse", description="without Redis: refuse what is limited, or allow a local share"
    )
    local_share: float = Field(default=0.1, ge=0, le=1, description="of each limit, for this process")
    lease_s: float = Field(default=30.0, ge=1, description="a crashed gateway's reservations return after")
    bytes_per_token: float = Field(
        default=1.0,
        ge=1,
        le=8,
        description="of prompts, for reservations; 1 never reserves too little, 3 lets more run at once",
    )
    output_tokens_assumed: int = Field(
        default=4096, ge=1, description="reserved for requests without max_tokens, and then their max_tokens"
    )


class AccountSettings(Section):
    """Ledger, keys and audit log: one SQL database."""

    database: Secret | None = Field(
        default=None,
        description="SQLAlchemy URL, as postgresql+psycopg://...; None: SQLite in data_dir",
    )
    enabled: bool = Field(default=True, description="false: no ledger, no virtual keys, no audit log")
    keep_days: int | None = Field(default=None, ge=1, description="older lines of the ledger go; None: never")
    queue_limit: int = Field(default=50_000, ge=100, description="lines that may wait to be written")
