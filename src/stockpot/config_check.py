"""What can be told wrong about settings before anything runs: no network, no model, nothing created."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stockpot import __version__
from stockpot.accounts.database import Database
from stockpot.accounts.prices import PriceBook
from stockpot.allowances.redis_store import RedisStore
from stockpot.clock import SystemClock
from stockpot.errors import ConfigurationError, StockpotError
from stockpot.gateway.cascade import check_cascade
from stockpot.guards.counts import GuardCounts
from stockpot.guards.guards import open_guards
from stockpot.kv.envelope import Sealing
from stockpot.kv.service import redis_options
from stockpot.recall.stores.open_store import open_store
from stockpot.routing.router import Router
from stockpot.settings import Settings
from stockpot.settings_gateway import RouteSettings
from stockpot.settings_problems import nearest, unknown_variables
from stockpot.settings_recall import RecallSettings
from stockpot.telemetry.tracing import open_spans
from stockpot.wire.identity import is_this_machine

OTHER_VARIABLES = ("STOCKPOT_ADMIN_KEY",)
"""Variables of the command line that are no settings."""


@dataclass(slots=True)
class Findings:
    """Sentences. A server with `errors` does not start; `warnings` are probably mistakes; `notes` say what
    could not be checked."""

    errors: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])

    def attempt(self, make: Callable[[], object]) -> None:
        """Make a part as the server would; what it cannot be made of is an error."""
        try:
            make()
        except ConfigurationError as error:
            self.errors.append(str(error))


@dataclass(frozen=True, slots=True)
class _Named:
    """A backend as a price book knows it."""

    name: str


def check(settings: Settings, referred: Iterable[str] = ()) -> Findings:
    """All that is wrong, or probably. `referred` are variables secrets refer to. Loads the functions that
    settings name (classifiers, verifiers), as the server does."""
    findings = Findings()
    if not settings.engine.enabled and not settings.backends:
        findings.errors.append(
            "There is nothing to serve: engine.enabled is false and there is no [backends.NAME]. Add one."
        )
    _check_routes(settings, findings)
    _check_guards(settings, findings)
    _check_state(settings, findings)
    _check_access(settings, findings)
    _check_prices(settings, findings)
    _check_recall(settings, findings)
    findings.warnings += unknown_variables(Settings, "STOCKPOT_", (*OTHER_VARIABLES, *referred))
    return findings


def known_models(settings: Settings) -> tuple[set[str], list[str]]:
    """The models backends are said to have, and the backends that tell theirs only when they run."""
    models = {model for backend in settings.backends.values() for model in backend.models}
    silent = [f"backends.{name}" for name, backend in settings.backends.items() if not backend.models]
    if settings.engine.enabled:
        file = Path(settings.model.source.rpartition(":")[2]).name.removesuffix(".gguf")
        models.add(re.sub(r"-\d{5}-of-\d{5}$", "", file))  # the first part of a split model
    return models, silent


def _check_routes(settings: Settings, findings: Findings) -> None:
    models, silent = known_models(settings)
    findings.attempt(
        lambda: Router(settings.routes, default_policy=settings.routing.policy, serves=models.__contains__)
    )
    unlisted: dict[str, None] = {}
    for name, route in settings.routes.items():
        for path, model in _leads_to(route):
            if model not in models and (model == name or model not in settings.routes):
                unlisted[model] = None
                if not silent:
                    findings.warnings.append(
                        f"routes.{name}.{path} is {model!r}, which no backend lists and no route is called"
                        f"{nearest(model, {*models, *settings.routes} - {name})}"
                    )
        _check_cascade(name, route, findings)
    if silent and unlisted:
        findings.notes.append(
            f"Whether {_listed(map(repr, unlisted))} can be served shows when {_listed(silent)}, which names"
            " no models here, runs."
        )


def _check_cascade(name: str, route: RouteSettings, findings: Findings) -> None:
    cascade = route.cascade
    if cascade is None:
        return
    try:
        check_cascade(cascade)
    except ConfigurationError as error:
        findings.errors.append(f"routes.{name}.cascade: {error}")
    if (cascade.pattern is None) == ("regex" in cascade.on):
        findings.warnings.append(
            f'routes.{name}.cascade checks no pattern: that takes both a pattern and "regex" in its list on.'
        )


def _check_guards(settings: Settings, findings: Findings) -> None:
    models, silent = known_models(settings)
    served = {*models, *settings.routes}
    teams = {*settings.teams, *settings.access.tenants}
    for name, guard in settings.guards.items():
        findings.attempt(
            lambda name=name, guard=guard: open_guards({name: guard}, _asks_nobody, GuardCounts())
        )
        wanted = [("models", model) for model in guard.models]
        wanted += [("judge", guard.judge)] if guard.judge is not None else []
        for what, model in wanted:
            if model not in served and not silent:
                findings.warnings.append(
                    f"guards.{name}.{what} names {model!r}, which is neither a model nor a route here"
                    f"{nearest(model, served)}"
                )
        for team in guard.teams:
            if team not in teams:
                findings.warnings.append(
                    f"guards.{name}.teams names {team!r}, which is in neither [teams] nor [access.tenants]:"
                    f" the guard is for virtual keys of this team alone{nearest(team, teams)}"
                )


def _check_state(settings: Settings, findings: Findings) -> None:
    """What lies outside of the process: databases, Redis, files."""
    database = settings.accounts.database
    if settings.accounts.enabled and database is not None:
        url = database.get_secret_value()
        if not url.startswith("sqlite"):  # which would be created
            findings.attempt(lambda: Database(url).close())
    findings.attempt(lambda: _trace(settings))
    if settings.allowances.redis_url is not None:
        findings.attempt(lambda: RedisStore(settings.allowances))
    if not (settings.engine.enabled and settings.cache.enabled):
        return
    cache = settings.cache
    findings.attempt(lambda: redis_options(cache.redis))
    if cache.redis.url is not None and cache.secret is None:
        findings.errors.append(
            "cache.redis.url needs cache.secret beside it, the same on all nodes: 16 bytes or more."
        )
    elif cache.secret is not None or cache.encrypt:
        secret = None if cache.secret is None else cache.secret.get_secret_value().encode()
        try:
            Sealing(secret, cache.encrypt)
        except ValueError as error:
            findings.errors.append(f"cache.secret and cache.encrypt do not fit: {error}.")


def _trace(settings: Settings) -> None:
    """Open what sends traces and end it with nothing sent."""
    _, end = open_spans(settings.telemetry, __version__, dict)
    end()


def _check_access(settings: Settings, findings: Findings) -> None:
    access = settings.access
    if access.keys == "auto" and not access.tenants and not is_this_machine(settings.server.host):
        findings.warnings.append(
            f"server.host is {settings.server.host}, and until there is a key, everybody who reaches it may"
            ' call. Set access.keys = "required", and make keys with `stockpot keys create`.'
        )
    if access.keys == "required" and not access.tenants and not settings.accounts.enabled:
        findings.warnings.append(
            'access.keys is "required", and there can be none: accounts.enabled is false, and there are no'
            " [access.tenants]. Nobody may call."
        )


def _check_prices(settings: Settings, findings: Findings) -> None:
    """A budget in money counts nothing where there are no prices."""
    limited = [
        name
        for name, team in settings.teams.items()
        if team.limits.usd_per_day is not None or team.limits.usd_per_month is not None
    ]
    if not limited:
        return
    book = PriceBook(settings.backends, embedded=settings.engine.hardware)
    for name, backend in settings.backends.items():
        member = _Named(name)
        if free := [model for model in backend.models if not book.upper_bound(member, model, 10_000, 10_000)]:
            findings.warnings.append(
                f"No price is known for {_listed(map(repr, free))} of backends.{name}: it costs nothing, and"
                f" budgets ({_listed(f'teams.{each}' for each in limited)}) do not count it. Give the backend"
                " prices, hardware or a provider."
            )


def _check_recall(settings: Settings, findings: Findings) -> None:
    recall = settings.recall
    if not recall.enabled:
        if recall != RecallSettings():
            findings.warnings.append(
                "[recall] is set, and nothing is kept: set recall.exact, or recall.semantic.mode."
            )
        return
    if recall.store is not None:
        findings.attempt(lambda: open_store(recall, settings.data_dir, SystemClock()))
    if recall.scope == "key" and not settings.accounts.enabled and not settings.access.tenants:
        findings.warnings.append(
            'recall.scope is "key", and there can be no keys: accounts.enabled is false, and there are no'
            " [access.tenants]. Nothing is kept."
        )
    models, silent = known_models(settings)
    wanted = [("models", model) for model in recall.models or ()]
    wanted += [("versions", model) for model in recall.versions]
    if recall.semantic.mode != "off":
        _check_semantic(recall, findings)
        named = {"judge": recall.semantic.judge, "embedding_model": recall.semantic.embedding_model}
        wanted += [(f"semantic.{name}", model) for name, model in named.items() if model is not None]
    for name, model in wanted:
        served = models if name == "versions" else {*models, *settings.routes}
        if model not in served and not silent:
            findings.warnings.append(
                f"recall.{name} names {model!r}, which is"
                f" {'no model' if name == 'versions' else 'neither a model nor a route'} here"
                f"{nearest(model, served)}"
            )


def _check_semantic(recall: RecallSettings, findings: Findings) -> None:
    semantic = recall.semantic
    if semantic.verifier is not None:
        # Imported where it is wanted, for its libraries.
        from stockpot.recall.semantic import load_verifier

        verifier = semantic.verifier
        findings.attempt(lambda: load_verifier(verifier))
    if not recall.sampled:
        findings.warnings.append(
            "recall.semantic looks up no request that is drawn at random, and most chats are: a temperature"
            " above 0, or none, and no seed. Set recall.sampled = true if any answer to them will do."
        )
    if semantic.mode == "on" and semantic.audit_share == 0:
        findings.warnings.append(
            "recall.semantic.audit_share is 0: no answer that is given is ever checked: nothing shows when"
            " more of them are wrong than max_error."
        )
    if semantic.index_url is not None and recall.store is None:
        findings.warnings.append(
            "recall.semantic.index_url is shared by all nodes, recall.store is not: each node removes what"
            " the others keep from the index. Give a redis:// store, unless this is the only node."
        )


def _leads_to(route: RouteSettings) -> list[tuple[str, str]]:
    """The names a route leads to, by where they stand in it."""
    edges = [(f"targets.{n}.model", target.model) for n, target in enumerate(route.targets)]
    edges += [(f"fallbacks.{n}.to", fallback.to) for n, fallback in enumerate(route.fallbacks)]
    edges += [("cascade.to", route.cascade.to)] if route.cascade else []
    edges += [("degrade.to", route.degrade.to)] if route.degrade else []
    return edges


async def _asks_nobody(model: str, instruction: str, text: str) -> str:
    del model, instruction, text
    raise StockpotError("No model is asked while settings are checked.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
