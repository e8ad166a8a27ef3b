"""What lost tokens cost: money by provider's price lists, time by the rate at which prompts were computed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stockpot.accounts.prices import PriceBook
from stockpot.context.provider_facts import rules_for
from stockpot.doctor.exchange import Exchange
from stockpot.records import Attempt
from stockpot.settings_gateway import BackendSettings

_LISTED = ("anthropic", "openai", "google", "deepseek")
_SAMPLES_MAX = 2_000
_SAMPLES_FITTED = 300
_SAMPLES_MIN = 8
_TOKENS_APART = 64
_MODELS_MAX = 1_000


class Pricing:
    """US dollars for tokens that were computed and could have been read. Price lists are loaded when the
    first model of a provider comes (half a second)."""

    def __init__(self) -> None:
        self._book: PriceBook | None = None
        self._usd: dict[tuple[str, str], float] = {}

    def usd_lost(self, exchange: Exchange, tokens: int) -> float:
        """0 where the model has no price: its time is lost then."""
        key = (exchange.provider, exchange.model)
        usd = self._usd.get(key)
        if usd is None:
            if len(self._usd) >= _MODELS_MAX:
                self._usd.clear()
            usd = self._usd[key] = self._difference(*key)
        return usd * tokens

    def _difference(self, provider: str, model: str) -> float:
        """For a token: not read from a cache, but computed."""
        rules = rules_for(provider, model)
        if rules.provider not in _LISTED or not model:
            return 0.0
        if self._book is None:
            self._book = PriceBook(
                {
                    name: BackendSettings(url="https://localhost", provider=name)  # nothing is sent there
                    for name in _LISTED
                }
            )
        many = 1_000_000
        name = model.rpartition("/")[2]
        costs = [
            self._book.cost(
                Attempt(rules.provider, name, 0.0, 0.0, prompt_tokens=many, cached_tokens=cached)
            ).nanousd
            for cached in (0, many)
        ]
        computed, read = costs
        if computed and read >= computed:  # the list has no price for what is cached
            read = int(computed * rules.read_price)
        return (computed - read) / 1e9 / many


class PrefillRate:
    """Seconds for a token that is computed, from what was recorded: the slope of the time to the first token
    over the tokens computed (Theil and Sen: the median slope of pairs, which a slow request does not
    move)."""

    def __init__(self, tokens_per_s: float | None = None) -> None:
        self._given_s = None if tokens_per_s is None else 1 / tokens_per_s
        self._samples: list[tuple[int, float]] = []
        self._seen = 0
        self._random = random.Random(7)

    def add(self, exchange: Exchange) -> None:
        """What a request tells, where it tells enough."""
        usage = exchange.usage
        if exchange.ttft_s is None or usage is None or usage.cached_tokens is None:
            return
        sample = (max(0, usage.prompt_tokens - usage.cached_tokens), exchange.ttft_s)
        self._seen += 1
        if len(self._samples) < _SAMPLES_MAX:
            self._samples.append(sample)
        elif (place := self._random.randrange(self._seen)) < _SAMPLES_MAX:
            self._samples[place] = sample

    @property
    def seconds_per_token(self) -> float | None:
        """None where too little is known."""
        if self._given_s is not None:
            return self._given_s
        return _slope(self._samples, self._random)


def _slope(samples: Sequence[tuple[int, float]], chance: random.Random) -> float | None:
    fitted = samples if len(samples) <= _SAMPLES_FITTED else chance.sample(list(samples), _SAMPLES_FITTED)
    slopes = sorted(
        (other[1] - one[1]) / (other[0] - one[0])
        for place, one in enumerate(fitted)
        for other in fitted[place + 1 :]
        if abs(other[0] - one[0]) >= _TOKENS_APART
    )
    if len(slopes) < _SAMPLES_MIN:
        return None
    return max(0.0, slopes[len(slopes) // 2]) or None
