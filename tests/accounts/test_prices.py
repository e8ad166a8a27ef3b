"""Prices: whose apply, that they are the lists' to the billionth, and what one's own hardware costs."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from genai_prices import Usage, calc_price
from hypothesis import given
from hypothesis import strategies as st

from stockpot.accounts.prices import PriceBook, hardware_nanousd
from stockpot.records import Attempt, Cost
from stockpot.settings_gateway import BackendSettings, HardwareSettings, PriceSettings

MACHINE = HardwareSettings(usd_per_hour=3.6, prefill_tokens_per_s=1_000, decode_tokens_per_s=100)


@dataclass(frozen=True)
class Member:
    """A backend, by its name."""

    name: str


def _attempt(model: str, prompt: int, output: int, **more: Any) -> Attempt:
    return Attempt(
        "b", model, 0.0, more.pop("duration_s", 1.0), prompt_tokens=prompt, completion_tokens=output, **more
    )


def _book(**settings: Any) -> PriceBook:
    return PriceBook({"b": BackendSettings.model_validate({"url": "http://10.0.0.5:8000/v1"} | settings)})


@pytest.fixture(scope="module")
def listed() -> dict[str, PriceBook]:
    return {name: _book(provider=name) for name in ("anthropic", "openai", "google")}


@given(
    st.sampled_from([("anthropic", "claude-sonnet-4-5"), ("openai", "gpt-4o"), ("google", "gemini-2.5-pro")]),
    st.one_of(st.integers(1, 5_000), st.sampled_from([199_999, 200_000, 200_001, 900_000])),
    st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    st.integers(0, 10_000),
)
def test_providers_prices_are_those_of_the_list(
    listed: dict[str, PriceBook],
    model: tuple[str, str],
    prompt: int,
    shares: tuple[float, float, float],
    output: int,
) -> None:
    cached = int(prompt * shares[0])
    written = int((prompt - cached) * shares[1])
    provider, name = model
    # Of others than Anthropic the list has no price for an hour.
    hour = int(written * shares[2]) if provider == "anthropic" else 0
    book = listed[provider]
    attempt = _attempt(
        name, prompt, output, cached_tokens=cached, written_tokens=written, written_1h_tokens=hour
    )
    cost = book.cost(attempt)
    usage = Usage(
        input_tokens=prompt,
        cache_read_tokens=cached,
        cache_write_tokens=written,
        **({"cache_write_1h_tokens": hour} if hour else {}),
        output_tokens=output,
    )
    expected = calc_price(usage, name, provider_id=provider).total_price * 10**9
    assert abs(cost.nanousd - expected) <= Decimal("0.5")
    assert cost.source == f"provider:{provider}"
    assert book.upper_bound(Member("b"), name, prompt, output) >= cost.nanousd


def test_configured_prices_come_first_under_either_name() -> None:
    book = _book(
        provider="openai",
        hardware=MACHINE,
        models={"small": "gpt-4o-mini", "big": "gpt-4o"},
        prices={"small": PriceSettings(input=1.0, output=2.0, cached=0.1)},
    )
    for name in ("small", "gpt-4o-mini"):
        cost = book.cost(_attempt(name, 1_000, 10, cached_tokens=400))
        assert cost == Cost(600 * 1_000 + 400 * 100 + 10 * 2_000, "configured")
    assert book.cost(_attempt("big", 1_000, 0)).source == "hardware"


def test_what_is_written_for_an_hour_has_its_own_price(listed: dict[str, PriceBook]) -> None:
    attempt = _attempt("claude-sonnet-4-5", 100_000, 0, written_tokens=100_000, written_1h_tokens=100_000)
    book = listed["anthropic"]
    assert book.cost(attempt).nanousd == 600_000_000  # twice the price of a fresh token
    assert book.upper_bound(Member("b"), "claude-sonnet-4-5", 100_000, 0) >= 600_000_000
    prices = PriceSettings(input=1.0, written=2.0)
    for written_1h, paid in ((None, 2.0), (4.0, 4.0)):
        configured = _book(prices={"m": prices.model_copy(update={"written_1h": written_1h})})
        hour = _attempt("m", 10, 0, written_tokens=10, written_1h_tokens=10)
        assert configured.cost(hour).nanousd == paid * 10_000
        assert configured.upper_bound(Member("b"), "m", 10, 0) >= paid * 10_000


def test_a_provider_is_known_by_its_address_and_a_model_alone_is_not() -> None:
    assert _book(url="https://api.openai.com/v1").cost(_attempt("gpt-4o", 10, 1)).source == "provider:openai"
    for url in ("http://10.0.0.5:8000/v1", "http://vllm:8000/v1", "https://models.example.org/v1"):
        assert _book(url=url).cost(_attempt("gpt-4o", 10, 1)) == Cost(0, "unknown")
    assert _book(provider="openai").cost(_attempt("no-such-model", 10, 1)) == Cost(0, "unknown")
    assert _book().cost(Attempt("elsewhere", "m", 0, 1, prompt_tokens=5)) == Cost(0, "unknown")


def test_hardware_is_paid_by_the_larger_share() -> None:
    """3.60 dollars an hour are a million nanodollars a millisecond."""
    book = PriceBook({}, embedded=MACHINE)
    attempt = Attempt("embedded", "m", 0, 5.0, prompt_tokens=1_000, cached_tokens=500, completion_tokens=50)
    assert book.cost(attempt) == Cost(1_000_000_000 // 1_000, "hardware")  # 0.5 s + 0.5 s of a machine
    with_memory = MACHINE.model_copy(update={"kv_bytes_per_token": 1_000, "kv_capacity_bytes": 2_000_000})

    def of(held_s: float) -> int:
        return hardware_nanousd(
            with_memory, fresh_tokens=500, completion_tokens=50, held_tokens=1_025, held_s=held_s
        )

    assert of(1.0) == 1_000_000  # memory 0.51 s: compute is more
    assert of(4.0) == 2_050_000
    assert hardware_nanousd(with_memory, fresh_tokens=0, completion_tokens=0, held_tokens=0, held_s=9) == 0


def test_the_bound_of_hardware_holds_while_its_time_does() -> None:
    machine = MACHINE.model_copy(update={"kv_bytes_per_token": 1_000, "kv_capacity_bytes": 2_000_000})
    book = _book(hardware=machine)
    cost = book.cost(_attempt("m", 100, 50, duration_s=10.0))
    member = Member("b")
    assert cost.nanousd <= book.upper_bound(member, "m", 100, 50, held_s=10.0)


def test_nothing_used_costs_nothing() -> None:
    assert _book(provider="openai").cost(_attempt("gpt-4o", 0, 0)) == Cost(0, "provider:openai")


def test_the_lists_are_loaded_only_where_they_may_be_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from stockpot.accounts.prices import PriceBook\n"
        "from stockpot.settings_gateway import BackendSettings\n"
        "PriceBook({'b': BackendSettings(url='http://vllm:8000/v1')})\n"
        "assert 'genai_prices' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
