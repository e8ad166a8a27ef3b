"""What providers say of their prompt caches: one dated table, with the source of each line.

Prices are shares of the price of an uncached input token, and serve where no price list has the model: a list
(`accounts.prices`) is newer than this. Nothing is fetched. A model that is in no line has its provider's
first; a provider that is not known has rules that promise nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProviderName = Literal[
    "anthropic", "openai", "google", "deepseek", "vllm", "sglang", "llama-server", "stockpot", "unknown"
]


@dataclass(frozen=True, slots=True)
class CacheRules:
    """How prompts of some models (names begin with one of `models`; ("",) is all) are cached.

    `automatic`: without being told what to cache. Prefixes shorter than `min_tokens` are not, and those that
    are end at a multiple of `granularity_tokens`. A prefix is kept `default_ttl_s` from its last use (None:
    until room is needed), or one of `ttls_s` if asked for. `breakpoints_max` boundaries in a request (0: they
    are not understood); a boundary finds what was written at most `lookback_blocks` blocks before it.
    """

    provider: ProviderName
    models: tuple[str, ...]
    automatic: bool
    min_tokens: int
    granularity_tokens: int = 1
    default_ttl_s: float | None = None
    ttls_s: tuple[float, ...] = ()
    read_price: float = 1.0
    write_price: float = 1.0
    write_price_1h: float = 1.0
    breakpoints_max: int = 0
    lookback_blocks: int | None = None
    source: str = ""
    as_of: str = ""

    @property
    def is_own(self) -> bool:
        """Whether it is an engine one runs oneself: time is lost rather than money."""
        return self.provider in ("vllm", "sglang", "llama-server", "stockpot")


def rules_for(provider: str, model: str) -> CacheRules:
    """The rules of a model (a prefix as `anthropic/` in its name is no part of it). `provider` "": as the
    model's name tells."""
    name = model.lower().rpartition("/")[2]
    known = provider.lower() or provider_of(name)
    lines = [rules for rules in _TABLE if rules.provider == known]
    # The longest beginning is the one that is meant: `claude-opus-4-5` is no `claude-opus-4`.
    fitting = [(max(map(len, _beginnings(rules, name)), default=-1), rules) for rules in lines]
    best = max(fitting, key=lambda one: one[0], default=(-1, None))
    if best[1] is not None and best[0] >= 0:
        return best[1]
    return lines[0] if lines else _UNKNOWN


def provider_of(model: str) -> str:
    """Whose model it is, by its name; "unknown" where that does not tell."""
    name = model.lower().rpartition("/")[2]
    for beginnings, provider in _NAMES:
        if name.startswith(beginnings):
            return provider
    return "unknown"


def all_rules() -> tuple[CacheRules, ...]:
    """The table, for people."""
    return _TABLE


def _beginnings(rules: CacheRules, name: str) -> list[str]:
    return [each for each in rules.models if name.startswith(each)]


_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("claude",), "anthropic"),
    (("gpt-oss",), "unknown"),  # open weights: whoever serves them decides
    (("gpt-", "o1", "o3", "o4", "chatgpt", "codex"), "openai"),
    (("gemini",), "google"),
    (("deepseek-chat", "deepseek-reasoner", "deepseek-flash", "deepseek-v"), "deepseek"),
)

_ANTHROPIC = "https://platform.claude.com/docs/en/build-with-claude/prompt-caching"
_OPENAI = "https://developers.openai.com/api/docs/guides/prompt-caching"
_GOOGLE = "https://ai.google.dev/gemini-api/docs/caching"
_DEEPSEEK = "https://api-docs.deepseek.com/guides/kv_cache"


def _claude(min_tokens: int, *models: str, read_price: float = 0.1) -> CacheRules:
    return CacheRules(
        "anthropic",
        tuple(f"claude-{name}" for name in models),
        automatic=False,
        min_tokens=min_tokens,
        default_ttl_s=300,
        ttls_s=(300, 3600),
        read_price=read_price,
        write_price=1.25,
        write_price_1h=2.0,
        breakpoints_max=4,
        lookback_blocks=20,
        source=_ANTHROPIC,
        as_of="2026-11-25",
    )


def _gpt(read_price: float, *models: str, ttl_s: float = 300) -> CacheRules:
    return CacheRules(
        "openai",
        models,
        automatic=True,
        min_tokens=1024,
        granularity_tokens=128,
        # In memory it is kept 5 to 10 minutes, an hour at most; 24 hours where asked for.
        default_ttl_s=ttl_s,
        ttls_s=(ttl_s, 86_400),
        read_price=read_price,
        source=_OPENAI,
        as_of="2026-11-25",
    )


def _gemini(min_tokens: int, *models: str) -> CacheRules:
    # How long it is kept is not said ("a short amount of time"): so nothing is called expired.
    return CacheRules(
        "google",
        models,
        automatic=True,
        min_tokens=min_tokens,
        read_price=0.1,
        source=_GOOGLE,
        as_of="2026-10-13",
    )


def _engine(provider: ProviderName, block_tokens: int, source: str) -> CacheRules:
    return CacheRules(
        provider,
        ("",),
        automatic=True,
        min_tokens=block_tokens,
        granularity_tokens=block_tokens,
        read_price=0.0,
        source=source,
        as_of="2026-11-25",
    )


_UNKNOWN = CacheRules("unknown", ("",), automatic=True, min_tokens=1)

_TABLE: tuple[CacheRules, ...] = (
    # The first of a provider is for models that are in no other line.
    _claude(1024, "opus-4-8", "opus-4-1", "opus-4-0", "opus-4-2", "sonnet-4", "3-7-sonnet", "3-5-sonnet"),
    _claude(1024, "sonnet-5"),
    _claude(512, "opus-5", "fable-5", "mythos-5"),
    _claude(2048, "opus-4-7", "3-5-haiku", "3-haiku"),
    _claude(4096, "opus-4-5", "opus-4-6", "haiku-4-5"),
    _gpt(0.1, "gpt-5"),
    _gpt(0.1, "gpt-5.5", ttl_s=86_400),
    CacheRules(
        "openai",
        ("gpt-5.6", "gpt-5.7", "gpt-5.8", "gpt-5.9", "gpt-6"),
        automatic=True,
        min_tokens=1024,
        default_ttl_s=1800,
        read_price=0.1,
        write_price=1.25,
        write_price_1h=1.25,
        source=_OPENAI,
        as_of="2026-11-25",
    ),
    _gpt(0.25, "gpt-4.1", "o3", "o4-mini", "codex-mini"),
    _gpt(0.5, "gpt-4o", "o1", "o3-mini"),
    _gemini(4096, "gemini-3", "gemini-4"),
    _gemini(2048, "gemini-2.5"),
    CacheRules(
        "deepseek",
        ("deepseek",),
        automatic=True,
        min_tokens=64,
        granularity_tokens=64,
        read_price=0.1,
        source=_DEEPSEEK,
        as_of="2026-11-25",
    ),
    _engine("vllm", 16, "https://docs.vllm.ai/en/latest/features/automatic_prefix_caching/"),
    _engine("sglang", 1, "https://docs.sglang.ai/ (RadixAttention, page size 1)"),
    _engine("llama-server", 1, "https://github.com/ggml-org/llama.cpp/tree/master/tools/server"),
    _engine("stockpot", 1, "README.md: reuse up to the first token that differs"),
)
