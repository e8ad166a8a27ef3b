"""What tokens cost: by configured prices, by the cost of one's own hardware, or by a provider's list.

Money is whole billionths of a US dollar, so that sums are exact. Provider prices come from `genai-prices`
(a package of price lists; nothing is fetched), and only for backends that name a provider or whose URL is
one's: a model of that name on a machine of ours has no provider's price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any, Protocol

from stockpot.clock import Clock, SystemClock
from stockpot.records import Attempt, Cost
from stockpot.settings_gateway import EMBEDDED, BackendSettings, HardwareSettings, PriceSettings

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelPrice

_MICRO = 1_000_000
_RATES_PER_NANO = 1_000
_RESOLVED_MAX = 4_096
_RESOLVED_S = 60.0
"""How long what was looked up is believed: some lists differ by the hour."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Millionths of a US dollar for a million tokens (so 1,000 of it and a token are a billionth), from
    prompts of more than `above` tokens on; `request` is in billionths for each request."""

    input: int
    cached: int
    written: int
    written_1h: int
    output: int
    request: int = 0
    above: int = -1

    def cost(self, prompt: int, cached: int, written: int, written_1h: int, output: int) -> int:
        """Nanodollars, to the nearest. `cached` and `written` are parts of `prompt`, `written_1h` of
        `written`."""
        fresh = max(0, prompt - cached - written)
        micro = fresh * self.input + cached * self.cached + output * self.output
        micro += (written - written_1h) * self.written + written_1h * self.written_1h
        return (micro + _RATES_PER_NANO // 2) // _RATES_PER_NANO + self.request

    def most(self, prompt: int, output: int) -> int:
        """Nanodollars if every token is of the dearest kind."""
        dearest = max(self.input, self.cached, self.written, self.written_1h)
        return -(-(prompt * dearest + output * self.output) // _RATES_PER_NANO) + self.request


@dataclass(frozen=True, slots=True)
class _Price:
    """How one model of one backend is priced, believed until then."""

    until_s: float
    source: str
    tiers: tuple[Rates, ...] = ()
    hardware: HardwareSettings | None = None


class _Named(Protocol):
    @property
    def name(self) -> str: ...


class PriceBook:
    """Prices of all backends. In this order: `prices` of the backend's settings (by the name clients use, or
    the backend's own), its `hardware`, its provider's list, else unknown, which costs 0 and says so.

    Models may be named as clients do or as the backend does. For one thread (the event loop); a look-up that
    was made before takes about a microsecond. New settings want a new book.
    """

    def __init__(
        self,
        backends: Mapping[str, BackendSettings],
        *,
        embedded: HardwareSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`embedded` is the hardware of the engine in this process. Loads the price lists (half a second,
        100 MB) if one of `backends` may need them."""
        self._backends = dict(backends)
        self._embedded = embedded
        self._clock = clock or SystemClock()
        self._resolved: dict[tuple[str, str], _Price] = {}
        self._lists: DataSnapshot | None = None
        if any(_may_be_listed(settings) for settings in self._backends.values()):
            self._load()

    def cost(self, attempt: Attempt) -> Cost:
        """What an attempt cost, from its tokens; of hardware also from how long it took."""
        price = self._price(attempt.backend, attempt.model)
        prompt, output = attempt.prompt_tokens, attempt.completion_tokens
        if not prompt and not output:
            return Cost(0, price.source)  # it failed before anything was billed
        if price.hardware is not None:
            nanousd = hardware_nanousd(
                price.hardware,
                fresh_tokens=max(0, prompt - attempt.cached_tokens),
                completion_tokens=output,
                held_tokens=prompt + output / 2,
                held_s=attempt.duration_s,
            )
            return Cost(nanousd, price.source)
        if not price.tiers:
            return Cost(0, price.source)
        rates = _tier(price.tiers, prompt)
        nanousd = rates.cost(
            prompt, attempt.cached_tokens, attempt.written_tokens, attempt.written_1h_tokens, output
        )
        return Cost(nanousd, price.source)

    def upper_bound(
        self, member: _Named, model: str, prompt_tokens: int, completion_tokens: int, *, held_s: float = 0.0
    ) -> int:
        """Nanodollars that `cost` of as many tokens, of whatever kind, does not exceed if the attempt takes
        `held_s` at most (which counts where KV memory is reckoned); 0 where the price is unknown."""
        price = self._price(member.name, model)
        if price.hardware is not None:
            return hardware_nanousd(
                price.hardware,
                fresh_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                held_tokens=prompt_tokens + completion_tokens,
                held_s=held_s,
            )
        return max((rates.most(prompt_tokens, completion_tokens) for rates in price.tiers), default=0)

    def _price(self, backend: str, model: str) -> _Price:
        key = (backend, model)
        price = self._resolved.get(key)
        now_s = self._clock.monotonic()
        if price is None or price.until_s <= now_s:
            if len(self._resolved) >= _RESOLVED_MAX:  # names a client may have made up
                self._resolved.clear()
            price = self._resolved[key] = self._resolve(backend, model, now_s + _RESOLVED_S)
        return price

    def _resolve(self, backend: str, model: str, until_s: float) -> _Price:
        settings = self._backends.get(backend)
        if settings is None:
            known = backend == EMBEDDED and self._embedded is not None
            return _Price(
                until_s, "hardware" if known else "unknown", hardware=self._embedded if known else None
            )
        theirs = settings.models.get(model, model)
        ours = (name for name, each in settings.models.items() if each == theirs)
        for name in (model, *ours, theirs):
            if name in settings.prices:
                return _Price(until_s, "configured", (_configured(settings.prices[name]),))
        if settings.hardware is not None:
            return _Price(until_s, "hardware", hardware=settings.hardware)
        return self._listed(settings, theirs, until_s)

    def _listed(self, settings: BackendSettings, model: str, until_s: float) -> _Price:
        """The price in a provider's list, as it is now."""
        unknown = _Price(until_s, "unknown")
        if not _may_be_listed(settings):
            return unknown
        lists = self._load()
        url = None if settings.provider else settings.url
        try:
            provider, found = lists.find_provider_model(model, None, settings.provider, url)
        except LookupError:
            return unknown
        prices = found.get_prices(datetime.fromtimestamp(self._clock.wall(), UTC))
        if prices.input_mtok is None and prices.output_mtok is None:
            return unknown  # it is sold by other units than tokens
        return _Price(until_s, f"provider:{provider.id}", _tiers(prices))

    def _load(self) -> DataSnapshot:
        if self._lists is None:
            from genai_prices.data_snapshot import get_snapshot

            self._lists = get_snapshot()
        return self._lists


def hardware_nanousd(
    hardware: HardwareSettings,
    *,
    fresh_tokens: int,
    completion_tokens: int,
    held_tokens: float,
    held_s: float,
) -> int:
    """The share of a machine's price a request used, in nanodollars, rounded up.

        usd_per_hour / 3600 x max(compute, memory), seconds of the whole machine:
        compute = fresh / prefill_tokens_per_s + output / decode_tokens_per_s
        memory  = held_s x held_tokens x kv_bytes_per_token / kv_capacity_bytes

    Prefill and decode take turns on the same compute, so they add up; KV memory is a resource of its own,
    used at the same time. A request pays for the one of which it used the larger share (the dominant share of
    Ghodsi et al., NSDI 2011): a machine that is busy with one of them the whole hour brings in its price.
    Prompt tokens from a cache cost no compute. `held_tokens` is the mean while it ran: the prompt and half of
    the output.
    """
    compute_s = fresh_tokens / hardware.prefill_tokens_per_s
    compute_s += completion_tokens / hardware.decode_tokens_per_s
    memory_s = 0.0
    if hardware.kv_capacity_bytes is not None:
        memory_s = held_s * held_tokens * hardware.kv_bytes_per_token / hardware.kv_capacity_bytes
    return math.ceil(hardware.usd_per_hour / 3600 * max(compute_s, memory_s) * 1e9)


def _may_be_listed(settings: BackendSettings) -> bool:
    """Whether a provider's list may be asked: it is named, or the host may be one's (ours are numbers, or
    words without a dot)."""
    if settings.provider:
        return True
    host = settings.url.partition("//")[2].partition("/")[0].partition(":")[0]
    return "." in host and not host.replace(".", "").isdigit()


def _configured(prices: PriceSettings) -> Rates:
    cached = prices.input if prices.cached is None else prices.cached
    written = prices.input if prices.written is None else prices.written
    written_1h = written if prices.written_1h is None else prices.written_1h
    each = (prices.input, cached, written, written_1h, prices.output)
    return Rates(*(_micro(Decimal(str(price))) for price in each))


def _tiers(prices: ModelPrice) -> tuple[Rates, ...]:
    """The list's prices as rates, one for each length of prompt at which one of them changes. Beyond it the
    new price is that of all tokens (so `genai-prices` and the providers have it)."""
    names = ("input_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_5m_mtok")
    names += ("cache_write_1h_mtok", "output_mtok", "requests_kcount")
    each: dict[str, Any] = {name: getattr(prices, name, None) for name in names}
    starts = {tier.start for price in each.values() for tier in getattr(price, "tiers", ())}
    return tuple(_rates_at(each, above) for above in (-1, *sorted(starts)))


def _rates_at(prices: Mapping[str, Any], above: int) -> Rates:
    def price(name: str, otherwise: Decimal) -> Decimal:
        listed = prices[name]
        if listed is None:
            return otherwise
        if isinstance(listed, Decimal):
            return listed
        fitting = [tier.price for tier in listed.tiers if tier.start <= above]
        return fitting[-1] if fitting else listed.base

    zero = Decimal(0)
    fresh = price("input_mtok", zero)
    written = price("cache_write_5m_mtok", price("cache_write_mtok", fresh))
    return Rates(
        input=_micro(fresh),
        cached=_micro(price("cache_read_mtok", fresh)),
        written=_micro(written),
        written_1h=_micro(price("cache_write_1h_mtok", written)),
        output=_micro(price("output_mtok", zero)),
        request=int(price("requests_kcount", zero) * _MICRO),  # of dollars for 1,000, into billionths for one
        above=above,
    )


def _tier(tiers: tuple[Rates, ...], prompt_tokens: int) -> Rates:
    chosen = tiers[0]
    for rates in tiers[1:]:
        if prompt_tokens > rates.above:
            chosen = rates
    return chosen


def _micro(usd: Decimal) -> int:
    return int((usd * _MICRO).to_integral_value(ROUND_HALF_UP))
