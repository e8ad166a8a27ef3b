"""The chat workload against other servers, one after the other on an otherwise idle machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from stockpot.bench.charts import Bars, Chart
from stockpot.bench.chat_run import ChatRun, run_chat
from stockpot.bench.client import BenchClient, ChatMessage
from stockpot.bench.machine import Idleness, measure_idleness
from stockpot.bench.peer import Peer, StockpotPeer
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Result, Table, Verdict
from stockpot.bench.server import running_server
from stockpot.bench.sizing import text_of_tokens
from stockpot.bench.statistics import median
from stockpot.bench.stockpot_server import Launch, stockpot_server
from stockpot.bench.token_trie import distinct_tokens
from stockpot.bench.workload import ChatShape, write_script

_SHAPES = (ChatShape(sessions=16, turns=4, concurrency=2), ChatShape(sessions=24, turns=3, concurrency=8))
_WARM_PROMPT_TOKENS = 2048
_WARM_REPEATS = 8
_WARM_ANSWER_TOKENS = 16
_SEED = 41

# Floors by other server: mean TTFT and wall, ours over theirs, with the library compiled for the processor
# and with that of the package; and two of our own.
_TTFT_RATIO_MAX = {
    "native": {"llama-server": 0.25, "vllm": 0.5},
    "package": {"llama-server": 0.35, "vllm": 0.8},
}
_WALL_RATIO_MAX = {"native": {"vllm": 0.6}, "package": {"vllm": 0.9}}
_COMPUTED_RATIO_MAX = 1.05
_WARM_EXTRA_MS_MAX = 15.0


@dataclass(frozen=True, slots=True)
class PeersPlan:
    """`rounds` of all servers in turn, each started cold for each shape."""

    rounds: int = 3
    shapes: tuple[ChatShape, ...] = _SHAPES
    warm_prompt_tokens: int = _WARM_PROMPT_TOKENS

    @classmethod
    def quick(cls) -> PeersPlan:
        """Enough to see that everything works."""
        shape = ChatShape(sessions=3, turns=2, concurrency=2, system_words=200, answer_tokens=8)
        return cls(rounds=1, shapes=(shape,), warm_prompt_tokens=256)


@dataclass(frozen=True, slots=True)
class Reading:
    """One server, one shape, one round. `warm_extra_s`: TTFT of a prompt it has just answered, less one
    decode step; both medians."""

    server: str
    shape: str
    round: int
    run: ChatRun
    warm_ttft_s: float
    decode_step_s: float
    peak_rss_bytes: int
    idleness: Idleness
    model_details: Mapping[str, object]

    @property
    def warm_extra_s(self) -> float:
        return self.warm_ttft_s - self.decode_step_s


@dataclass(frozen=True, slots=True)
class Summary:
    """The medians of a server's readings of one shape."""

    server: str
    shape: str
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    wall_s: float
    computed_over_distinct: float
    warm_extra_ms: float
    peak_rss_mib: float


async def measure_peers(
    plan: PeersPlan,
    peers: Sequence[Peer],
    *,
    launch: Launch = stockpot_server,
    progress: BenchProgress = silent,
) -> Result:
    """Play every shape against every peer in each round: A B C, A B C, ... Peers must be prepared.

    `launch` starts the server whose tokenizer counts distinct tokens at the end.
    """
    before = measure_idleness()
    readings: list[Reading] = []
    for round_number in range(1, plan.rounds + 1):
        for shape in plan.shapes:
            for peer in peers:
                readings.append(await _read(peer, shape, round_number, plan, progress))
    distinct = await _count_distinct(readings, launch, progress)
    summaries = _summarise(readings, distinct)
    busy = [reading for reading in readings if not reading.idleness.quiet]
    return Result(
        name="peers",
        parameters=asdict(plan),
        tables=(_summary_table(summaries), _reading_table(readings, distinct)),
        figures={
            "peers": {peer.name: {**peer.facts(), **_details_of(peer, readings)} for peer in peers},
            "medians": [asdict(summary) for summary in summaries],
            "readings": [_reading_json(reading, distinct[reading_key(reading)]) for reading in readings],
        },
        idleness=before,
        verdicts=tuple(_verdicts(summaries, _library(readings))),
        notes=tuple(
            f"Before {reading.server} {reading.shape} round {reading.round}: {reading.idleness.sentence()}"
            for reading in busy
        ),
        chart=_chart(summaries),
    )


def reading_key(reading: Reading) -> tuple[str, str, int]:
    """What tells readings apart."""
    return (reading.server, reading.shape, reading.round)


def _details_of(peer: Peer, readings: Sequence[Reading]) -> Mapping[str, object]:
    for reading in readings:
        if reading.server == peer.name:
            return reading.model_details
    return {}


async def _read(
    peer: Peer, shape: ChatShape, round_number: int, plan: PeersPlan, progress: BenchProgress
) -> Reading:
    """One cold start, the chat, then the repeated prompt."""
    label = f"round {round_number}, {shape.name}, {peer.name}"
    served = peer.serve(concurrency=shape.concurrency)
    idleness = measure_idleness()
    progress(label, 0, shape.sessions * shape.turns)
    async with running_server(served.command) as running:
        client = BenchClient(running.url, served.model)
        # First-use costs (compiled kernels, lazily made tables) are not what is compared; the text is of no
        # use to the chat's cache.
        await client.chat([{"role": "user", "content": "Hello."}], max_tokens=4)
        run = await run_chat(client, write_script(shape), label=label, progress=progress)
        warm_ttft_s, decode_step_s = await measure_warm(client, plan.warm_prompt_tokens)
        return Reading(
            server=peer.name,
            shape=shape.name,
            round=round_number,
            run=run,
            warm_ttft_s=warm_ttft_s,
            decode_step_s=decode_step_s,
            peak_rss_bytes=running.peak_rss_bytes(),
            idleness=idleness,
            model_details=await _model_details(client),
        )


async def _model_details(client: BenchClient) -> Mapping[str, object]:
    """What our server says of its model (encoding, binding); others say nothing under this name."""
    return (await client.get("/v1/models"))["data"][0].get("details") or {}


async def measure_warm(client: BenchClient, prompt_tokens: int) -> tuple[float, float]:
    """Median TTFT of a prompt the server has just answered, and the median decode step behind it, seconds."""

    async def count(text: str) -> int:
        return (await client.complete(text, max_tokens=1)).prompt_tokens

    prompt = await text_of_tokens(prompt_tokens, count, seed=_SEED)
    answers = [
        await client.complete(prompt, max_tokens=_WARM_ANSWER_TOKENS) for _ in range(_WARM_REPEATS + 1)
    ][1:]
    steps = [step for answer in answers for step in answer.inter_token_s]
    return median([answer.ttft_s for answer in answers]), median(steps) if steps else 0.0


async def _count_distinct(
    readings: Sequence[Reading], launch: Launch, progress: BenchProgress
) -> dict[tuple[str, str, int], int]:
    """Distinct prompt tokens of each reading, counted by our tokenizer for all (they share the model's)."""
    label, counts = "count distinct tokens", dict[tuple[str, str, int], int]()
    known: dict[str, list[int]] = {}
    async with launch({}) as server:
        for done, reading in enumerate(readings, start=1):
            prompts: list[list[int]] = []
            for prompt in reading.run.prompts:
                key = _spelling(prompt)
                if key not in known:
                    known[key] = await server.tokenize(prompt)
                prompts.append(known[key])
            counts[reading_key(reading)] = distinct_tokens(prompts)
            progress(label, done, len(readings))
    return counts


def _spelling(prompt: Sequence[ChatMessage]) -> str:
    return "\0".join(f"{message['role']}\0{message['content']}" for message in prompt)


def _summarise(
    readings: Sequence[Reading], distinct: Mapping[tuple[str, str, int], int]
) -> tuple[Summary, ...]:
    groups: dict[tuple[str, str], list[Reading]] = {}
    for reading in readings:
        groups.setdefault((reading.shape, reading.server), []).append(reading)
    return tuple(
        Summary(
            server=server,
            shape=shape,
            ttft_mean_s=median([r.run.ttft.mean_s for r in group]),
            ttft_p50_s=median([r.run.ttft.p50_s for r in group]),
            ttft_p95_s=median([r.run.ttft.p95_s for r in group]),
            wall_s=median([r.run.wall_s for r in group]),
            computed_over_distinct=median([r.run.computed_tokens / distinct[reading_key(r)] for r in group]),
            warm_extra_ms=median([r.warm_extra_s * 1e3 for r in group]),
            peak_rss_mib=median([r.peak_rss_bytes / 2**20 for r in group]),
        )
        for (shape, server), group in groups.items()
    )


def _library(readings: Sequence[Reading]) -> str:
    """Which of our libraries was measured: native or package."""
    named = (r.model_details.get("library") for r in readings if r.server == StockpotPeer.name)
    return "package" if "package" in named else "native"


def _verdicts(summaries: Sequence[Summary], library: str) -> list[Verdict]:
    """The floors, for each shape."""
    verdicts: list[Verdict] = []
    by_key = {(summary.shape, summary.server): summary for summary in summaries}
    for ours in (summary for summary in summaries if summary.server == StockpotPeer.name):
        shape = ours.shape
        for server, limit in _TTFT_RATIO_MAX[library].items():
            if theirs := by_key.get((shape, server)):
                what = f"{shape}: mean TTFT over {server}'s"
                verdicts.append(Verdict(what, ours.ttft_mean_s / theirs.ttft_mean_s, limit))
        for server, limit in _WALL_RATIO_MAX[library].items():
            if theirs := by_key.get((shape, server)):
                verdicts.append(Verdict(f"{shape}: wall over {server}'s", ours.wall_s / theirs.wall_s, limit))
        verdicts.append(
            Verdict(
                f"{shape}: prompt tokens computed over distinct tokens sent",
                ours.computed_over_distinct,
                _COMPUTED_RATIO_MAX,
            )
        )
        verdicts.append(
            Verdict(f"{shape}: warm TTFT less one step, ms", ours.warm_extra_ms, _WARM_EXTRA_MS_MAX)
        )
    return verdicts


def _summary_table(summaries: Sequence[Summary]) -> Table:
    columns = (
        *("workload", "server", "TTFT mean s", "P50 s", "P95 s", "wall s"),
        *("computed / distinct", "warm TTFT - step ms", "peak RSS MiB"),
    )
    rows = tuple(
        (
            *(s.shape, s.server, round(s.ttft_mean_s, 4), round(s.ttft_p50_s, 4), round(s.ttft_p95_s, 4)),
            *(round(s.wall_s, 2), round(s.computed_over_distinct, 3), round(s.warm_extra_ms, 2)),
            round(s.peak_rss_mib),
        )
        for s in summaries
    )
    return Table("Medians over all rounds", columns, rows)


def _reading_table(readings: Sequence[Reading], distinct: Mapping[tuple[str, str, int], int]) -> Table:
    columns = (
        *("round", "workload", "server", "TTFT mean s", "wall s", "prompt tokens", "computed", "distinct"),
        *("answer tokens", "warm TTFT ms", "decode step ms"),
    )
    rows = tuple(
        (
            *(r.round, r.shape, r.server, round(r.run.ttft.mean_s, 4), round(r.run.wall_s, 2)),
            *(r.run.prompt_tokens, r.run.computed_tokens, distinct[reading_key(r)]),
            *(r.run.completion_tokens, round(r.warm_ttft_s * 1e3, 2), round(r.decode_step_s * 1e3, 2)),
        )
        for r in readings
    )
    return Table("Every reading", columns, rows)


def _reading_json(reading: Reading, distinct: int) -> dict[str, object]:
    return {
        "server": reading.server,
        "shape": reading.shape,
        "round": reading.round,
        "ttft": asdict(reading.run.ttft),
        "ttft_by_turn_s": [[round(a.ttft_s, 4) for a in turn] for turn in reading.run.answers],
        "wall_s": reading.run.wall_s,
        "prompt_tokens": reading.run.prompt_tokens,
        "computed_tokens": reading.run.computed_tokens,
        "distinct_tokens": distinct,
        "completion_tokens": reading.run.completion_tokens,
        "warm_ttft_s": reading.warm_ttft_s,
        "decode_step_s": reading.decode_step_s,
        "peak_rss_bytes": reading.peak_rss_bytes,
        "cpu_percent_before": reading.idleness.cpu_percent,
    }


def _chart(summaries: Sequence[Summary]) -> Chart:
    """Mean TTFT and wall, one group of bars for each workload."""
    shapes = tuple(dict.fromkeys(summary.shape for summary in summaries))
    servers = dict.fromkeys(summary.server for summary in summaries)
    ttft = {name: [s.ttft_mean_s for s in summaries if s.server == name] for name in servers}
    wall = {name: [s.wall_s for s in summaries if s.server == name] for name in servers}
    return Chart(
        (
            Bars("Mean time to first token", "workload", "s", shapes, ttft),
            Bars("Wall time of the whole workload", "workload", "s", shapes, wall),
        )
    )
