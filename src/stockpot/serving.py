"""Puts a server together: engine or none, backends, gateway, accounts; and anew when settings change."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import Metric

from stockpot import __version__
from stockpot.accounts.accounts import Accounts, open_accounts
from stockpot.accounts.prices import PriceBook
from stockpot.allowances.allowance import Allowances
from stockpot.allowances.store import AllowanceStore
from stockpot.backends.backend import Backend
from stockpot.backends.open_remote import open_remote
from stockpot.caller import Limits
from stockpot.clock import Clock
from stockpot.config_check import check
from stockpot.config_watch import ConfigWatch, changed, reloadable, unreloadable
from stockpot.engine.reports import EngineStats
from stockpot.errors import ConfigurationError
from stockpot.events import Delta
from stockpot.gateway.executor import Executor
from stockpot.gateway.gateway import Course, Gateway
from stockpot.gateway.guarding import no_guards
from stockpot.gateway.spans import Spans
from stockpot.guards.checks import Ask
from stockpot.guards.counts import GuardCounts
from stockpot.guards.guards import open_guards
from stockpot.identity.key_admin import KeyAdmin
from stockpot.identity.resolver import Resolver
from stockpot.identity.sql_keys import SqlKeyStore
from stockpot.recall.administration import RecallAdministration
from stockpot.records import RecordObserver
from stockpot.requests import NO_RECALL, ChatRequest, Generation, Message, Sampling
from stockpot.routing.member import Member
from stockpot.routing.placement import PrefixPlacement, open_placement
from stockpot.routing.router import Router
from stockpot.serving_recall import open_recall_of, recall_metrics_of
from stockpot.settings import Settings
from stockpot.settings_gateway import EMBEDDED
from stockpot.telemetry.families import counter, gauge
from stockpot.telemetry.gateway_metrics import GatewayFigures, GatewayMetrics
from stockpot.telemetry.logs import RequestLog
from stockpot.telemetry.metrics import Metrics
from stockpot.telemetry.recording import Recording
from stockpot.telemetry.tracing import open_spans
from stockpot.wire.identity import Identity, is_this_machine
from stockpot.wire.service import Service

if TYPE_CHECKING:
    from stockpot.recall.recall import Recall

_LOG = logging.getLogger(__name__)
_JUDGE_TOKENS = 64
_ENDS_IN_S = 2.0
"""For so long requests that are ended may take to say so."""


@dataclass(slots=True)
class Serving:
    """The parts of a running server. `reload` replaces what a configuration decides; requests under way end
    by what they began with."""

    settings: Settings
    gateway: Gateway
    executor: Executor
    placement: PrefixPlacement
    allowances: Allowances
    accounts: Accounts | None
    keys: KeyAdmin | None
    service: Service
    guard_counts: GuardCounts
    recall: Recall | None
    recording: Recording | None
    clock: Clock
    _ask: Ask
    _end_tracing: Callable[[], None]
    _resolver: Resolver | None
    _members: tuple[Member, ...]
    watch: ConfigWatch | None = None
    _closed: bool = False
    _was_told_to_end: bool = False
    _retiring: dict[asyncio.Task[None], Member] = field(default_factory=dict[asyncio.Task[None], Member])

    async def start(self) -> None:
        """Bring everything up; the embedded engine raises where it cannot, other backends come when they are
        there."""
        await self.allowances.start()
        await asyncio.gather(*(member.backend.start() for member in self._members))
        await self.placement.start()
        if self.recall is not None:
            await self.recall.start()
        if self.recording is not None:
            await self.recording.start()
        await self.executor.start()
        await self.gateway.start()
        self.gateway.course.router.unserved()

    async def stop(self, *, drain: bool) -> None:
        """Let requests end (`drain`) or end them, write what waits to be written, let go of everything.
        Harmless a second time.

        A request whose client does not read what it is sent stands still, and cannot be ended from here.
        Where there is one, the accounts stay open for it: the server cuts its connection, and stops this
        again.
        """
        # The embedded engine first: it refuses what is new, and ends what runs unless it may finish.
        if drain:
            await self.gateway.stop(drain=True)
        members = (*self._members, *self._retiring.values())
        ending = [asyncio.create_task(member.backend.stop(drain=drain)) for member in members]
        await self.executor.stop()
        ended, standing = await asyncio.wait(ending, timeout=None if drain else _ENDS_IN_S)
        for task in ended:
            task.result()
        for task in standing:
            task.cancel()
        await self.gateway.stop(drain=drain)
        await self.placement.stop()
        if self.gateway.load().running and not self._was_told_to_end:
            self._was_told_to_end = True
            return
        if self._closed:
            return
        self._closed = True
        await self.allowances.close()
        if self.recall is not None:
            await self.recall.close()
        if self.recording is not None:
            await self.recording.close()
        if self._resolver is not None:
            self._resolver.close()
        if self.accounts is not None:
            await asyncio.to_thread(self.accounts.close)
        await asyncio.to_thread(self._end_tracing)

    async def reload(self, settings: Settings) -> None:
        """From now on by `settings`, as far as they can change while a server runs; what needs a restart is
        logged. Raises ConfigurationError, and everything stays as it was."""
        findings = await asyncio.to_thread(check, settings)
        if findings.errors:
            raise ConfigurationError(" ".join(findings.errors))
        names = changed(self.settings, settings)
        if waiting := unreloadable(self.settings, settings):
            _LOG.warning("these settings have changed and wait for a restart: %s", ", ".join(waiting))
            settings = reloadable(self.settings, settings)
        engine = next((each for each in self._members if each.name == EMBEDDED), None)
        kept = {each.name: each for each in self._members}
        members = [engine] if engine else []
        fresh: list[Member] = []
        for name, section in settings.backends.items():
            known = kept.get(name)
            if known is not None and known.settings == section:
                members.append(known)
            else:
                fresh.append(Member(name, open_remote(name, section, clock=self.clock), section))
        members += fresh
        prices = await asyncio.to_thread(
            PriceBook, settings.backends, embedded=settings.engine.hardware, clock=self.clock
        )
        course = _course(settings, tuple(members), prices, self._ask, self.guard_counts)
        identity = _identity(settings, self._resolver, self.clock)
        await asyncio.gather(*(member.backend.start() for member in fresh))
        await self.placement.reconfigure(members, settings.routing)
        self.executor.reconfigure(members, settings.resilience)
        if self.recall is not None:
            self.recall.take(settings.recall)
        self.gateway.take(course)
        gone = [each for each in self._members if each not in members]
        self._members, self.settings, self.service.identity = tuple(members), settings, identity
        if self._resolver is not None:
            self._resolver.take_teams(_team_limits(settings))
        for member in gone:
            task = asyncio.create_task(member.backend.stop(drain=True))
            self._retiring[task] = member
            task.add_done_callback(self._retired)
        course.router.unserved()
        await self.service.audit("stockpot serve", "settings.reload", "settings", changed=names)

    def _retired(self, task: asyncio.Task[None]) -> None:
        del self._retiring[task]


def open_serving(
    settings: Settings,
    engine: Backend | None,
    *,
    clock: Clock,
    stats: Callable[[], EngineStats] | None = None,
    observers: Sequence[RecordObserver] = (),
    spans: Spans | None = None,
) -> Serving:
    """The parts of a server by these settings, not started yet.

    `engine` is the backend in this process, `stats` its snapshot for metrics. `observers` are told of every
    request beside ledger, metrics and log; `spans` takes the place of what the settings say of tracing. On
    the event loop; reads files. Raises ConfigurationError, DatabaseUnavailable.
    """
    if (findings := check(settings)).errors:
        raise ConfigurationError(" ".join(findings.errors))
    members = [Member(EMBEDDED, engine, None)] if engine is not None else []
    members += [
        Member(name, open_remote(name, section, clock=clock), section)
        for name, section in settings.backends.items()
    ]
    accounts = open_accounts(settings, clock=clock) if settings.accounts.enabled else None
    resolver = keys = None
    if accounts is not None:
        store = SqlKeyStore(accounts.database)
        resolver = Resolver(store, clock, teams=_team_limits(settings))
        keys = KeyAdmin(store, accounts.audit, clock)
        prices = accounts.prices
    else:
        prices = PriceBook(settings.backends, embedded=settings.engine.hardware, clock=clock)
    guard_counts = GuardCounts()
    placement = open_placement(members, settings.routing, clock)
    recall = open_recall_of(settings, lambda: serving.gateway, lambda: serving.settings, clock, ask=_ask)
    executor = Executor(members, placement, settings.resilience, clock, recall=recall)
    allowances = Allowances(settings.allowances, clock, _allowance_store(settings))
    end_tracing: Callable[[], None] = _nothing
    if spans is None:
        spans, end_tracing = open_spans(settings.telemetry, __version__, lambda: serving.settings.backends)

    async def ask(model: str, instruction: str, text: str) -> str:
        return await _ask(gateway, model, instruction, text)

    figures = GatewayFigures(
        models=lambda: (card.id for card in gateway.models()),
        conditions=executor.conditions,
        waiting=executor.waiting,
        findings=guard_counts.totals,
        ledger=accounts.ledger.stats if accounts is not None else None,
    )
    gateway_metrics = GatewayMetrics(figures, clock)
    families = [gateway_metrics.families, lambda: state_families(serving)]
    told: list[RecordObserver] = [] if accounts is None else [accounts.ledger]
    told += [gateway_metrics, RequestLog()]
    if recall is not None:
        recall_metrics = recall_metrics_of(recall)
        families.append(recall_metrics.families)
        told.append(recall_metrics)
    recording = _recording(settings, lambda: serving.settings)
    if recording is not None:
        told.append(recording)
    metrics = Metrics(stats, more=tuple(families))
    gateway = Gateway(
        _course(settings, tuple(members), prices, ask, guard_counts),
        executor,
        allowances,
        observers=(*told, *observers),
        spans=spans,
        clock=clock,
    )
    service = Service(gateway, settings, metrics, clock, _identity(settings, resolver, clock), accounts, keys)
    if recall is not None:
        service.recall = RecallAdministration(recall, clock)
    service.recording = recording
    serving = Serving(
        settings=settings,
        gateway=gateway,
        executor=executor,
        placement=placement,
        allowances=allowances,
        accounts=accounts,
        keys=keys,
        service=service,
        guard_counts=guard_counts,
        recall=recall,
        recording=recording,
        clock=clock,
        _ask=ask,
        _end_tracing=end_tracing,
        _resolver=resolver,
        _members=tuple(members),
    )
    return serving


def state_families(serving: Serving) -> Iterable[Metric]:
    """What the parts of a server know of themselves, for /metrics."""
    yield gauge(
        "gateway_allowances_lost",
        "1 while the store of allowances is out of reach.",
        (),
        [((), float(serving.allowances.is_lost))],
    )
    placed = serving.placement.stats()
    yield counter(
        "gateway_placements",
        "Requests placed by what is known of backends' caches: from their KV events, or estimated.",
        ("knowledge",),
        [(("events",), placed.by_events), (("estimate",), placed.by_estimate)],
    )
    yield gauge(
        "gateway_prefix_tokens",
        "Tokens a backend is known to have cached.",
        ("backend",),
        [((name,), each.tokens) for name, each in placed.members.items()],
    )
    if (watch := serving.watch) is not None:
        outcomes = [(("ok",), watch.reloads), (("failed",), watch.failures)]
        yield counter("config_reloads", "Reloads of the settings.", ("outcome",), outcomes)


def _nothing() -> None:
    pass


def _course(
    settings: Settings,
    members: tuple[Member, ...],
    prices: PriceBook,
    ask: Ask,
    counts: GuardCounts,
) -> Course:
    router = Router(
        settings.routes,
        default_policy=settings.routing.policy,
        serves=lambda model: any(member.serves(model) for member in members),
        known=lambda: (card.id for member in members for card in member.backend.models()),
    )
    guards = open_guards(settings.guards, ask, counts) if settings.guards else no_guards()
    hedges = settings.resilience.hedge_after_s is not None
    return Course(members, router, guards, prices, settings.allowances, hedges)


def _identity(settings: Settings, resolver: Resolver | None, clock: Clock) -> Identity:
    return Identity(settings.access, resolver, teams=_team_limits(settings), clock=clock)


def _recording(settings: Settings, now: Callable[[], Settings]) -> Recording | None:
    wanted, access = settings.telemetry.recording, settings.access
    alone = is_this_machine(settings.server.host) and access.keys == "auto" and not access.tenants
    if wanted.mode == "off" or (wanted.mode == "auto" and not alone):
        return None

    def provider_of(backend: str) -> str:
        if backend == EMBEDDED:
            return "stockpot"
        section = now().backends.get(backend)
        if section is None:
            return ""
        return section.provider or ("anthropic" if section.kind == "anthropic" else section.server)

    return Recording(wanted, provider_of)


def _team_limits(settings: Settings) -> dict[str, Limits]:
    return {name: team.limits.limits() for name, team in settings.teams.items()}


def _allowance_store(settings: Settings) -> AllowanceStore | None:
    if settings.allowances.redis_url is None:
        return None
    from stockpot.allowances.redis_store import RedisStore

    return RedisStore(settings.allowances)


async def _ask(gateway: Gateway, model: str, instruction: str, text: str) -> str:
    """A model's answer to a guard. Past the guards, whose own question it is; it costs nobody's allowance."""
    generation = Generation(
        model,
        f"guard-{uuid.uuid4().hex}",
        sampling=Sampling(temperature=0),
        max_tokens=_JUDGE_TOKENS,
        deadline_s=60.0,
        recall=NO_RECALL,
    )
    request = ChatRequest(generation, (Message("system", instruction), Message("user", text)))
    pieces: list[str] = []
    async for event in gateway.unguarded(request):
        if isinstance(event, Delta):
            pieces.append(event.text)
    return "".join(pieces)
