"""`stockpot bench`: measurements a user can repeat."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stockpot.cli.bench_report import finish, finish_all, run_measurement, shown_progress

if TYPE_CHECKING:
    from stockpot.bench.peer import Peer
    from stockpot.bench.results import Result

_Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the results. [default: ./bench-results/<name>]", file_okay=False),
]
_Quick = Annotated[
    bool,
    typer.Option("--quick", help="A short run to see that all works; its figures mean little."),
]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        no_args_is_help=True,
        help=(
            "Measure what caching saves on this machine.\n\n"
            "Each benchmark starts servers of its own on free ports, with the settings of the environment "
            "and of ./stockpot.toml, and stops them. Close what else runs: busy programs measure each other. "
            "Results are a table here, and JSON, CSV, Markdown and a chart in --out."
        ),
    )
    _add_kv_cost(group)
    _add_prefix(group)
    _add_peers(group)
    _add_memory(group)
    _add_tiers(group)
    _add_faults(group)
    _add_soak(group)
    _add_eviction(group)
    _add_fleet(group)
    _add_gateway(group)
    _add_recall(group)
    _add_doctor(group)
    app.add_typer(group, name="bench")


def _add_kv_cost(group: typer.Typer) -> None:
    @group.command("kv-cost")
    def kv_cost(
        turns: Annotated[int, typer.Option(min=1, max=100, help="Turns of the conversation.")] = 10,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """A growing conversation, with its KV kept and with everything recomputed.

        Keys and values (KV) are what the model keeps of each token it has read. Kept, they cost memory that
        grows with the conversation; thrown away, each turn reads the whole conversation again, and the wait
        for the first token (TTFT) grows instead. Shows both, turn by turn. Takes about a minute.
        """
        from stockpot.bench.kv_cost import KvCostPlan, measure_kv_cost

        plan = KvCostPlan.quick() if quick else KvCostPlan(turns=turns)
        with shown_progress() as progress:
            result = run_measurement(measure_kv_cost(plan, progress=progress))
        finish(result, out)


def _add_prefix(group: typer.Typer) -> None:
    @group.command()
    def prefix(
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """Many users behind one long system prompt, with the prefix cache and without.

        1, 4 and 16 users at once ask short questions behind the same 2,000 tokens. With the cache they are
        prefilled once for all, also when the first questions come at the same moment; without it, once for
        each question. Takes a few minutes, nearly all of it without the cache.
        """
        from stockpot.bench.prefix import PrefixPlan, measure_prefix

        plan = PrefixPlan.quick() if quick else PrefixPlan()
        with shown_progress() as progress:
            result = run_measurement(measure_prefix(plan, progress=progress))
        finish(result, out)


def _add_peers(group: typer.Typer) -> None:
    @group.command()
    def peers(
        rounds: Annotated[
            int, typer.Option(min=1, max=20, help="Rounds; each starts every server cold, in turn.")
        ] = 3,
        only: Annotated[
            list[str] | None,
            typer.Option("--peer", help="llama-server or vllm; may be given twice. [default: both]"),
        ] = None,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """The same chats against this server, llama-server and vLLM.

        Sessions of several turns behind one 1,500-word system prompt, some at a time; the same weights, each
        server with the encoding and options that are best for it. The first run installs the other two in the
        cache folder: llama-server is compiled (5 minutes or more; needs cmake and a C++ compiler), vLLM's
        environment takes 3 GB. Exits with 1 where a floor of the project is missed.
        """
        from stockpot.bench.peers import PeersPlan, measure_peers

        plan = PeersPlan.quick() if quick else PeersPlan(rounds=rounds)
        chosen = _peers(only)
        with shown_progress() as progress:
            for peer in chosen:
                peer.prepare(progress)
            result = run_measurement(measure_peers(plan, chosen, progress=progress))
        finish(result, out)


def _add_memory(group: typer.Typer) -> None:
    @group.command()
    def memory(
        requests: Annotated[int, typer.Option(min=100, help="How many; growth needs many to show.")] = 10_000,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """Does the server keep to its memory over thousands of requests?

        Short chats, completions, longer prompts and clients that leave early, against a small RAM tier that
        is full nearly all the time. Resident memory must stay within 1.1 x (weights + configured KV + RAM
        tier + 300 MB) and must not grow over the last half. Exits with 1 where it does not.
        """
        from stockpot.bench.memory import MemoryPlan, measure_memory

        plan = MemoryPlan.quick() if quick else MemoryPlan(requests=requests)
        with shown_progress() as progress:
            result = run_measurement(measure_memory(plan, progress=progress))
        finish(result, out)


def _add_tiers(group: typer.Typer) -> None:
    @group.command()
    def tiers(
        rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds; each measures every case.")] = 7,
        disk: Annotated[
            Path | None,
            typer.Option(
                help="A folder on the disk to measure. [default: that of temporary files]",
                file_okay=False,
                exists=True,
            ),
        ] = None,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """A prefix of 2,000 tokens: computed, and back from the context, RAM, disk and Redis.

        Time to first token (TTFT) of a short question behind the prefix, from each place it can be, also by a
        second server over Redis and by the first one after kill -9. Starts a Redis of its own (needs
        redis-server or valkey-server). Takes about five minutes. Exits with 1 where a floor is missed.
        """
        from stockpot.bench.tiers import TiersPlan, measure_tiers

        plan = TiersPlan.quick(disk) if quick else TiersPlan(rounds=rounds, disk_folder=disk)
        with shown_progress() as progress:
            result = run_measurement(measure_tiers(plan, progress=progress))
        finish(result, out)


def _add_faults(group: typer.Typer) -> None:
    @group.command()
    def faults(
        rounds: Annotated[int, typer.Option(min=1, max=20, help="How often each fault comes.")] = 3,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """Redis stopped, frozen, emptied and slow: does a request notice?

        New prompts to a server whose Redis is in trouble, beside the same to a server without Redis. No
        request may fail, and none may wait 100 ms longer. Starts a Redis of its own (needs redis-server or
        valkey-server). Takes about ten minutes. Exits with 1 where a floor is missed.
        """
        from stockpot.bench.faults import FaultsPlan, measure_faults

        plan = FaultsPlan.quick() if quick else FaultsPlan(rounds=rounds)
        with shown_progress() as progress:
            result = run_measurement(measure_faults(plan, progress=progress))
        finish(result, out)


def _add_soak(group: typer.Typer) -> None:
    @group.command()
    def soak(
        minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30.0,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """Mixed chat under all tiers, of twice what RAM holds: errors, memory, hits.

        Sessions with shared system prompts and several turns, long prompts, clients that leave, against a
        small RAM tier, a small disk tier and a Redis of its own (needs redis-server or valkey-server), so
        that blocks move and leave everywhere. Exits with 1 where a request failed or memory grew.
        """
        from stockpot.bench.soak import SoakPlan, measure_soak

        plan = SoakPlan.quick() if quick else SoakPlan(minutes=minutes)
        with shown_progress() as progress:
            result = run_measurement(measure_soak(plan, progress=progress))
        finish(result, out)


def _add_eviction(group: typer.Typer) -> None:
    @group.command()
    def eviction(
        traces: Annotated[
            Path, typer.Option(help="Folder of the recorded traces.", file_okay=False, exists=True)
        ],
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """Which eviction policy finds most: recorded workloads, replayed at several sizes of a tier.

        Needs no model. The traces and what they are called: see benchmarks/eviction.
        """
        from stockpot.bench.eviction import EvictionPlan, measure_eviction

        plan = EvictionPlan.quick(traces) if quick else EvictionPlan(traces)
        with shown_progress() as progress:
            result = measure_eviction(plan, progress=progress)
        finish(result, out)


def _add_gateway(group: typer.Typer) -> None:
    @group.command()
    def gateway(
        rounds: Annotated[
            int, typer.Option(min=1, max=20, help="Rounds; each measures every server in turn.")
        ] = 5,
        litellm: Annotated[
            bool, typer.Option(help="Measure LiteLLM's proxy too; installed in the cache folder, 650 MB.")
        ] = True,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """What the gateway costs: a provider that answers at once, with it, without it, and behind LiteLLM.

        HTTP and JSON included; keys, limits, ledger and metrics on. Requests a second at 16 connections, time
        added at one connection and at 500 requests/s, delay of the chunks of 100 streams, memory over 200,000
        requests. Takes about fifteen minutes. Exits with 1 where a floor is missed.
        """
        from stockpot.bench.gateway_overhead import OverheadPlan, measure_overhead
        from stockpot.bench.peer_litellm import LiteLLMPeer
        from stockpot.settings import load_settings

        plan = OverheadPlan.quick() if quick else OverheadPlan(rounds=rounds)
        others = [LiteLLMPeer(load_settings().cache_dir)] if litellm else []
        with shown_progress() as progress:
            for peer in others:
                peer.prepare(progress)
            result = run_measurement(measure_overhead(plan, others, progress=progress))
        finish(result, out)


def _add_fleet(group: typer.Typer) -> None:
    @group.command()
    def fleet(
        rounds: Annotated[int, typer.Option(min=1, max=50, help="Rounds; each plays every policy.")] = 3,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """Chats through the gateway to two vLLM servers: what each routing policy finds cached again.

        Sessions of several turns behind one system prompt: requests in turn, to the least loaded, and to
        where their prefix is cached, as the servers' KV events tell. Cached tokens and time to first token.
        The first run installs vLLM in the cache folder (3 GB). Exits with 1 where a floor is missed.
        """
        from stockpot.bench.fleet import FleetPlan, measure_fleet
        from stockpot.bench.fleet_servers import VllmWorkers, running_workers
        from stockpot.settings import load_settings

        plan = FleetPlan.quick() if quick else FleetPlan(rounds=rounds)
        vllm = VllmWorkers(load_settings().cache_dir)
        with shown_progress() as progress:
            vllm.prepare(progress)

            async def measure() -> Result:
                async with running_workers(vllm, count=2, progress=progress) as workers:
                    return await measure_fleet(plan, workers, facts=vllm.facts(), progress=progress)

            result = run_measurement(measure())
        finish(result, out)


def _add_recall(group: typer.Typer) -> None:
    @group.command()
    def recall(
        *,
        only: Annotated[
            list[str] | None,
            typer.Option("--only", help="fow, stream or speed; may be given several times. [default: all]"),
        ] = None,
        stream: Annotated[
            list[Path] | None,
            typer.Option(
                help="Labelled texts, CSV with text,category; may be given several times."
                " [default: ../shared/data/banking77/*.csv]",
                dir_okay=False,
                exists=True,
            ),
        ] = None,
        shuffles: Annotated[int, typer.Option(min=1, max=1000, help="Orders of the stream.")] = 20,
        gptcache: Annotated[
            bool, typer.Option(help="Ask GPTCache too; installed in the cache folder, 240 MB.")
        ] = True,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """Kept answers: wrong ones on traps and in labelled streams, beside other caches, and times.

        fow: pairs of questions and of conversations, half of them traps (package fow-cache), beside cosine
        thresholds, GPTCache and RedisVL's rule. stream: labelled texts in random order; does the share of
        wrong answers stay below max_error? speed: exact hits over HTTP, decisions at 100,000 entries, what a
        miss adds to a generation. Takes about twenty minutes. Exits with 1 where a floor is missed.
        """
        from stockpot.bench.recall.parts import PARTS, Part, measure_parts

        unknown = [name for name in only or () if name not in PARTS]
        if unknown:
            raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(PARTS)}", param_hint="--only")
        chosen: list[Part] = [part for part in PARTS if not only or part in only]
        with shown_progress() as progress:
            results = run_measurement(
                measure_parts(
                    chosen,
                    stream_files=stream,
                    shuffles=shuffles,
                    with_gptcache=gptcache,
                    quick=quick,
                    progress=progress,
                )
            )
        folder = out or Path("bench-results") / "recall"
        finish_all([(result, folder / part) for part, result in results.items()])


def _add_doctor(group: typer.Typer) -> None:
    @group.command()
    def doctor(
        requests: Annotated[
            int, typer.Option(min=0, max=10_000_000, help="Of the run for speed; 0: none.")
        ] = 1_000_000,
        peers: Annotated[
            bool, typer.Option(help="Other tools too; installed in the cache folder, 600 MB.")
        ] = True,
        out: _Out = None,
        quick: _Quick = False,
    ) -> None:
        """How well `stockpot doctor` names causes, beside other tools; and a million requests in how long.

        Conversations that are broken on purpose, and healthy ones, interleaved in files. About ten minutes
        with the other tools. Exits with 1 where a floor is missed.
        """
        from stockpot.bench.doctor.run import DoctorPlan, measure_doctor
        from stockpot.settings import load_settings

        plan = DoctorPlan.quick() if quick else DoctorPlan(requests=requests, with_peers=peers)
        with shown_progress() as progress:
            result = measure_doctor(plan, cache_dir=load_settings().cache_dir, progress=progress)
        finish(result, out)


def _peers(only: list[str] | None) -> tuple[Peer, ...]:
    """Ourselves and the wanted others. Raises BadParameter for a name that is none."""
    from stockpot.bench.peer import StockpotPeer
    from stockpot.bench.peer_llama_server import LlamaServerPeer
    from stockpot.bench.peer_vllm import VllmPeer
    from stockpot.settings import load_settings

    settings = load_settings()
    others: dict[str, Peer] = {
        peer.name: peer for peer in (LlamaServerPeer(settings.cache_dir), VllmPeer(settings.cache_dir))
    }
    unknown = [name for name in only or () if name not in others]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(others)}", param_hint="--peer")
    wanted = [others[name] for name in dict.fromkeys(only or others)]
    return (StockpotPeer(), *wanted)
