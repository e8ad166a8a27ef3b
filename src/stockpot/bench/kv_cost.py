"""What a conversation's KV costs and what it saves: the same chat with KV reuse and with recomputation."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from stockpot.bench.charts import Chart, Lines
from stockpot.bench.client import ChatMessage
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Result, Table
from stockpot.bench.stockpot_server import Launch, StockpotServer, stockpot_server
from stockpot.bench.workload import WordSource

_MODES = {"reuse": True, "recompute": False}
_SEED = 11
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class KvCostPlan:
    """One conversation: words of the system prompt and of each user message, tokens of each answer."""

    turns: int = 10
    system_words: int = 300
    user_words: int = 120
    answer_tokens: int = 64

    @classmethod
    def quick(cls) -> KvCostPlan:
        """Enough to see that everything works."""
        return cls(turns=3, system_words=100, user_words=40, answer_tokens=8)


@dataclass(frozen=True, slots=True)
class TurnCost:
    """One turn. `kv_bytes` is what the keys and values of the whole conversation take; `ram_bytes` what the
    RAM tier holds after the turn."""

    mode: str
    turn: int
    prompt_tokens: int
    cached_tokens: int
    conversation_tokens: int
    kv_bytes: int
    ram_bytes: int
    ttft_s: float
    time_per_token_s: float | None


async def measure_kv_cost(
    plan: KvCostPlan, *, launch: Launch = stockpot_server, progress: BenchProgress = silent
) -> Result:
    """Hold the conversation twice, each on a server of its own."""
    idleness = measure_idleness()
    costs: list[TurnCost] = []
    for mode, reuse in _MODES.items():
        progress(f"start the server ({mode})", 0, None)
        async with launch({"cache": {"enabled": reuse}}) as server:
            progress(f"start the server ({mode})", 1, 1)
            costs += await _converse(server, plan, mode, progress)
    columns = (
        *("mode", "turn", "prompt tokens", "cached tokens", "conversation tokens"),
        *("KV MiB", "RAM tier MiB", "TTFT ms", "time per token ms"),
    )
    rows = tuple(_row(cost) for cost in costs)
    totals = {mode: sum(cost.ttft_s for cost in costs if cost.mode == mode) for mode in _MODES}
    figures = {
        "turns": [
            {"mode": cost.mode, **dict(zip(columns[1:], _row(cost)[1:], strict=True))} for cost in costs
        ],
        "sum_of_ttft_s": totals,
    }
    note = f"All TTFT together: {totals['reuse']:.2f} s with reuse, {totals['recompute']:.2f} s without."
    return Result(
        name="kv-cost",
        parameters=asdict(plan),
        tables=(Table(f"A conversation of {plan.turns} turns", columns, rows),),
        figures=figures,
        idleness=idleness,
        notes=(note,),
        chart=_chart(costs),
    )


async def _converse(
    server: StockpotServer, plan: KvCostPlan, mode: str, progress: BenchProgress
) -> list[TurnCost]:
    """One conversation. Before it, one short request, so that no first-use cost falls on turn 1."""
    source = WordSource(_SEED)
    await server.client.chat([{"role": "user", "content": "Hello."}], max_tokens=4)
    history: list[ChatMessage] = [{"role": "system", "content": source.text(plan.system_words)}]
    costs: list[TurnCost] = []
    for turn in range(1, plan.turns + 1):
        history.append({"role": "user", "content": source.text(plan.user_words)})
        answer = await server.client.chat(history, max_tokens=plan.answer_tokens)
        history.append({"role": "assistant", "content": answer.text or "ok"})
        caches = await server.cache_figures()
        tokens = answer.prompt_tokens + answer.completion_tokens
        costs.append(
            TurnCost(
                mode=mode,
                turn=turn,
                prompt_tokens=answer.prompt_tokens,
                cached_tokens=answer.cached_tokens or 0,
                conversation_tokens=tokens,
                kv_bytes=tokens * caches.kv_bytes_per_token,
                ram_bytes=caches.ram_used_bytes,
                ttft_s=answer.ttft_s,
                time_per_token_s=answer.time_per_output_token_s,
            )
        )
        progress(f"conversation ({mode})", turn, plan.turns)
    return costs


def _row(cost: TurnCost) -> tuple[str | int | float | None, ...]:
    per_token_s = cost.time_per_token_s
    return (
        *(cost.mode, cost.turn, cost.prompt_tokens, cost.cached_tokens, cost.conversation_tokens),
        *(round(cost.kv_bytes / _MIB, 2), round(cost.ram_bytes / _MIB, 2), round(cost.ttft_s * 1e3, 1)),
        None if per_token_s is None else round(per_token_s * 1e3, 2),
    )


def _chart(costs: list[TurnCost]) -> Chart:
    """Left: what reuse saves (TTFT). Right: what it costs (bytes)."""
    times: dict[str, list[tuple[float, float]]] = {
        mode: [(cost.turn, cost.ttft_s * 1e3) for cost in costs if cost.mode == mode] for mode in _MODES
    }
    reuse = [cost for cost in costs if cost.mode == "reuse"]
    sizes: dict[str, list[tuple[float, float]]] = {
        "KV of the conversation": [(cost.turn, cost.kv_bytes / _MIB) for cost in reuse],
        "RAM tier": [(cost.turn, cost.ram_bytes / _MIB) for cost in reuse],
    }
    return Chart(
        (
            Lines("Time to first token", "turn", "ms", times),
            Lines("Memory, with reuse", "turn", "MiB", sizes),
        )
    )
